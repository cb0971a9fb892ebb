"""Distill a Stable Diffusion checkpoint into a student that generates images in 1 to 8 steps.

The public API is one function per command of the command line, with the same names and defaults:

    import lcmdistill

    run = lcmdistill.distill(teacher="tiny", max_train_steps=20)
    images = lcmdistill.sample(run, steps=4, prompt="red apple, food")

Importing this module does not import torch. Every function raises `lcmdistill.utils.errors.UsageError` for what the caller
can correct (an unknown option, a value that is not allowed, a folder that is not a run), `RunError` for another failure, and
`Interrupted` after Ctrl-C, when everything is saved.
"""

import sys
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lcmdistill.utils.launch import process_index

if TYPE_CHECKING:
    from lcmdistill.config.schema import RunConfig as RunConfig
    from lcmdistill.evaluation.results import Results
    from lcmdistill.sampling.png import GeneratedImage

__version__ = "0.1.0"

__all__ = [
    "RunConfig",
    "distill",
    "distill_lora",
    "evaluate",
    "export",
    "info",
    "load_run",
    "report",
    "run",
    "sample",
]

AnyPath = str | PathLike[str]


def run(config: "RunConfig") -> Path:
    """Run or resume the distillation that a configuration describes, and return the run folder."""
    from lcmdistill.hub.publish import publish_run
    from lcmdistill.hub.run_documents import DOCUMENTS
    from lcmdistill.training.trainer import distill
    from lcmdistill.utils.logging import configure_console

    configure_console()
    folder = distill(config, DOCUMENTS)
    if config.run.push_to_hub and process_index() == 0:
        publish_run(folder, config.run.push_to_hub, private=config.run.hub_private)
    return folder


def distill(*, settings: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """Distill a teacher into a full student, like `lcmdistill distill`. The same call resumes a run.

    Args:
        settings: Settings without an option of their own, such as {"optim.beta1": 0.95}.
        **options: The options of `lcmdistill distill --help` with underscores, such as teacher, data, output,
            max_train_steps or learning_rate.

    Returns:
        The run folder. With dry_run=True nothing is trained, and the folder may not exist.
    """
    return _call("distill", settings=settings, **options)


def distill_lora(*, settings: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """Train an LCM-LoRA for a teacher, like `lcmdistill distill-lora`. Called like `distill`, with rank, alpha and so on."""
    return _call("distill-lora", settings=settings, **options)


def sample(
    model: AnyPath | None = None,
    *,
    prompt: str | Sequence[str] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    output: AnyPath | None = None,
    **options: Any,
) -> "list[GeneratedImage]":
    """Generate images, like `lcmdistill sample`.

    Args:
        model: A run folder, a pipeline folder, a single file or a hub id. None is the newest run under runs/.
        prompt: One prompt or several. None uses a bundled list.
        steps: The number of sampling steps. None is the number of the method, usually 4.
        guidance_scale: The guidance scale in diffusers' convention. None is the scale that the run recommends.
        seed: The seed of the first image. The following images count up.
        output: The folder for the images. None is RUN/images, or images/ for other models.
        **options: The other options of `lcmdistill sample --help` with underscores, such as lora, negative_prompt,
            num_images, width, height, eta, device or precision.

    Returns:
        The images in order, each with its `image` (a PIL image), `prompt` and `seed`.
    """
    options |= {"model": model, "prompt": prompt, "steps": steps, "guidance_scale": guidance_scale}
    return _call("sample", **options, seed=seed, output=output)


def evaluate(runs: AnyPath | Sequence[AnyPath], **options: Any) -> "list[Results]":
    """Evaluate finished runs against their teachers, like `lcmdistill evaluate`, and write their reports.

    Args:
        runs: One run folder, or several to compare.
        **options: The options of `lcmdistill evaluate --help` with underscores, such as steps, guidance_scale,
            prompts, num_images or device. `steps` and `guidance_scale` take a number or a sequence of numbers.

    Returns:
        The results of each run, in order.
    """
    return _call("evaluate", runs=runs, **options)


def report(run: AnyPath) -> Path:
    """Write the report of a run, finished or not, and return the path of its HTML page."""
    return _call("report", run=run)


def export(run: AnyPath, *, format: str, output: AnyPath, **options: Any) -> Path:
    """Export a finished run and verify the written files, like `lcmdistill export`.

    Args:
        run: The run folder.
        format: One of the formats that `lcmdistill export --help` lists, such as "kohya" or "single-file".
        output: The file or folder to write. It must not exist.
        **options: The other options of `lcmdistill export --help` with underscores, such as dtype or weights.

    Returns:
        The path that was written.
    """
    return _call("export", run=run, format=format, output=output, **options)


def info(model: AnyPath) -> dict[str, str]:
    """Describe a model, a run or a LoRA without loading its weights: {"type": ..., "license": ...}."""
    from lcmdistill.report.info import describe

    return dict(describe(str(model)))


def load_run(run: AnyPath) -> "RunConfig":
    """Return the settings that a run folder records."""
    from lcmdistill.objectives.recorded import require_run_config

    return require_run_config(Path(run))


def _call(command: str, settings: Mapping[str, Any] | None = None, **options: Any) -> Any:
    from lcmdistill.cli import call

    return call(command, options, settings)


def __getattr__(name: str) -> Any:
    if name == "RunConfig":
        from lcmdistill.config.schema import RunConfig

        return RunConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _CallableSubpackage(ModuleType):
    """A subpackage with the name of a public function. To call it is to call the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _FUNCTIONS[self.__name__](*args, **kwargs)


class _Package(ModuleType):
    """This package. Importing `lcmdistill.export` or `lcmdistill.report` replaces the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and value.__name__ in _FUNCTIONS:
            value.__class__ = _CallableSubpackage
        super().__setattr__(name, value)


_FUNCTIONS = {"lcmdistill.export": export, "lcmdistill.report": report}
sys.modules[__name__].__class__ = _Package
