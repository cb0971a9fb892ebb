"""The plots of a run's model card."""

from pathlib import Path

from lcmdistill.evaluation.results import read_results
from lcmdistill.report.charts import write_png
from lcmdistill.report.curves import consistency_charts, quality_charts, training_charts
from lcmdistill.utils.metrics_log import read_metrics


def write_card_plots(run: Path) -> list[Path]:
    """Write quality.png and training.png of an evaluated run into its samples folder; return the written files."""
    results = read_results(run)
    if results is None:
        return []
    plots = {"quality": [*quality_charts(results), *consistency_charts(results)]}
    plots["training"] = training_charts(read_metrics(run))
    return [write_png(charts, run / "samples" / f"{name}.png") for name, charts in plots.items() if charts]
