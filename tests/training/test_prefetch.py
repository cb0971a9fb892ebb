"""What makes a step cheap does not change its result: work ahead, data read ahead, recomputation, adapters next to targets."""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from lcmdistill.data.loader import read_ahead
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.training import prefetch
from lcmdistill.training.prefetch import InOrder, Prefetcher
from lcmdistill.training.trainer import Trainer
from tests.support.speed import Settings, built


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def stepped(run: Trainer, steps: int = 2) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of a run's next steps, and what is trained after them."""
    losses = [float(loss) for loss, _ in itertools.islice(run.steps(), steps)]
    return losses, list(run.train_step.student.trainable.values())


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    "own",
    [
        # Some of whose pairs end at the first time, where the target is what the teacher's step led to.
        {"objective__skip": 500, "objective__guidance": "free", "optim__batch_size": 3},
        {"objective__name": "tcd", "objective__skip": 500, "objective__solver": "heun"},
        {"objective__name": "cd", "objective__scales": 3},
        {"data__teacher_cache_samples": 2, "optim__batch_size": 3},
        {"objective__name": "ct", "student__target": "live"},
        {"run__gradient_checkpointing": True},
        {"run__precision": "bf16", "optim__batch_size": 4},
    ],
    ids=str,
)
def test_work_ahead_gives_what_work_in_order_gives(own: Settings, speed_settings: Settings) -> None:
    if own.get("objective__name") in ("cd", "ct"):
        speed_settings = {key: value for key, value in speed_settings.items() if "w_m" not in key}
    own = {"optim__batch_size": 8, "optim__gradient_accumulation_steps": 2, **own}
    own |= {"optim__learning_rate": 1e-6}  # at which what rounding leaves does not grow
    run, again, whole = (built(speed_settings, **own) for _ in range(3))
    assert isinstance(run.order, Prefetcher)
    whole.order = InOrder()
    (losses, weights), (others, their), (plain, _) = map(stepped, (run, again, whole))
    assert losses == others
    assert all(map(torch.equal, weights, their))
    near = 1e-5 if run.config.run.precision == "fp32" else 5e-3
    assert losses == pytest.approx(plain, rel=near)
    torch.testing.assert_close(run.unlogged.by_noise, whole.unlogged.by_noise, rtol=near, atol=near / 10)
    steps: list[Any] = [run.train_step, whole.train_step]
    means, its = ([state["exp_avg"] for state in step.optimizer.state.values()] for step in steps)
    largest = max(float(value.abs().max()) for value in its)
    torch.testing.assert_close(means, its, rtol=0, atol=10 * near * largest)


@pytest.mark.usefixtures("two_cores")
def test_work_that_threads_would_share_stays_in_order(
    speed_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter is switched on and off in one network; a large network needs no threads of its own."""
    assert isinstance(built(speed_settings).order, Prefetcher)
    assert not isinstance(built(speed_settings, student__kind="lora").order, Prefetcher)
    monkeypatch.setattr(prefetch, "SMALL", 1000)
    assert not isinstance(built(speed_settings).order, Prefetcher)


@pytest.mark.usefixtures("two_cores")
def test_an_error_of_work_ahead_ends_the_step(speed_settings: Settings) -> None:
    run = built(speed_settings)

    def broken(*_: Any) -> Any:
        raise RuntimeError("the teacher is out of order")

    step: Any = run.train_step
    step.teacher = replace(step.teacher, network=broken)
    with pytest.raises(RuntimeError, match="out of order"):
        stepped(run)


@pytest.mark.parametrize(
    ("name", "target"),
    # cd, ict and ect are steps of the same kinds as lcm and ct.
    [*((name, "ema") for name in OBJECTIVES if name not in ("lcf", "cd", "ict", "ect")), ("lcm", "live")],
)
def test_an_adapter_next_to_its_target_learns_recomputed_or_not(
    name: str, target: str, speed_settings: Settings
) -> None:
    """Whichever adapter was switched on last is the one that a network has gradients for, and that a recomputation meets."""
    if name == "ct":
        speed_settings = {key: value for key, value in speed_settings.items() if "w_m" not in key}
    found = []
    for again in (False, True):
        own = {"student__kind": "lora", "student__target": target, "run__gradient_checkpointing": again}
        run = built(speed_settings, objective__name=name, student__dropout=0.1 * (target == "live"), **own)
        steps = itertools.islice(run.steps(), 2)
        found.append([float(value) for loss, norm in steps for value in (loss, norm)])
        assert min(found[-1]) > 0
    assert found[0] == pytest.approx(found[1], rel=1e-4)


class Recorded:
    """A data set that notes what is read, when, and by whom."""

    def __init__(self) -> None:
        self.read_by: list[tuple[list[int], str]] = []

    def read(self, indices: Sequence[int]) -> Any:
        if 13 in indices:
            raise OSError("the disk is gone")
        self.read_by.append((list(indices), threading.current_thread().name))
        return list(indices)


def test_one_micro_batch_is_read_ahead_by_a_thread() -> None:
    dataset: Any = Recorded()
    reads = read_ahead(partial(dataset.read, [i]) for i in range(5))
    assert next(reads) == [0]  # pyright: ignore[reportUnnecessaryComparison]
    assert next(reads) == [1]  # pyright: ignore[reportUnnecessaryComparison]
    assert list(reads) == [[2], [3], [4]]
    assert [indices for indices, _ in dataset.read_by] == [[0], [1], [2], [3], [4]]
    assert {name for _, name in dataset.read_by}.isdisjoint({threading.current_thread().name})
    lazily = read_ahead(partial(dataset.read, [i]) for i in range(100))
    next(lazily)
    assert len(dataset.read_by) <= 5 + 2


def test_an_error_of_the_thread_is_raised_where_its_data_are_used() -> None:
    dataset: Any = Recorded()
    reads = read_ahead(partial(dataset.read, [i]) for i in (1, 13, 2))
    next(reads)
    with pytest.raises(OSError, match="disk"):
        next(reads)
