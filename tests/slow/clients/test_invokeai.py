"""InvokeAI recognizes full-size files and folders as what they are."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import ROOT, opened_student, write_file, write_lora

pytestmark = pytest.mark.slow


def recognized(python: str, output: Path, *paths: Path) -> list[dict[str, Any]]:
    """Return what InvokeAI takes each path for."""
    driver = str(ROOT / "tests" / "slow" / "clients" / "invokeai_driver.py")
    words = [python, driver, str(output), *map(str, paths)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if "No module named 'invokeai'" in result.stderr:
        pytest.skip("the environment has no InvokeAI; build it with: make clients")
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(output.read_text())
    return [found[str(path)] for path in paths]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_files_and_folders_are_recognized(
    prediction_type: str, base: Path, clients_python: str, tmp_path: Path
) -> None:
    pipeline = opened_student(base, method="lcm", prediction_type=prediction_type)
    file = write_file(pipeline, tmp_path / "student.safetensors")
    lora = write_lora(pipeline, tmp_path / "lora.safetensors")
    pipeline.save_pretrained(tmp_path / "pipeline")
    checkpoint, adapter, folder = recognized(clients_python, tmp_path / "found.json", file, lora, tmp_path / "pipeline")
    print(checkpoint, adapter, folder)
    assert (checkpoint["type"], checkpoint["base"], checkpoint["variant"]) == ("main", "sd-1", "normal")
    assert (adapter["type"], adapter["base"]) == ("lora", "sd-1")
    assert (folder["type"], folder["base"], folder["format"]) == ("main", "sd-1", "diffusers")
    assert folder["prediction_type"] == prediction_type
