"""Sharded training of two processes, in brief; tests/slow/test_sharding.py has all methods."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from lcmdistill.config.schema import RunConfig
from lcmdistill.training import distributed
from lcmdistill.training.memory.plan import choose_plan
from lcmdistill.training.sharding import check_sharding
from lcmdistill.utils.checkpoint import load_checkpoint
from lcmdistill.utils.errors import RunError, UsageError, explain
from lcmdistill.utils.run_dir import checkpoints
from lcmdistill.utils.sharded_checkpoint import read_whole
from tests.support.processes import bytes_of, held_bytes, launch
from tests.support.runs import resolve
from tests.support.training import Runner, losses


def test_two_processes_with_shards_equal_one(train_run: Runner, tmp_path: Path) -> None:
    """Losses, checkpoint, validation and product; each process holds half of the bytes; one process resumes the run."""
    options = {"optim__batch_size": 1, "optim__gradient_accumulation_steps": 4, "run__validate_every": 3}
    options |= {"run__validation_prompts": ("red heart",), "optim__max_train_steps": 3, "run__best_metric": "rmse_1"}
    one = train_run("one", **options)
    launch(2, one / "config.toml", tmp_path / "two", "--gradient-accumulation-steps", "2", "--shard", "full")
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)
    last = checkpoints(tmp_path / "two" / "checkpoints")[-1]
    groups, state = load_checkpoint(last)
    expected, expected_state = load_checkpoint(checkpoints(one / "checkpoints")[-1])
    assert groups.keys() == expected.keys()
    for group, tensors in expected.items():
        assert groups[group].keys() == tensors.keys()
        worst = max(float((groups[group][name] - value).abs().max()) for name, value in tensors.items())
        assert worst < 1e-3, group
    assert state.keys() == expected_state.keys()
    whole = bytes_of(expected)
    for rank in (0, 1):
        for group, size in held_bytes(tmp_path / "two", rank).items():
            assert size == pytest.approx(whole[group] / 2, rel=0.1), group
    for name in ("samples/step-000003.png", "pipeline/unet/diffusion_pytorch_model.safetensors", "checkpoints/best"):
        assert (tmp_path / "two" / name).exists() == (one / name).exists(), name
    resumed = {"optim__max_train_steps": 4, "run__validate_every": 0}
    assert losses(train_run("two", **options | resumed)) == pytest.approx(
        losses(train_run("one", **options | resumed)), rel=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student.offload_target": True}, "keeps the EMA whole"),
        ({"data.teacher_cache_samples": 1}, "set it to 0"),
        ({"run.compile": "on"}, "--compile auto or off"),
        ({"run.precision": "fp16"}, "--precision bf16 or fp32"),
        ({"optim.optimizer": "adamw8bit"}, "use adamw"),
    ],
)
def test_settings_that_need_whole_weights_are_refused(changes: dict[str, object], words: str) -> None:
    device = torch.device("cpu")
    check_sharding(resolve({}, changes), device)
    with pytest.raises(UsageError, match=words):
        check_sharding(resolve({}, {**changes, "run.shard": "full"}), device)


def test_shards_come_after_all_that_one_device_can_do() -> None:
    from lcmdistill.training.memory.estimate import Breakdown

    def needed(config: RunConfig) -> Breakdown:
        share = 8 if config.run.shard == "full" else 1
        saved = 300 * config.run.gradient_checkpointing + 200 * config.student.offload_target
        return Breakdown(0, 0, 0, 800 // share, 0, 0, 0, 1000 - saved, shards=share)

    config = resolve({}, {"optim.batch_size": 1, "optim.gradient_accumulation_steps": 1})
    alone = choose_plan(config, needed, 1400, allow_8bit=True, allow_shards=True)
    assert (alone.config.run.shard, alone.config.student.offload_target) == ("auto", True)
    shared = choose_plan(config, needed, 900, allow_8bit=True, allow_shards=True)
    assert (shared.config.run.shard, shared.config.student.offload_target) == ("full", False)
    assert shared.config.optim.optimizer == "adamw"
    assert any("divided over the processes" in change for change in shared.changes)
    assert not choose_plan(config, needed, 900, allow_8bit=False).fits


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_accelerate_s_own_sharding_is_refused_with_ours(monkeypatch: pytest.MonkeyPatch, kind: DistributedType) -> None:
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: SimpleNamespace(distributed_type=kind))
    with pytest.raises(UsageError, match=rf"requests {kind.value}, .*pass --shard full"):
        distributed.make_accelerator(resolve({}, {"run.device": "cpu"}))


def test_processes_that_find_different_checkpoints_do_not_train() -> None:
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), gather=lambda value: torch.cat([value, value]))
    distributed.check_same_step(4, accelerator)
    accelerator.gather = lambda value: torch.cat([value, torch.zeros_like(value)])  # no checkpoint on its machine
    with pytest.raises(RunError, match=r"\(steps 4, 0\), .* output folder that all machines share"):
        distributed.check_same_step(4, accelerator)


def test_a_lost_process_is_one_sentence() -> None:
    error = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")
    sentence, code = explain(error)
    assert sentence.startswith("another process of this run ended")
    assert code == 1


def test_a_description_that_names_other_code_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(os.system))
    with pytest.raises(pickle.UnpicklingError, match="refers to posix"):
        read_whole(tmp_path)
