"""Upload a run's result, or one export, with a model card that states how it is used."""

import logging
import shlex
from pathlib import Path

from lcmdistill.export.sampling_facts import facts_from_run
from lcmdistill.export.single_file import COMPANION
from lcmdistill.hub import client as hub
from lcmdistill.hub.model_card import Card, export_card
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.utils.checksums import MANIFEST
from lcmdistill.utils.run_dir import lora_file

logger = logging.getLogger(__name__)


def publish_run(run: Path, repo: str, *, private: bool = False) -> None:
    """Upload the pipeline or LoRA of a finished run, its card and the card's pictures, to the root of a repository.

    Args:
        run: The run folder.
        repo: The repository, OWNER/NAME.
        private: Whether a new repository is private.

    Raises:
        RunError: The upload failed; the message names the command that uploads again.
    """
    config = require_run_config(run)
    is_lora = config.student.kind == "lora"
    folder = run / ("lora" if is_lora else "pipeline")
    file = lora_file(run).name if is_lora else ""
    command = "distill-lora" if is_lora else "distill"
    again = ["lcmdistill", command, "--config", str(run / "config.toml"), "--push-to-hub", repo]
    again += ["--private"] if private else []
    name = facts_from_run(run, config).family.run_lora_format if is_lora else "pipeline"
    _push(repo, _files(folder), export_card(run, name, repo, file), run.name, again, private)


def publish_export(run: Path, name: str, output: Path, repo: str, *, private: bool = False) -> None:
    """Upload an export of a run with its card.

    Args:
        run: The run folder.
        name: The format.
        output: The exported file or folder.
        repo: The repository, OWNER/NAME.
        private: Whether a new repository is private.

    Raises:
        RunError: The upload failed; the message names the command that uploads again.
    """
    both = (output, output.with_suffix(COMPANION))
    files: dict[str, Path | bytes] = _files(output) if output.is_dir() else {p.name: p for p in both if p.is_file()}
    again = ["hf", "upload", repo, str(output), *(["--private"] if private else [])]
    _push(repo, files, export_card(run, name, repo, output.name), output.name, again, private)


def _push(repo: str, files: dict[str, Path | bytes], card: Card, title: str, again: list[str], private: bool) -> None:
    files = {**files, **card.pictures, "README.md": card.text.encode()}
    url = hub.push(repo, files, f"Upload {title} with lcmdistill", shlex.join(again), private=private)
    logger.info(f"uploaded: {url}")


def _files(folder: Path) -> dict[str, Path | bytes]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
