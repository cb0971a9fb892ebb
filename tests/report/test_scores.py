"""What the console, the page, the downloads and the card state next to the numbers of a scorer."""

import json
from pathlib import Path

from lcmdistill.evaluation.results import RECORDED, Results
from lcmdistill.evaluation.scorers.registry import SCORERS
from lcmdistill.report.downloads import numbers_json
from lcmdistill.report.page import _templates, metric_rows, score_lines

LIMITS = SCORERS["pickscore"].limits


def scored() -> Results:
    cells = {
        f"{sampler}-{steps:02d}-g4": {"numbers": {"pickscore": value, "ssim": 0.5}, "standard_errors": errors}
        for sampler, steps, value, errors in (
            ("student", 2, 20.1, {}),
            ("student", 4, 21.3, {"pickscore": 0.12}),
            ("teacher", 50, 21.6, {}),
        )
    }
    rows = dict.fromkeys(RECORDED, "") | {"better": "higher"}
    metrics = {"pickscore": rows | {"label": "PickScore", "limits": LIMITS}, "ssim": rows | {"label": "SSIM"}}
    info = {"steps": [2, 4], "guidance_scales": [4.0], "metrics": metrics, "images": 64}
    return Results(Path(), info, cells)


def test_the_limits_of_a_scorer_stand_next_to_its_number():
    results = scored()
    assert score_lines(results, 4) == [f"PickScore at 4 steps: 21.3 ± 0.12, and the teacher at 50 steps 21.6. {LIMITS}"]
    assert score_lines(results, 2)[0].startswith("PickScore at 2 steps: 20.1, and")
    assert score_lines(results, 8) == []
    assert metric_rows(results)[0]["limits"] == LIMITS
    assert json.loads(numbers_json({"run": results}))["run"]["sweep"]["metrics"]["pickscore"]["limits"] == LIMITS


def test_the_page_shows_the_limits():
    template = _templates().from_string('{% from "macros.html" import metrics %}{{ metrics(rows) }}')
    assert LIMITS.replace("'", "&#39;") in template.render(rows=metric_rows(scored()))
