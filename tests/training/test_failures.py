"""Training runs that fail, that are refused, or that span several processes."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lcmdistill.diffusion.random import Rng
from lcmdistill.training.distributed import StopSignal
from lcmdistill.training.signals import Stop
from lcmdistill.training.train_step import ConsistencyStep
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.run_dir import checkpoints
from tests.support.training import ROOT, Runner, assert_same, losses, metrics


def test_an_output_below_a_file_is_refused(train_run: Runner, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"p\.txt is a file; choose another place"):
        train_run("p.txt/x")


def test_a_loss_that_is_not_finite_ends_the_run(train_run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    forward_backward = ConsistencyStep.forward_backward
    monkeypatch.setattr(
        ConsistencyStep, "forward_backward", lambda *args, **options: forward_backward(*args, **options) * torch.nan
    )
    with pytest.raises(RunError) as caught:
        train_run()
    assert re.search(r"the loss is NaN or infinite \(step 1: loss nan.*no checkpoint was written", str(caught.value))


@pytest.mark.parametrize("log_every", [1, 100])
def test_the_last_good_checkpoint_is_kept(train_run: Runner, monkeypatch: pytest.MonkeyPatch, log_every: int) -> None:
    """Found at the next line of metrics, and if that is far, before anything broken is saved."""
    forward_backward = ConsistencyStep.forward_backward

    def explode(self: ConsistencyStep, batch: Any, state: Any, target: Any, rng: Rng, *, is_last: bool) -> Tensor:
        losses = forward_backward(self, batch, state, target, rng, is_last=is_last)
        if rng.step >= 3:
            for parameter in self.student.trainable.values():
                parameter.grad = torch.full_like(parameter, torch.inf)
        return losses * (torch.inf if rng.step >= 3 else 1)

    with monkeypatch.context() as patched:
        patched.setattr(ConsistencyStep, "forward_backward", explode)
        with pytest.raises(RunError, match="the last good checkpoint, step-00000002, is kept"):
            train_run(optim__max_train_steps=8, run__log_every=log_every)
    whole = train_run("whole", optim__max_train_steps=8, run__log_every=log_every)
    assert_same(train_run(optim__max_train_steps=8, run__log_every=log_every), whole)


def test_an_excessive_learning_rate_ends_the_run(train_run: Runner) -> None:
    with pytest.raises(RunError, match="lower --learning-rate"):
        train_run(optim__learning_rate=1e30, optim__max_train_steps=6)


def distill_with_two_processes(config: Path, output: Path) -> str:
    """Run a configuration with half of its accumulation in two processes, and return their output."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "lcmdistill", "distill", "--config", str(config), "--output", str(output)]
    ended = subprocess.run(
        [*command, "--gradient-accumulation-steps", "2"], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_two_processes_leave_a_finished_run_as_it_is(train_run: Runner, tmp_path: Path) -> None:
    one = train_run("one", optim__batch_size=2, optim__gradient_accumulation_steps=4)
    for _ in range(2):
        output = distill_with_two_processes(one / "config.toml", tmp_path / "two")
    assert "nothing to do" in output


def test_two_processes_equal_one_with_the_same_global_batch(train_run: Runner, tmp_path: Path) -> None:
    options = {"optim__batch_size": 2, "optim__gradient_accumulation_steps": 4, "optim__learning_rate": 1e-4}
    one = train_run("one", **options)
    distill_with_two_processes(one / "config.toml", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)
    for mine, its in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        assert [v or 0 for v in mine["loss_by_noise"]] == pytest.approx(
            [v or 0 for v in its["loss_by_noise"]], rel=1e-4
        )
    mine, its = (load_file(checkpoints(f / "checkpoints")[-1] / "student.safetensors") for f in (one, tmp_path / "two"))
    worst = max(float((mine[name] - its[name]).abs().max()) for name in mine)
    assert worst < 1e-4


def test_a_signal_to_any_process_stops_all() -> None:
    for theirs in (0, 15):
        accelerator: Any = Mock(num_processes=2, device=torch.device("cpu"))
        accelerator.gather = lambda mine, theirs=theirs: torch.cat([mine, torch.tensor([float(theirs)])])
        agreement = StopSignal(Stop(), accelerator)
        assert [agreement.signal() for _ in range(2)] == [0, theirs]  # of the step before
    accelerator.num_processes, stop = 1, Stop()
    stop.signal = 2
    assert StopSignal(stop, accelerator).signal() == 2
