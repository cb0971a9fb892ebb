"""The step of distribution matching: what each update changes, accumulation, two adapters on one base, and resuming."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lcmdistill.training.best import collapse_warning
from lcmdistill.training.distribution_step import DistributionMatchingStep
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.metrics_log import METRICS
from lcmdistill.utils.run_dir import checkpoints
from tests.support.methods import MethodRunner
from tests.support.speed import Settings, built
from tests.support.training import assert_same, kill_run, losses, metrics

LORA = {"student__kind": "lora", "student__rank": 4, "student__alpha": 4.0}

KINDS = pytest.mark.parametrize("kind", [{}, LORA], ids=["full", "lora"])


def step_of(settings: Settings, **changes: Any) -> tuple[Any, DistributionMatchingStep]:
    """A small trainer and its step."""
    trainer = built(settings, objective__name="tdm", optim__gradient_accumulation_steps=1, **changes)
    step: Any = trainer.train_step
    return trainer, step


def copies(parameters: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters.items()}


def changed(before: dict[str, Tensor], parameters: Any) -> bool:
    return any(not torch.equal(value, parameters[name]) for name, value in before.items())


@KINDS
def test_each_update_changes_its_own_network_only(kind: dict[str, Any], speed_settings: Settings) -> None:
    for rates, expected in (((0.0, 1e-3), (False, True)), ((1e-3, 0.0), (True, False))):
        own = {"optim__learning_rate": rates[0], "objective__critic_learning_rate": rates[1]}
        trainer, step = step_of(speed_settings, **kind, **own)
        student, critic = copies(step.student.trainable), copies(step.student.critic_trainable)
        assert student.keys() == critic.keys()
        z, t, c = torch.randn(2, 4, 8, 8), torch.tensor([9, 900]), step.null.expand(2)
        with torch.no_grad():
            before = step.teacher.network(z, t, c, None).x0
        next(trainer.steps())
        with torch.no_grad():
            assert torch.equal(step.teacher.network(z, t, c, None).x0, before)
        assert (changed(student, step.student.trainable), changed(critic, step.student.critic_trainable)) == expected


@KINDS
def test_accumulated_micro_batches_are_one_batch(kind: dict[str, Any], speed_settings: Settings) -> None:
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        own = {"optim__batch_size": batch, "optim__gradient_accumulation_steps": accumulation}
        own |= {"optim__adam_eps": 0.01}  # by default AdamW divides rounding by the size of tiny gradients
        trainer = built(speed_settings, objective__name="tdm", objective__critic_steps=2, **own, **kind)
        steps = [(float(loss), float(norm)) for loss, norm in itertools.islice(trainer.steps(), 2)]
        numbers = {name: [float(v) for v in values] for name, values in trainer.unlogged.numbers.items()}
        found.append((torch.tensor(steps), numbers, trainer.train_step.student))
    (whole, numbers, one), (parts, its, other) = found
    torch.testing.assert_close(parts, whole, rtol=2e-3, atol=1e-5)
    for name, values in numbers.items():
        assert its[name] == pytest.approx(values, rel=2e-3), name
        assert name in METRICS
    for mine, theirs in ((one.trainable, other.trainable), (one.critic_trainable, other.critic_trainable)):
        worst = max(float((mine[name] - theirs[name]).detach().abs().max()) for name in mine)
        assert worst < 1e-5


def test_a_critic_has_a_rank_of_its_own_and_the_students_scale(speed_settings: Settings) -> None:
    _, step = step_of(speed_settings, **LORA, objective__critic_rank=8)
    ranks = [
        {len(v) for name, v in parameters.items() if name.endswith("lora_A")}
        for parameters in (step.student.trainable, step.student.critic_trainable)
    ]
    assert ranks == [{4}, {8}]
    view: Any = step.student.critic
    assert {layer.scaling[name] for layer in view._layers for name in ("online", "critic")} == {1.0}
    online: Any = step.student.online
    ignored = [set(each._ddp_params_and_buffers_to_ignore) for each in (online, view)]
    assert all(".critic." in name for name in ignored[0])
    assert all(".online." in name for name in ignored[1])
    assert len(ignored[0]) == len(ignored[1]) == len(step.student.trainable)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs_on_the_cpu(precision: str, speed_settings: Settings) -> None:
    exact, half = (
        torch.tensor([float(loss) for loss, _ in itertools.islice(step_of(speed_settings, **own)[0].steps(), 2)])
        for own in ({}, {"run__precision": precision})
    )
    torch.testing.assert_close(half, exact, rtol=0.2, atol=0.05)


def test_a_lora_run_resumes_bit_for_bit(method_run: MethodRunner) -> None:
    options = {**LORA, "optim__learning_rate": 1e-3, "run__log_every": 1}
    whole = method_run("tdm", "whole", **options)
    method_run("tdm", "parts", **options, optim__max_train_steps=2)
    parts = method_run("tdm", "parts", **options)
    assert metrics(parts) == metrics(whole)
    mine, its = (checkpoints(run / "checkpoints")[-1] for run in (whole, parts))
    names = {path.name for path in mine.glob("*.safetensors")}
    groups = ("student", "target", "critic", "optimizer", "critic_optimizer")
    assert names == {f"{group}.safetensors" for group in groups}
    assert all((mine / name).read_bytes() == (its / name).read_bytes() for name in names)


@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_where_it_would_have(method_run: MethodRunner, tmp_path: Path) -> None:
    options = {"optim__max_train_steps": 12, "run__checkpoint_every": 3, "run__log_every": 2}
    whole = method_run("tdm", "whole", **options)
    (tmp_path / "config.toml").write_text((whole / "config.toml").read_text())
    kill_run(tmp_path / "config.toml", tmp_path / "killed", "step 4/12")
    assert_same(method_run("tdm", "killed", **options), whole)


def test_nothing_is_generated_and_only_captions_are_encoded(
    method_run: MethodRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lcmdistill.teachers.base import Teacher

    for name in ("encode_images", "generate_latents"):
        monkeypatch.setattr(Teacher, name, lambda *args, name=name, **options: pytest.fail(name))
    run = method_run("tdm", data__cache_dir=str(tmp_path / "cache"), optim__max_train_steps=1)
    (chunk,) = (tmp_path / "cache" / "latents").rglob("*.safetensors")
    assert set(load_file(chunk)) == {"prompt.prompt_embeds", "row"}
    (tmp_path / "prompts.txt").write_text("a red heart\na blue car\n")
    own: dict[str, Any] = {"data__sources": ("teacher",), "data__prompts": str(tmp_path / "prompts.txt")}
    run = method_run("tdm", "of-prompts", **own, optim__max_train_steps=1)
    assert len(losses(run)) == 1
    recorded = json.loads((run / ".data.json").read_text())
    assert [each["word"] for each in recorded["sources"]] == ["teacher"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__teacher_cache_samples": 2}, "evaluates its teacher at the student's own samples; use 0"),
        ({"data__buckets": ("auto",)}, "learns from prompts alone; remove data.buckets"),
        ({"objective__segments": 100}, "objective.segments is 100; it must be from 1 to 31"),
        ({"student__start": "nowhere"}, "--start nowhere does not exist; pass a run folder, or a LoRA's file"),
    ],
)
def test_what_does_not_fit_is_refused(method_run: MethodRunner, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        method_run("tdm", **changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"val/diversity_4": 0.9, "val/saturation_4": 1.1}, None),
        (
            {"val/diversity_4": 0.4, "val/saturation_4": 1.1},
            "its images are 0.4 times as diverse as the teacher's; lower",
        ),
        ({"val/diversity_4": 0.9, "val/saturation_4": 2.0}, "its images are 2 times as saturated as the teacher's"),
        ({"val/diversity_1": 0.1}, None),
        ({}, None),
    ],
)
def test_a_collapse_is_recognized(values: dict[str, float], message: str | None) -> None:
    found = collapse_warning(values, 4)
    assert found is None if message is None else message in str(found)
