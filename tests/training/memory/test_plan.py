"""The plan for `--memory`, and its effect on a run."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lcmdistill.config.schema import OptimConfig, RunConfig
from lcmdistill.config.toml import flatten, read_toml
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.checkpoint import optimizer_tensors, restore_optimizer
from lcmdistill.training.memory import plan
from lcmdistill.training.memory.estimate import Breakdown, optimizer_bytes, step_memory, usable
from lcmdistill.training.memory.plan import MemoryCheck, Plan, candidates, choose_plan, estimator, plan_memory
from lcmdistill.training.optimizer import check_optimizer, make_optimizer
from lcmdistill.utils.checkpoint import load_checkpoint
from lcmdistill.utils.device import GIB
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import checkpoints
from tests.support.memory import TIGHT, PlannedRunner, configured
from tests.support.runs import resolve
from tests.support.teachers import SMALL, Command
from tests.support.training import assert_same, losses

CPU = torch.device("cpu")


def by_formula(config: RunConfig) -> Breakdown:
    """Stand in for `step_memory`, for a network of 1 GiB in half precision."""
    half = GIB // 2
    activations = config.optim.batch_size * (GIB if config.run.gradient_checkpointing else 4 * GIB)
    sizes = {"frozen": GIB, "student": 2 * GIB, "gradients": 2 * GIB, "activations": activations}
    target = GIB if config.student.offload_target else 2 * GIB
    return Breakdown(
        base=half, trainable=half, target=target, optimizer=optimizer_bytes(config.optim.optimizer, half), **sizes
    )


def whole(config: RunConfig) -> int:
    return config.optim.batch_size * config.optim.gradient_accumulation_steps


# By default 27 GiB: 11 of weights, gradients and moments, and 16 of activations.
@pytest.mark.parametrize(
    ("room", "allow_8bit", "expected"),
    [
        (30, True, {}),
        (24, True, {"optim.batch_size": 3, "optim.gradient_accumulation_steps": 4}),
        (16, True, {"run.gradient_checkpointing": True}),
        (13, True, {"run.gradient_checkpointing": True, "optim.batch_size": 2, "optim.gradient_accumulation_steps": 6}),
        (
            12,
            True,
            {"run.gradient_checkpointing": True, "optim.batch_size": 1, "optim.gradient_accumulation_steps": 12},
        ),
        (
            11,
            True,
            {
                "run.gradient_checkpointing": True,
                "student.offload_target": True,
                "optim.batch_size": 1,
                "optim.gradient_accumulation_steps": 12,
            },
        ),
        (
            9.1,
            True,
            {"run.gradient_checkpointing": True, "optim.optimizer": "adamw8bit"}
            | {"optim.batch_size": 1, "optim.gradient_accumulation_steps": 12},
        ),
    ],
)
def test_the_cheapest_settings_that_fit_are_chosen(room: float, allow_8bit: bool, expected: dict[str, Any]) -> None:
    config = resolve({}, {})
    picked = choose_plan(config, by_formula, room * GIB, allow_8bit=allow_8bit)
    changed = {k: v for k, v in flatten(picked.config).items() if v != flatten(config)[k]}
    assert changed == expected
    assert picked.fits
    assert picked.needed == by_formula(picked.config)
    assert whole(picked.config) == whole(config)
    assert len(picked.changes) == len(expected) - ("optim.gradient_accumulation_steps" in expected)
    assert all(": " in change for change in picked.changes)


@pytest.mark.parametrize("room", [8, 12, 16, 24])
def test_a_plan_stays_under_its_limit_or_reports_the_minimum(room: float) -> None:
    picked = choose_plan(resolve({}, {}), by_formula, room * GIB, allow_8bit=False)
    assert picked.fits == (picked.needed.total <= room * GIB) == (room > 8)
    assert picked.needed.total == pytest.approx(11 * GIB) or room > 8


def test_measures_in_use_are_not_candidates() -> None:
    asked = {"run.gradient_checkpointing": True, "student.target": "live", "optim.batch_size": 1}
    assert list(candidates(resolve({}, asked), allow_8bit=False)) == [{}]
    lora = resolve({}, {"student.kind": "lora", "student.target": "ema", "optim.batch_size": 1})
    assert list(candidates(lora, allow_8bit=False)) == [{}, {"run.gradient_checkpointing": True}]


def test_room_is_left_for_more_than_tensors() -> None:
    assert usable(12 * GIB, whole_gpu=True) < usable(12 * GIB, whole_gpu=False) < 12 * GIB


@pytest.mark.slow
def test_the_estimator_counts_few_steps_and_is_never_below_them(
    small_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, asked = load_teacher(str(small_teacher)), configured(small_teacher, optim__gradient_accumulation_steps=2)
    calls = []

    def counted(*args: Any, **options: Any) -> Breakdown:
        calls.append(args)
        return step_memory(*args, **options)

    monkeypatch.setattr(plan, "step_memory", counted)
    needed = estimator(asked, teacher, torch.bfloat16, 1)
    for values in candidates(asked, allow_8bit=False):  # eight bits change the optimiser's bytes alone, by a formula
        config = plan.with_values(asked, values)
        assert needed(config).total >= 0.999 * step_memory(config, teacher, torch.bfloat16).total
    assert len(calls) <= 4


def test_auto_plans_for_the_free_memory_of_a_gpu_and_not_on_a_cpu(
    small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, gpu = load_teacher(str(small_teacher)), torch.device("cuda")
    config = configured(small_teacher, run__output=str(tmp_path / "run"), run__precision="bf16")
    assert plan_memory(config, teacher, CPU, free=1.0) is None
    assert plan_memory(replace(config, run=replace(config.run, memory="off")), teacher, gpu, free=1.0) is None
    asked = step_memory(config, teacher, torch.bfloat16).total
    ample, scarce = (plan_memory(config, teacher, gpu, free=free) for free in (1.2 * asked, 0.7 * asked))
    assert ample is not None
    assert (ample.config, ample.fits) == (config, True)
    assert scarce is not None
    assert scarce.fits
    assert scarce.changes
    none = plan_memory(config, teacher, gpu, free=1.0)
    assert none is not None
    assert not none.fits


def test_a_planned_run_reports_its_plan_learns_the_same_and_resumes_bit_for_bit(
    planned_run: PlannedRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    # A sum taken in other parts is rounded otherwise, which AdamW makes grow, on some processors to 1.2e-4 at its usual rate.
    rate = {"optim__learning_rate": 3e-4}
    free, capped = planned_run("free", run__memory="off", **rate), planned_run("capped", **rate)
    output = capsys.readouterr().out
    assert "memory, estimated: 0.01 GiB at the peak of a step (" in output
    settings = read_toml(capped / "config.toml")
    assert settings["optim.batch_size"] * settings["optim.gradient_accumulation_steps"] == 4
    assert settings["optim.batch_size"] < 4
    assert "  optim.batch_size = " in output
    assert losses(capped) == pytest.approx(losses(free), rel=1e-4)
    planned_run("parts", **rate, optim__max_train_steps=2)
    assert_same(capped, planned_run("parts", **rate))


@pytest.mark.slow
def test_a_run_can_resume_with_another_plan(planned_run: PlannedRunner) -> None:
    folder = planned_run(optim__max_train_steps=2)
    first = read_toml(folder / "config.toml")
    planned_run(run__memory="off")
    second = read_toml(folder / "config.toml")
    assert (first["optim.batch_size"], second["optim.batch_size"]) == (first["optim.batch_size"], 4)
    assert checkpoints(folder / "checkpoints")[-1].name == "step-00000004"


@pytest.mark.slow
def test_another_global_batch_is_refused(planned_run: PlannedRunner) -> None:
    planned_run(optim__max_train_steps=2)
    with pytest.raises(UsageError, match=r"contains a run with optim\.batch_size"):
        planned_run(optim__batch_size=8)


def test_a_run_that_does_not_fit_is_refused_in_one_sentence(planned_run: PlannedRunner, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--memory 0\.6 leaves 0\.00 GiB .* this run needs at least .*adapter"):
        planned_run(run__memory="0.6")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_plan_and_the_planned_settings(
    command: Command, small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    sets = [f"--set={key}={value}" for key, value in {**SMALL, "data.resolution": 32}.items()]
    options = ["distill", "--teacher", small_teacher, "--data", image_folder, *sets, "--output", "out"]
    code, output, error = command(*options, "--memory", TIGHT, "--dry-run", "--full")
    assert (code, error) == (0, "")
    assert "leaves 0.01 GiB for tensors" in output
    assert "batch_size = 4\n" not in output
    assert not (tmp_path / "out").exists()


def test_an_offloaded_target_is_the_same_target(planned_run: PlannedRunner) -> None:
    here = planned_run("here", run__memory="off")
    away = planned_run("away", run__memory="off", student__offload_target=True)
    assert_same(here, away)


@pytest.mark.slow
def test_an_offloaded_target_resumes_bit_for_bit(planned_run: PlannedRunner) -> None:
    own = {"run__memory": "off", "run__precision": "bf16"}
    whole_run = planned_run("whole", **own, student__offload_target=True)
    planned_run("parts", **own, student__offload_target=True, optim__max_train_steps=2)
    assert_same(whole_run, planned_run("parts", **own, student__offload_target=True))
    planned_run("moved", **own, optim__max_train_steps=2)
    moved = planned_run("moved", **own, student__offload_target=True)
    assert losses(moved) == pytest.approx(losses(whole_run), rel=0.1)  # its first steps had a target in fp32


def test_the_export_is_the_average_in_full_precision(planned_run: PlannedRunner) -> None:
    folder = planned_run(run__memory="off", run__precision="bf16", student__offload_target=True)
    average = load_checkpoint(checkpoints(folder / "checkpoints")[-1])[0]["target"]
    drawn = load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {k: v.dtype for k, v in drawn.items()} == dict.fromkeys(average, torch.float32)
    assert all(torch.equal(drawn[name], value) for name, value in average.items())


def test_8bit_moments_are_refused_where_unsupported(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    eight = OptimConfig(optimizer="adamw8bit")
    code, output, error = command(
        "distill", "--teacher", "tiny", "--set", "optim.optimizer=adamw8bit", "--device", "cpu"
    )
    assert (code, output) == (2, "")
    assert error.startswith("Error: optim.optimizer adamw8bit runs on CUDA only, and the device is cpu; use adamw")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"adamw8bit needs: pip install 'lcmdistill\[8bit\]'"):
        check_optimizer(eight, torch.device("cuda"))
    check_optimizer(OptimConfig(), torch.device("cuda"))


def test_bitsandbytes_state_is_saved_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step is a plain number, which a file of tensors does not hold."""

    class AdamW8bit(torch.optim.Optimizer):
        def __init__(self, parameters: Any, **options: Any) -> None:
            super().__init__(parameters, options)

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state.update(step=0, state1=torch.zeros(3, dtype=torch.uint8), absmax1=torch.zeros(1))
                    state["step"] += 1
                    state["state1"] += 1

        def load_state_dict(self, state_dict: Any) -> None:  # bitsandbytes' own leaves its bytes what they are
            self.state[self.param_groups[0]["params"][0]] = dict(state_dict["state"][0])

    library, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = AdamW8bit  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    config, weight = OptimConfig(optimizer="adamw8bit", learning_rate=0.5), nn.Parameter(torch.zeros(3))
    one, other = (make_optimizer(config, [weight], torch.device("cuda")) for _ in range(2))
    assert (type(one), one.defaults["lr"]) == (AdamW8bit, 0.5)
    for _ in range(3):
        one.step()
    saved = optimizer_tensors(one)
    assert all(isinstance(value, Tensor) for value in saved.values())
    restore_optimizer(other, saved)
    state = other.state[weight]
    assert (state["step"], type(state["step"])) == (3, int)
    assert (state["state1"].tolist(), state["state1"].dtype) == ([3, 3, 3], torch.uint8)


def test_on_a_gpu_estimate_and_peak_are_logged_after_the_second_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "peak_memory", lambda device, reset=False: None if reset else 4 * GIB)
    needed = by_formula(resolve({}, {"optim.batch_size": 1}))  # 15 GiB
    check = MemoryCheck(needed, torch.device("cuda"))
    check.after_step()
    assert capsys.readouterr().out == ""
    check.after_step()
    check.after_step()
    assert capsys.readouterr().out == "memory: 4.00 GiB at the peak of a step (estimated 15.00 GiB, +275%)\n"
    MemoryCheck(None, CPU).after_step()
    assert Plan(resolve({}, {}), (), needed).fits
    assert json.dumps(str(needed)).count("activations") == 1
