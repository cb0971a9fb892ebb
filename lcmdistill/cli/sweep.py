"""`lcmdistill sweep`: train a grid of runs, evaluate them together, and compare them on one page."""

import dataclasses
import itertools
import logging
import math
import re
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lcmdistill.cli._aliases import Command
from lcmdistill.cli._options import SETTINGS, Debug, takes, training_options
from lcmdistill.cli.distill import configuration_from
from lcmdistill.cli.evaluate import evaluate_and_report, guidance_scales, step_counts
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.launch import num_processes
from lcmdistill.utils.run_names import RUNS
from lcmdistill.utils.units import counted, duration_text

logger = logging.getLogger(__name__)

PAGE = "comparison.html"

NOT_SPLIT = ("--data", "--output", "--prompts", "--config")
"options whose values are paths or lists: a comma in them does not separate alternatives"

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
"the training command's options are passed on to it"


@dataclass(frozen=True)
class Axis:
    """One setting with several values.

    Attributes:
        setting: The setting, such as "objective.skip".
        values: Its values as text.
        words: (value) -> the words of the command line that set it.
    """

    setting: str
    values: tuple[str, ...]
    words: Callable[[str], list[str]]


def sweep(
    ctx: typer.Context,
    command: Annotated[
        Literal["distill", "distill-lora"],
        typer.Argument(help="The training command. Its options follow; comma-separated values span the grid."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the runs and the page.  [default: runs/sweep-SETTINGS]")
    ] = None,
    eval_steps: Annotated[
        list[str] | None, typer.Option(help="Comma-separated step counts of the evaluation.  [default: 1,2,4,8]")
    ] = None,
    eval_guidance_scale: Annotated[
        list[str] | None, typer.Option(help="Guidance scale of the evaluation.  [default: the first run's]")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=2, max=10**6, help="Images per evaluated point.  [default: as evaluate]")
    ] = None,
    rank_by: Annotated[
        str | None,
        typer.Option(
            help="Metric that ranks the runs, such as kid_teacher, ssim@4 or recall@2.  [default: kid_teacher, or ssim]"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the runs, and exit.")] = False,
    debug: Debug = False,
) -> Path:
    """Train a grid of runs, evaluate them together and compare them on one page. Re-run the same command to resume.

    For example: lcmdistill sweep distill --teacher tiny --objective lcm,tcd --set objective.skip=5,20
    """
    words = [str(word) for word in ctx.args]
    fixed, axes = split_grid(words, _parameters(command))
    if not axes:
        raise UsageError(
            "the sweep has no option with several values; separate them by commas, such as --set objective.skip=1,5,20"
        )
    folder = output or RUNS / f"sweep-{'-'.join(short_names([axis.setting for axis in axes]))}"
    cells = [(folder / name, [*fixed, *own]) for name, own in grid_cells(axes)]
    counts, _ = step_counts(eval_steps), _check_rank(rank_by)
    scales = guidance_scales(eval_guidance_scale, "--eval-guidance-scale")
    if num_processes() > 1:
        raise UsageError("a sweep runs in one process; start it without accelerate launch or torchrun")
    configs = [_configuration(command, run, own) for run, own in cells]
    _check_with_teacher(configs)
    logger.info(f"{counted(len(cells), 'run')} in {folder}: {', '.join(run.name for run, _ in cells)}")
    if dry_run:
        words = shlex.join([command, *cells[0][1], f"--output={cells[0][0]}", "--dry-run"])
        logger.info(f"dry run: nothing was written; time, disk and memory of the first run: lcmdistill {words}")
        return folder

    import lcmdistill
    from lcmdistill.evaluation.options import EvaluationOptions

    finished, failed, seconds = [], [], list[float]()
    for number, ((run, _), config) in enumerate(zip(cells, configs, strict=True), start=1):
        logger.info(f"run {number} of {len(cells)}: {run.name}{time_left_text(seconds, len(cells) + 1 - number)}")
        began = time.monotonic()
        try:
            lcmdistill.run(config)
            finished.append(run)
            seconds.append(time.monotonic() - began)
        except RunError as error:
            logger.warning(f"{run.name} failed: {error}")
            failed.append(run)
        except UsageError as error:
            raise UsageError(f"{run.name}: {error}") from error
    page = folder / PAGE
    if finished:
        device = configs[0].run.device
        options = EvaluationOptions(steps=counts, guidance_scales=scales, num_images=num_images, device=device)
        evaluate_and_report(finished, options, page, rank_by)
    if failed:
        names = ", ".join(run.name for run in failed)
        raise RunError(f"{len(failed)} of {len(cells)} runs failed: {names}; the page has the others: {page}")
    return page


def time_left_text(seconds: Sequence[float], runs: int) -> str:
    """Return how long the runs of a sweep that are left take, from the seconds of the others; "" if none was trained.

    Args:
        seconds: Of the runs that ended in this command; those of a second or less had been finished before.
        runs: The number of runs left.
    """
    trained = [each for each in seconds if each > 1]
    if not trained:
        return ""
    return f"  left {duration_text(runs * sum(trained) / len(trained))} and the evaluation"


def split_grid(words: Sequence[str], parameters: Collection[Any]) -> tuple[list[str], list[Axis]]:
    """Separate the options with several values from the others.

    Args:
        words: The training command's options as written.
        parameters: The training command's parameters.

    Returns:
        The words that all runs share, and the axes of the grid.
    """
    flags = {name for each in parameters if getattr(each, "is_flag", False) for name in each.opts}
    repeated = {name for each in parameters if getattr(each, "multiple", False) for name in each.opts} - {"--set"}
    fixed: list[str] = []
    axes: list[Axis] = []
    rest = iter(words)
    for word in rest:
        name, sign, value = word.partition("=")
        if not word.startswith("--") or (not sign and name in flags):
            fixed.append(word)
            continue
        value = value if sign else next(rest, "")
        setting, key = SETTINGS.get(name[2:].replace("-", "_"), name[2:]), ""
        if name == "--set":
            setting, _, value = value.partition("=")
            setting, key = setting.strip(), f"{setting}="
        values = () if name in repeated or name in NOT_SPLIT else tuple(dict.fromkeys(split_values(value)))
        if len(values) > 1:
            axes.append(Axis(setting, values, lambda text, name=name, key=key: [f"{name}={key}{text}"]))
        else:
            fixed.append(f"{name}={key}{value}")
    if twice := [axis.setting for axis in axes if [each.setting for each in axes].count(axis.setting) > 1]:
        raise UsageError(f"{twice[0]} is given several values twice; list all of them once")
    return fixed, axes


def split_values(text: str) -> list[str]:
    """Split a text at its commas outside of brackets, braces and quotes."""
    parts = re.findall(r"""(?:[^,\[\]{}"']|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[\[\]{}"'])+""", text)
    return [part.strip() for part in parts if part.strip()]


def grid_cells(axes: Sequence[Axis]) -> Iterator[tuple[str, list[str]]]:
    """Yield each combination of values: the run's name, such as "lcm_skip-5", and the words that set it."""
    names = short_names([axis.setting for axis in axes])
    for values in itertools.product(*(axis.values for axis in axes)):
        parts = [_part(axis.setting, name, value) for axis, name, value in zip(axes, names, values, strict=True)]
        own = [word for axis, value in zip(axes, values, strict=True) for word in axis.words(value)]
        yield "_".join(parts), own


def short_names(settings: Sequence[str]) -> list[str]:
    """Return names of settings without their sections, unless two would be equal."""
    last = [setting.rpartition(".")[2] if setting != "objective.name" else "objective" for setting in settings]
    return [name if last.count(name) == 1 else setting for name, setting in zip(last, settings, strict=True)]


def _part(setting: str, name: str, value: str) -> str:
    text = re.sub(r"[^\w.+-]+", "-", value).strip("-.") or "none"
    return text if setting == "objective.name" else f"{name}-{text}"


def _parameters(command: str) -> list[Any]:
    """Return the parameters of a training command."""
    return _parser(command, lambda **options: None).params


def _parser(command: str, function: Callable[..., Any]) -> Any:
    """Return a command that parses a training command's options and calls a function with them."""
    app = typer.Typer(add_completion=False)
    kind = "lora" if command == "distill-lora" else "full"
    app.command(command, cls=Command)(takes(training_options(kind))(function))
    return typer.main.get_command(app)


def _configuration(command: str, run: Path, words: Sequence[str]) -> Any:
    """Return the checked configuration of one run of the grid.

    Raises:
        UsageError: An option or a setting is not allowed; the message names the run.
    """
    from lcmdistill.cli._errors import PARSER_ERROR, parser_sentence
    from lcmdistill.training import preflight

    kind = "lora" if command == "distill-lora" else "full"
    try:
        config = _parser(command, lambda **options: configuration_from(kind, options)).main(
            args=[*words, f"--output={run}"], prog_name=f"lcmdistill {command}", standalone_mode=False
        )
        preflight.check_early(config)
    except PARSER_ERROR as error:
        raise UsageError(f"{run.name}: {parser_sentence(error)}") from error
    except UsageError as error:
        raise UsageError(f"{run.name}: {error}") from error
    return config


def _check_with_teacher(configs: Sequence[Any]) -> None:
    """Check the runs against their teachers, before the first one is trained.

    Raises:
        UsageError: A setting is impossible with the run's teacher; the message names the run.
    """
    from lcmdistill.teachers.loading import load_teacher
    from lcmdistill.training.preflight import validate_for_teacher
    from lcmdistill.training.run_settings import resolve_run_defaults

    teacher, loaded = None, None
    for config in configs:
        try:
            if teacher is None or config.teacher != loaded:
                teacher, loaded = None, config.teacher  # one at a time in memory
                teacher = load_teacher(**dataclasses.asdict(config.teacher))
            validate_for_teacher(resolve_run_defaults(config, 1, teacher), teacher)
        except UsageError as error:
            raise UsageError(f"{Path(config.run.output).name}: {error}") from error


def _check_rank(rank_by: str | None) -> None:
    """Raise UsageError for a ranking that is not METRIC or METRIC@STEPS, before anything is trained."""
    _, sign, steps = (rank_by or "ssim").partition("@")
    if sign and not (steps.isdecimal() and 1 <= int(steps) < math.inf):
        raise UsageError(f"--rank-by is {rank_by!r}; it must be a metric, or a metric and its steps, such as ssim@4")
