"""The comparison of runs: the settings that differ, and the order by a metric."""

from pathlib import Path
from typing import Any

import pytest

from lcmdistill.evaluation.results import Results
from lcmdistill.evaluation.verdict import Verdict
from lcmdistill.report.ranking import differing_settings, rank, short_settings
from lcmdistill.utils.errors import UsageError
from tests.support.runs import resolve


def evaluated(**numbers: float) -> Results:
    """Return results of a student at 2 and 4 steps; metric_steps=number."""
    better = {"ssim": "higher", "kid_teacher": "lower", "sharpness": "one"}
    points: dict[str, Any] = {f"student-{n:02d}-g4": {"numbers": {}} for n in (2, 4)}
    for key, value in numbers.items():
        metric, _, steps = key.rpartition("_")
        points[f"student-0{steps}-g4"]["numbers"][metric] = value
    metrics = {key.rpartition("_")[0]: None for key in numbers}
    info = {
        "steps": [2, 4],
        "guidance_scales": [4.0],
        "metrics": {m: {"label": m.upper(), "better": better[m]} for m in metrics},
    }
    return Results(Path(), info, points)


def judged(usable: bool = True) -> Verdict:
    return Verdict({}, 4 if usable else None, usable, "", ())


def test_runs_are_ranked_by_a_metric():
    results = [
        evaluated(ssim_2=0.5, ssim_4=0.6, sharpness_4=0.5),
        evaluated(ssim_2=0.7, ssim_4=0.4, sharpness_4=1.1),
        evaluated(ssim_2=0.6, ssim_4=0.9, sharpness_4=1.4),
    ]
    verdicts = [judged()] * 3
    assert rank(results, verdicts).order == (2, 0, 1)
    assert rank(results, verdicts).text == "SSIM at 4 steps"
    assert rank(results, verdicts, "ssim@2").order == (1, 2, 0)
    assert rank(results, verdicts, "sharpness").order == (1, 2, 0)  # by the distance from the teacher's
    # What is not usable comes after what is, and what has no number comes last.
    assert rank(results, [judged(), judged(), judged(False)]).order == (0, 1, 2)
    assert rank([evaluated(ssim_2=0.5), *results[1:]], verdicts).order == (2, 1, 0)


def test_lower_is_better_for_kid_which_ranks_by_default():
    results = [evaluated(ssim_4=0.9, kid_teacher_4=0.3), evaluated(ssim_4=0.1, kid_teacher_4=0.1)]
    assert (rank(results, [judged()] * 2).metric, rank(results, [judged()] * 2).order) == ("kid_teacher", (1, 0))


@pytest.mark.parametrize(
    ("rank_by", "message"),
    [("fid", "the runs have the metrics ssim; choose one"), ("ssim@8", "the runs were evaluated at 2, 4 steps")],
)
def test_an_unknown_ranking_is_refused(rank_by: str, message: str):
    with pytest.raises(UsageError, match=message):
        rank([evaluated(ssim_4=0.5)] * 2, [judged()] * 2, rank_by)


def test_the_settings_that_differ_are_listed():
    def config(name: str, **values: Any) -> Any:
        settings = {"objective.name": name, "run.output": f"runs/{name}", **values}
        return resolve({}, {"teacher.model": "tiny", **settings})

    rows = differing_settings(
        [
            config("lcm", **{"objective.skip": 5}),
            config("lcm", **{"objective.skip": 20}),
            config("tcd", **{"optim.learning_rate": 3e-4}),
        ]
    )
    found = dict(rows)
    assert rows[0] == ("objective.name", ["lcm", "lcm", "tcd"])
    assert found["objective.skip"][:2] == ["5", "20"]
    assert found["optim.learning_rate"][2] == "0.0003"
    assert not {"run.output", "run.seed", "teacher.model"} & set(found)
    assert short_settings(rows)[:2] == ["objective", "skip"]
    assert short_settings([("a.x", []), ("b.x", [])]) == ["a.x", "b.x"]
    assert differing_settings([config("lcm"), config("lcm")]) == []
