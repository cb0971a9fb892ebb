"""Compiled blocks train the same as others."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lcmdistill.utils.run_dir import checkpoints
from tests.support.runs import distill, resolve
from tests.support.speed import Settings
from tests.support.training import losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_compiled_blocks_train_the_same(
    kind: str, speed_settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**speed_settings, "student.kind": kind, "optim.max_train_steps": 3, "run.log_every": 1}
    settings |= {"optim.learning_rate": 1e-6}  # at which rounding differences do not grow
    plain, compiled = (
        distill(resolve({}, {**settings, "run.compile": wish, "run.output": str(tmp_path / wish)}))
        for wish in ("off", "on")
    )
    assert capsys.readouterr().out.count("the networks are compiled at the first step, which takes minutes") == 1
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    names = [
        load_file(checkpoints(run / "checkpoints")[-1] / "student.safetensors").keys() for run in (compiled, plain)
    ]
    assert names[0] == names[1]
