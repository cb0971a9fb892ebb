"""ComfyUI's rules as fixtures: sigmas, times, what a file is taken for; and students that are sampled by them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from safetensors.torch import load_file

from lcmdistill.config.schema import LORA_MODULES
from lcmdistill.export.client_sampling import (
    check_sampling,
    comfyui_detects,
    comfyui_sigmas,
    sample_as_comfyui,
    sample_as_trained,
    sgm_uniform,
    time_of,
)
from lcmdistill.export.sampling_facts import SamplingFacts
from lcmdistill.export.single_file import configs_of, read_back, write_single_file
from lcmdistill.export.verify import difference
from lcmdistill.teachers.lora.adapters import LoraLayer
from lcmdistill.teachers.lora.files import kohya_tensors
from lcmdistill.teachers.single_file.load import CONFIGS
from lcmdistill.teachers.single_file.sd_keys import original_key, unet_places
from lcmdistill.utils.errors import RunError
from tests.support.models import BUILDERS, UNet, opened

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def student(folder: Path, prediction_type: str, zero_snr: bool, betas: dict[str, Any] = SD_BETAS) -> Any:
    """A pipeline with LCM's scheduler on a noise schedule."""
    pipeline = opened(folder)
    options = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr, "clip_sample": False}
    pipeline.scheduler = LCMScheduler(**options, **betas)  # pyright: ignore[reportArgumentType]
    return pipeline


def test_the_sigmas_are_comfyui_s() -> None:
    """The figures are those of ComfyUI 0.8.0's own tables."""
    sigmas, zero = comfyui_sigmas(), comfyui_sigmas(zero_snr=True)
    assert len(sigmas) == 1000
    expected = {0: 0.029167, 259: 0.719380, 499: 1.612886, 759: 4.260557, 999: 14.614641}
    for t, sigma in expected.items():
        assert float(sigmas[t]) == pytest.approx(sigma, rel=1e-4)
    assert float(zero[999]) == pytest.approx(4518.76, rel=1e-3)
    assert float(zero[0]) == pytest.approx(float(sigmas[0]), rel=1e-4)


def test_sgm_uniform_visits_other_times_than_lcm_was_trained_at() -> None:
    sigmas = comfyui_sigmas()
    visited = sgm_uniform(sigmas, 4)
    assert [int(time_of(sigmas, sigma)) for sigma in visited[:-1]] == [999, 749, 500, 250]
    assert [round(float(sigma), 3) for sigma in visited] == [14.615, 4.086, 1.616, 0.695, 0.0]
    assert float(visited[-1]) == 0.0
    trained = LCMScheduler(**SD_BETAS)
    trained.set_timesteps(4)
    assert trained.timesteps.tolist() == [999, 759, 499, 259]


@pytest.mark.parametrize(
    ("layout", "keys", "spread", "expected"),
    [
        ("sd1", {"v_pred", "ztsnr"}, 1.0, ("epsilon", False)),
        ("sd2", {"v_pred", "ztsnr"}, 0.05, ("epsilon", False)),
        ("sd2", set[str](), 0.1, ("v_prediction", False)),
        ("sdxl", {"v_pred"}, 1.0, ("v_prediction", False)),
        ("sdxl", {"v_pred", "ztsnr"}, 1.0, ("v_prediction", True)),
        ("sdxl", {"ztsnr"}, 1.0, ("epsilon", False)),
    ],
)
def test_what_comfyui_takes_a_file_for(layout: str, keys: set[str], spread: float, expected: tuple[str, bool]) -> None:
    norm = torch.tensor([-spread, spread])
    assert comfyui_detects(layout, keys, norm) == expected


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_two_steps_by_comfyui_s_rule_are_the_student_s(
    prediction_type: str, zero_snr: bool, small_teacher: Path
) -> None:
    if zero_snr and prediction_type == "epsilon":
        pytest.skip("epsilon says nothing at zero SNR")
    pipeline = student(small_teacher, prediction_type, zero_snr)
    expected = sample_as_trained(pipeline, 1.0)
    got = sample_as_comfyui(pipeline, 1.0, prediction_type, zero_snr)
    assert difference([got], [expected]) < (1e-3 if zero_snr else 1e-5)
    other = "epsilon" if prediction_type == "v_prediction" else "v_prediction"
    assert difference([sample_as_comfyui(pipeline, 1.0, other, zero_snr)], [expected]) > 0.5
    if prediction_type == "v_prediction":
        assert difference([sample_as_comfyui(pipeline, 1.0, prediction_type, not zero_snr)], [expected]) > 1e-3


@pytest.mark.parametrize("layout", list(BUILDERS))
def test_a_file_is_sampled_as_its_instructions_say(layout: str, tmp_path: Path) -> None:
    folder, path = BUILDERS[layout](tmp_path / "model"), tmp_path / "a.safetensors"
    pipeline = student(folder, "v_prediction", True)
    write_single_file(pipeline, path, dtype=torch.float32)
    expected, keys = sample_as_trained(pipeline, 1.0), set(load_file(path))
    facts = SamplingFacts(
        family_key="sdxl" if layout == "sdxl" else "sd", layout=layout, prediction_type="v_prediction", zero_snr=True
    )
    with configs_of(pipeline) as configs:
        loaded = read_back(path, configs)
    loaded.scheduler = pipeline.scheduler
    assert "two steps by ComfyUI's rule: largest" in check_sampling(loaded, 1.0, expected, facts, keys, 1e-5)
    wrong = SamplingFacts(family_key=facts.family_key, layout=layout, prediction_type="epsilon")
    with pytest.raises(RunError, match="two steps by ComfyUI's rule are off by"):
        check_sampling(loaded, 1.0, expected, wrong, keys - {"v_pred", "ztsnr"}, 1e-5)


DEPTHS = {"transformer_layers_per_block": [1, 1, 2], "reverse_transformer_layers_per_block": [2, 1, 1]}


@pytest.mark.parametrize(
    ("layout", "changes", "count"),
    [
        ("sd1", {}, 278),
        ("sd2", {}, 278),
        ("sdxl", DEPTHS, 258),  # Segmind Vega's depths with SDXL's middle
        ("sdxl", {**DEPTHS, "mid_block_type": "UNetMidBlock2D"}, 233),  # Segmind Vega
        ("sdxl", {}, 788),
    ],
)
def test_every_module_of_a_lora_has_a_key_that_clients_know(layout: str, changes: dict[str, Any], count: int) -> None:
    """ComfyUI and sd-scripts know a module by its path in diffusers, and ComfyUI maps it to the original layout."""
    config = json.loads((CONFIGS / layout / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet.from_config({**config, **changes})
    layers = {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(LORA_MODULES) and hasattr(module, "weight")
    }
    assert len(layers) == count
    zero = torch.zeros(1)
    keys = kohya_tensors({name: LoraLayer(zero, zero, 1.0) for name in layers}, torch.float16)
    stems = {f"lora_unet_{name.replace('.', '_')}" for name in layers}
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(keys) == {f"{stem}.{end}" for stem in stems for end in ends}
    places = unet_places(unet.config)
    assert all(original_key(f"{name}.weight", places) for name in layers)
