"""sd-scripts loads full-size checkpoints and LoRAs with the outputs that they have here."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmdistill.export.verify import difference
from lcmdistill.teachers.lora.files import load_lora
from tests.support.clients import ROOT, opened_student, write_file, write_lora

pytestmark = pytest.mark.slow


@torch.no_grad()
def test_a_checkpoint_and_a_lora(base: Path, sd_scripts: str, sd_scripts_python: str, tmp_path: Path) -> None:
    pipeline = opened_student(base, method="lcm")
    file = write_file(pipeline, tmp_path / "a.safetensors")
    lora = write_lora(pipeline, tmp_path / "lora.safetensors")
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {
        "sample": torch.randn(1, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([499]),
        "embeds": torch.randn(1, 77, 768, generator=generator),
        "ids": torch.randint(49000, (1, 77), generator=generator),
        "latents": torch.randn(1, 4, 8, 8, generator=generator),
    }
    save_file(inputs, tmp_path / "inputs.safetensors")
    driver = str(ROOT / "tests" / "slow" / "clients" / "sd_scripts_driver.py")
    for with_lora in (False, True):
        if with_lora:
            load_lora(pipeline, str(lora), "it")
        files = [
            str(file),
            str(lora) if with_lora else "-",
            *(str(tmp_path / f"{n}.safetensors") for n in ("inputs", "out")),
        ]
        words = [sd_scripts_python, driver, sd_scripts, *files]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        got = load_file(tmp_path / "out.safetensors")
        expected = {
            "unet": pipeline.unet(inputs["sample"], inputs["timestep"], inputs["embeds"]).sample,
            "text": pipeline.text_encoder(inputs["ids"])[0],
            "vae": pipeline.vae.decode(inputs["latents"]).sample,
        }
        assert {name: difference([got[name]], [value]) < 1e-4 for name, value in expected.items()} == dict.fromkeys(
            expected, True
        )
        assert int(got["lora_modules"]) == (278 if with_lora else 0)
