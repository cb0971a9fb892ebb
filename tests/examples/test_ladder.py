"""The verdict on students of known quality, from the recorded numbers of examples/ladder."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lcmdistill.evaluation.results import Results
from lcmdistill.evaluation.verdict import verdict

LADDER = Path(__file__).parent.parent.parent / "examples" / "ladder"

RECORDED: dict[str, Any] = json.loads((LADDER / "ladder.json").read_text(encoding="utf-8"))

TRAINED = [name for name in RECORDED if name == "untrained" or name.endswith(" steps")]

BROKEN = {"noise": "oversaturated", "collapsed": "too similar to each other"}
"what the headline states of damaged students"


def results(name: str) -> Results:
    return Results(Path(), **RECORDED[name])


def test_longer_training_is_measured_as_better():
    """By how far the images of one step are from the teacher's as a set, and by their sharpness at four."""
    assert len(TRAINED) >= 4
    kid = [results(name).number("kid_teacher", "student", 1) or 0.0 for name in TRAINED]
    error = 0.011
    assert all(after <= before + error for before, after in pairwise(kid))
    assert kid[-1] < kid[0]
    sharpness = [results(name).number("sharpness", "student", 4) or 0.0 for name in TRAINED]
    assert all(after > before for before, after in pairwise(sharpness[:4]))


@pytest.mark.parametrize("name", TRAINED)
def test_a_single_step_is_never_called_enough(name: str):
    judged = verdict(results(name))
    assert judged.grades[1] in ("worse", "unusable")
    assert judged.enough == 4


def test_barely_trained_students_are_called_blurry():
    flawed = {name: "but images are blurry" in verdict(results(name)).headline for name in TRAINED}
    assert flawed["untrained"]
    assert not any(flaw for name, flaw in flawed.items() if name.endswith("00 steps"))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_students_are_not_usable(name: str):
    judged = verdict(results(name))
    assert not judged.usable
    assert BROKEN[name] in judged.headline
    assert judged.headline.startswith("Not usable yet")
