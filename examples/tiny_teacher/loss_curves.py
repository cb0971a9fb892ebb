"""Record the loss of finished runs of the bundled teacher, which reports draw behind the loss of runs with the same settings.

python examples/tiny_teacher/loss_curves.py runs/tiny-lcm runs/tiny-tcd
"""

import json
import sys
from importlib.resources import files
from pathlib import Path

import lcmdistill
from lcmdistill.report.expected import FILE, relevant_settings
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.metrics_log import read_metrics

WINDOW = 3
"logged losses that are averaged"


def main() -> None:
    curves = []
    for run in map(Path, sys.argv[1:]):
        losses = [(line["step"], line["loss"]) for line in read_metrics(run) if "loss" in line]
        means = []
        for i, (step, _) in enumerate(losses):
            values = [loss for _, loss in losses[max(0, i - WINDOW + 1) : i + 1]]
            means.append([step, float(f"{sum(values) / len(values):.4g}")])
        curves.append({"settings": relevant_settings(lcmdistill.load_run(run)), "loss": means})
    write_text(Path(str(files("lcmdistill") / "assets" / FILE)), json.dumps({"curves": curves}, indent=None) + "\n")


if __name__ == "__main__":
    main()
