"""`lcmdistill evaluate`."""

import logging
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from lcmdistill.cli._options import Debug, Device, run_folder
from lcmdistill.evaluation.protocols import PROTOCOLS
from lcmdistill.evaluation.scorers.registry import SCORERS, parse_scorers
from lcmdistill.utils.errors import Interrupted, UsageError

logger = logging.getLogger(__name__)


def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Finished runs, by folder or by name under runs/; several are compared."),
    ],
    steps: Annotated[
        list[str] | None, typer.Option(help="Comma-separated step counts; repeatable.  [default: 1,2,4,8]")
    ] = None,
    guidance_scale: Annotated[
        list[str] | None,
        typer.Option(
            help="Comma-separated guidance scales; repeatable. The verdict uses the first.  [default: the run's value and "
            "the ends of its trained range; one value when comparing several runs]"
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="File of prompts held out of training, one per line.  [default: a bundled list]")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=10**6,
            help="Images per combination of steps and guidance; prompts repeat.  [default: 16; 50 for small networks]",
        ),
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(
            help="Real images for KID and FID: a folder or shards.  [default: the run's training images, if any]"
        ),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="TorchScript feature network for KID.  [default: MobileNetV2, if installed]")
    ] = None,
    inception: Annotated[Path | None, typer.Option(help="TorchScript Inception for FID; needs 10,000 images.")] = None,
    clip: Annotated[str | None, typer.Option(help="Short for --scorer clip=MODEL.")] = None,
    lpips: Annotated[Path | None, typer.Option(help="torchvision's AlexNet file, for LPIPS to the teacher.")] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME=MODEL, a local path or a cached hub id; repeatable. NAME: {', '.join(SCORERS)}."),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="gamma of TCD students, from 0 (no fresh noise) to 1.  [default: 0.3]")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help=f"Published protocol: {' or '.join(PROTOCOLS)}. It sets prompts, number of images, steps and metrics."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the start noise, the same for all combinations.")
    ] = 2026,
    batch_size: Annotated[
        int, typer.Option(min=1, max=65536, help="Images generated at once; results differ only by rounding.")
    ] = 16,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Comparison page for several runs. A single run's page is RUN/report.html.  [default: comparison.html]"
        ),
    ] = None,
    rank_by: Annotated[
        str | None,
        typer.Option(
            help="Metric that ranks several runs, such as kid_teacher, ssim@4 or recall@2.  [default: kid_teacher, or ssim]"
        ),
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> list[Any]:
    """Evaluate runs across steps and guidance scales against the teacher on held-out prompts, and write an HTML report."""
    published = PROTOCOLS.get(protocol or "")
    runs = [run_folder(run) for run in runs]
    counts = published.steps if published and not steps else step_counts(steps)
    scales = guidance_scales(guidance_scale, "--guidance-scale")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("a run is listed twice; list each run once")
    page = _page(runs, output)

    from lcmdistill.evaluation.options import EvaluationOptions
    from lcmdistill.evaluation.results import read_results

    options = EvaluationOptions(
        steps=counts,
        guidance_scales=scales,
        prompts=prompts,
        num_images=num_images,
        seed=seed,
        batch_size=batch_size,
        device=device,
        real=real,
        features=features,
        inception=inception,
        lpips=lpips,
        eta=eta,
        protocol=protocol,
        scorers=parse_scorers([*([f"clip={clip}"] if clip else []), *(scorer or [])]),
    )
    evaluate_and_report(runs, options, page, rank_by)
    return [read_results(run) for run in runs]


def evaluate_and_report(runs: list[Path], options: Any, page: Path | None, rank_by: str | None = None) -> None:
    """Evaluate runs, and write their reports, their cards' plots, and the page that compares them.

    Args:
        runs: The run folders.
        options: The evaluation's options.
        page: The file of the comparison; None writes none.
        rank_by: METRIC or METRIC@STEPS, by which the comparison ranks the runs.
    """
    from lcmdistill.evaluation.evaluate import evaluate
    from lcmdistill.hub.model_card import update_run_card
    from lcmdistill.report.card import write_card_plots
    from lcmdistill.report.comparison import ranking_text, write_comparison
    from lcmdistill.report.page import evaluation_summary, write_report

    try:
        evaluate(runs, options)
    except KeyboardInterrupt:
        message = "stopped; finished images and results are kept, re-run the same command to continue"
        raise Interrupted(message, signal.SIGINT) from None
    for run in runs:
        written = write_report(run)
        write_card_plots(run)
        update_run_card(run)
        logger.info(evaluation_summary(run))
        logger.info(f"report: {written}")
    if page:
        written = write_comparison(runs, page, rank_by)
        logger.info(ranking_text(runs, rank_by))
        logger.info(f"comparison: {written}")


def step_counts(steps: list[str] | None) -> tuple[int, ...]:
    """Return the step counts of an option; None is the default."""
    return tuple(int(n) for n in _numbers("--steps", ",".join(steps or ["1,2,4,8"]), whole=True))


def guidance_scales(scales: list[str] | None, option: str) -> tuple[float, ...]:
    """Return the guidance scales of an option; () is the runs' own."""
    return () if scales is None else _numbers(option, ",".join(scales))


def _page(runs: list[Path], output: Path | None) -> Path | None:
    """Return the path of the comparison page, or None for a single run.

    Raises:
        UsageError: The page cannot be written there. It is raised before any image is generated.
    """
    if len(runs) == 1:
        if output is not None:
            raise UsageError(f"--output is for several runs; the page of one is {runs[0] / 'report.html'}")
        return None
    from lcmdistill.utils.run_dir import check_writable

    page = output or Path("comparison.html")
    if page.is_dir():
        raise UsageError(f"--output {page} is a folder; specify a file, such as {page / 'comparison.html'}")
    check_writable(page.absolute().parent if page.is_file() else page)
    return page


def _numbers(option: str, text: str, *, whole: bool = False) -> tuple[float, ...]:
    """Return the distinct numbers of an option.

    Args:
        option: The option, for messages.
        text: The numbers, separated by commas.
        whole: Whether they must be integers.

    Raises:
        UsageError: The text has something else, or a number is out of range.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        values = [int(word) if whole else float(word) for word in words]
    except ValueError as error:
        example = "1,2,4,8" if whole else "4,7.5"
        raise UsageError(f"{option} is {text!r}; it must be comma-separated numbers, such as {example}") from error
    if not values or not all(1 <= value <= 1000 for value in values):
        raise UsageError(f"{option} is {text!r}; each number must be from 1 to 1000")
    return tuple(dict.fromkeys(values))
