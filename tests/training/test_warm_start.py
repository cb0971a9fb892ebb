"""`--start`: a run begins at another run's student or at a LoRA, of any method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import checkpoints
from tests.support.methods import MethodRunner
from tests.support.speed import Settings, built

LORA = {"student__kind": "lora", "student__rank": 4, "student__alpha": 4.0}


@pytest.fixture
def pcm_lora(method_run: MethodRunner) -> Path:
    return method_run("pcm", "pcm-lora", **LORA, optim__max_train_steps=2, optim__learning_rate=1e-2)


def outputs(settings: Settings, start: str, **changes: Any) -> list[torch.Tensor]:
    """Raw outputs of the student before training, of its average, and of the teacher."""
    student: Any = built(settings, student__start=start, **changes).train_step.student
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([99, 900])
    c = {"prompt_embeds": torch.zeros(2, 77, 16)}
    with torch.no_grad():
        return [network(z, t, c, None) for network in (student.online, student.target, student.teacher)]


@pytest.mark.parametrize(("rank", "method"), [(4, "tdm"), (8, "lcm")])
def test_a_lora_starts_at_a_lora_of_another_method(
    rank: int, method: str, pcm_lora: Path, speed_settings: Settings
) -> None:
    own = {**LORA, "student__rank": rank, "objective__name": method, "student__target": "ema"}
    saved = load_file(checkpoints(pcm_lora / "checkpoints")[-1] / "student.safetensors")
    assert any(value.abs().max() > 0 for name, value in saved.items() if name.endswith("lora_B"))
    online, average, teacher = outputs(speed_settings, str(pcm_lora), **own)
    assert torch.equal(online, average)
    assert (online - teacher).abs().max() > 1e-4
    (file,) = (pcm_lora / "lora").glob("*.safetensors")
    again, _, bare = outputs(speed_settings, str(file), **own)
    assert torch.equal(again, online)
    plain, _, untouched = outputs(speed_settings, "teacher", **own)
    assert torch.equal(bare, untouched)  # the adapter that was read has left no trace
    assert torch.equal(plain, untouched)
    expected, _, _ = outputs(speed_settings, str(pcm_lora), **{**own, "student__rank": 4})
    torch.testing.assert_close(online, expected, rtol=1e-3, atol=1e-5)


def test_a_full_student_starts_at_a_runs_student(method_run: MethodRunner, speed_settings: Settings) -> None:
    start = method_run("pcm", "pcm", optim__max_train_steps=2)
    online, average, teacher = outputs(speed_settings, str(start), objective__name="tdm")
    assert torch.equal(online, average)
    saved = load_file(checkpoints(start / "checkpoints")[-1] / "target.safetensors")
    step: Any = built(speed_settings, student__start=str(start), objective__name="tdm").train_step
    assert all(torch.equal(value, saved[name]) for name, value in step.student.trainable.items())
    critic = dict(step.student.critic.network.named_parameters())
    bare = dict(step.student.teacher.network.named_parameters())
    assert all(torch.equal(value, bare[name]) for name, value in critic.items())  # the critic starts at the teacher
    assert (online - teacher).abs().max() > 1e-4


def test_a_run_repairs_a_lora_and_resumes(method_run: MethodRunner, pcm_lora: Path) -> None:
    options = {**LORA, "student__start": str(pcm_lora), "optim__learning_rate": 1e-3}
    whole = method_run("tdm", "whole", **options)
    method_run("tdm", "parts", **options, optim__max_train_steps=2)
    pcm_lora.rename(pcm_lora.with_name("moved"))
    (pcm_lora).mkdir()  # a resumed run does not read it again
    parts = method_run("tdm", "parts", **options)
    mine, its = (checkpoints(run / "checkpoints")[-1] / "student.safetensors" for run in (whole, parts))
    assert mine.read_bytes() == its.read_bytes()
    assert str(pcm_lora.parent) not in (whole / "README.md").read_text()


def test_a_start_that_does_not_fit_is_refused(
    method_run: MethodRunner, pcm_lora: Path, small_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"is a LoRA; start from it with lcmdistill distill-lora, or merge it"):
        method_run("tdm", student__start=str(pcm_lora))
    with pytest.raises(UsageError, match=r"is a full student; start from it with lcmdistill distill, or"):
        method_run("tdm", **LORA, student__start=str(small_run))
    with pytest.raises(UsageError, match=r"has rank 4 and this run 2; pass --rank 4 --alpha 4"):
        method_run("tdm", "low", **{**LORA, "student__rank": 2}, student__start=str(pcm_lora))
    (file,) = (pcm_lora / "lora").glob("*.safetensors")
    with pytest.raises(UsageError, match=r"has rank 4 and this run 2; pass --rank 4 --alpha 4"):
        method_run("tdm", "low", **{**LORA, "student__rank": 2}, student__start=str(file))
    assert not (tmp_path / "low").exists()  # known before anything is prepared
    with pytest.raises(UsageError, match=r"has \d+ layers that this run does not train, such as .*--target-modules"):
        method_run("tdm", **LORA, student__target_modules=("to_q",), student__start=str(pcm_lora))
    with pytest.raises(UsageError, match="takes guidance as an input of the network"):
        method_run("tdm", student__start=str(small_run))
