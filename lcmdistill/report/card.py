"""The part of a run's model card that tells what was measured, with its plots."""

import re
from pathlib import Path

from lcmdistill.evaluation.results import Results, read_results
from lcmdistill.evaluation.verdict import verdict
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.report.charts import write_png
from lcmdistill.report.curves import consistency_charts, quality_charts, training_charts
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.metrics_log import read_metrics

_SECTION = re.compile(r"\n## Measured\n.*?(?=\n## Use\n)", re.DOTALL)


def add_to_card(run: Path) -> bool:
    """Draw the plots of an evaluated run and put them into its README.md; False if it has no card of ours, or no numbers of
    what it is now."""
    results, path = read_results(run), run / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    if results is None or not results.is_current(require_run_config(run)) or "\n## Use\n" not in card:
        return False
    plots = {"quality": [*quality_charts(results), *consistency_charts(results)]}
    plots["training"] = training_charts(read_metrics(run))
    drawn = [name for name, charts in plots.items() if charts]
    for name in drawn:
        write_png(plots[name], run / "samples" / f"{name}.png")
    before, found, after = _SECTION.sub("", card).partition("\n## Use\n")
    write_text(path, f"{before}\n## Measured\n\n{measured(results, drawn)}{found}{after}")
    return True


def measured(results: Results, plots: list[str]) -> str:
    """Markdown: the verdict, a table of the student's numbers, and the plots."""
    judged, measures = verdict(results), results.metrics
    rows = ["| steps | " + " | ".join(about["label"] for about in measures.values()) + " |"]
    rows.append("|---" * (len(measures) + 1) + "|")
    for n in results.steps:
        numbers = [results.number(name, "student", n) for name in measures]
        rows.append(f"| {n} | " + " | ".join("" if value is None else f"{value:g}" for value in numbers) + " |")
    titles = {"quality": "Measures against steps, beside the teacher", "training": "The training"}
    pictures = [f"![{titles[name]}](samples/{name}.png)" for name in plots]
    whence = [f"{about['label']}: {about['measured_on']}, {about['published']}" for about in measures.values()]
    about = f"{results.info['images']} images a row, guidance scale {results.guidance_scale:g}. {'; '.join(whence)}."
    reasons = "\n".join(f"- {reason}" for reason in judged.reasons)
    return "\n\n".join([judged.headline, reasons, "\n".join(rows), about, *pictures]) + "\n"
