"""Distill a Stable Diffusion checkpoint into a student that generates images in 1 to 8 steps."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lcmdistill.config.schema import RunConfig

__version__ = "0.1.0"


def run(config: "RunConfig") -> Path:
    """Run or resume the distillation that a configuration describes, and return the run folder.

    Raises:
        UsageError: The user can correct the configuration.
        RunError: The run failed for another reason.
        Interrupted: Ctrl-C or SIGTERM, after everything was saved.
    """
    import os

    from lcmdistill.hub.publish import publish_run
    from lcmdistill.hub.run_documents import DOCUMENTS
    from lcmdistill.training.trainer import distill
    from lcmdistill.utils.logging import configure_console

    configure_console()
    folder = distill(config, DOCUMENTS)
    if config.run.push_to_hub and os.environ.get("RANK", "0") == "0":
        publish_run(folder, config.run.push_to_hub, private=config.run.hub_private)
    return folder
