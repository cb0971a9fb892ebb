"""`lcmdistill evaluate` and `lcmdistill report`."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from lcmdistill.cli._options import Debug, Device
from lcmdistill.utils.errors import UsageError

logger = logging.getLogger(__name__)


def evaluate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished runs; several are compared.")],
    steps: Annotated[
        list[str] | None, typer.Option(help="Numbers of steps, with commas; repeatable.  [default: 1,2,4,8]")
    ] = None,
    guidance_scale: Annotated[
        list[str] | None,
        typer.Option(
            help="Guidance scales, with commas; repeatable; the first is judged by.  [default: the run's own, and both ends of "
            "what it was trained on; of several runs one]"
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="File of prompts held out of training, one a line.  [default: a bundled list]")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(min=2, help="Images in each cell; prompts go round.  [default: 16; of a small network 32]"),
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(help="Real images for KID and FID: a folder or shards.  [default: the run's own, if it has any]"),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="TorchScript feature network for KID.  [default: MobileNetV2, if installed]")
    ] = None,
    inception: Annotated[Path | None, typer.Option(help="TorchScript Inception for FID; needs 10,000 images.")] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP folder, or a cached hub id, for the CLIP score.")] = None,
    lpips: Annotated[Path | None, typer.Option(help="torchvision's AlexNet file, for LPIPS to the teacher.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="CLIP-shaped preference model, such as PickScore: folder or cached hub id.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise, the same for all.")] = 2026,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images drawn at once; numbers depend on it by rounding alone.")
    ] = 16,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Page that compares several runs; one run's page is RUN/report.html.  [default: comparison.html]"
        ),
    ] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> list[Any]:
    """Measure runs: steps x guidance beside the teacher, on prompts that no training saw, and a page of it."""
    runs, numbers = [_named(run) for run in runs], _numbers("--steps", ",".join(steps or ["1,2,4,8"]), whole=True)
    scales = () if guidance_scale is None else _numbers("--guidance-scale", ",".join(guidance_scale))
    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("a run is named twice; name each once")
    page = _page(runs, output)

    from lcmdistill.evaluation.evaluate import evaluate
    from lcmdistill.evaluation.options import EvaluationOptions
    from lcmdistill.evaluation.results import read_results
    from lcmdistill.hub.model_card import update_run_card
    from lcmdistill.report.card import write_card_plots
    from lcmdistill.report.comparison import write_comparison
    from lcmdistill.report.page import evaluation_summary, write_report

    wish = EvaluationOptions(
        steps=tuple(int(n) for n in numbers),
        guidance_scales=scales,
        prompts=prompts,
        num_images=num_images,
        seed=seed,
        batch_size=batch_size,
        device=device,
        real=real,
        features=features,
        inception=inception,
        clip=clip,
        lpips=lpips,
        scorer=scorer,
    )
    evaluate(runs, wish)
    for run in runs:
        written = write_report(run)
        write_card_plots(run)
        update_run_card(run)
        logger.info(evaluation_summary(run))
        logger.info(f"look at {written}")
    if page:
        logger.info(f"side by side: {write_comparison(runs, page)}")
    return [read_results(run) for run in runs]


def report(
    run: Annotated[Path, typer.Argument(help="A run's folder, finished or not.")],
    debug: Debug = False,
) -> Path:
    """Make RUN/report.html anew: training, validation and what an evaluation found, on one page; and the card's plots."""
    from lcmdistill.hub.model_card import update_run_card
    from lcmdistill.report.card import write_card_plots
    from lcmdistill.report.page import write_report

    run = _named(run)
    page, has_plots = write_report(run), bool(write_card_plots(run))
    card = f", and the plots in {run / 'README.md'}" if has_plots and update_run_card(run) else ""
    logger.info(f"look at {page}{card}")
    return page


def _named(run: Path) -> Path:
    """A run's folder by a path that ends in its name, which "." does not."""
    return run.resolve() if run.name in ("", "..") else run


def _page(runs: list[Path], output: Path | None) -> Path | None:
    """Where the page of several runs goes, None of one. Raises UsageError, before anything is drawn, if it cannot."""
    if len(runs) == 1:
        if output is not None:
            raise UsageError(f"--output is for several runs; the page of one is {runs[0] / 'report.html'}")
        return None
    from lcmdistill.utils.run_dir import check_writable

    page = output or Path("comparison.html")
    if page.is_dir():
        raise UsageError(f"--output {page} is a folder; name a file, such as {page / 'comparison.html'}")
    check_writable(page.absolute().parent if page.is_file() else page)
    return page


def _numbers(option: str, text: str, *, whole: bool = False) -> tuple[float, ...]:
    """The numbers of an option, each once. Raises UsageError for what is none, or out of range."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        values = [int(word) if whole else float(word) for word in words]
    except ValueError as error:
        example = "1,2,4,8" if whole else "4,7.5"
        raise UsageError(f"{option} is {text!r}; it must be numbers with commas, such as {example}") from error
    if not values or not all(1 <= value <= 1000 for value in values):
        raise UsageError(f"{option} is {text!r}; each number must be from 1 to 1000")
    return tuple(dict.fromkeys(values))
