"""The instructions of the formats: nodes and files that v-prediction and zero-terminal SNR need, and trained time steps."""

from pathlib import Path
from typing import Any

import pytest

from lcmdistill.export import EXPORTERS
from lcmdistill.export.base import Usage
from lcmdistill.export.sampling_facts import SamplingFacts
from lcmdistill.hub.model_card import render_card
from tests.support.runs import resolve

V, EPSILON = "v_prediction", "epsilon"


def usage_of(name: str, **facts: Any) -> Usage:
    flags = {"teacher.model": "sd15", "run.validation_guidance_scale": 1.0}
    facts["family_key"] = "sdxl" if facts.get("layout") == "sdxl" else "sd"
    flags["student.kind"] = "full" if name == "single-file" else "lora"
    return EXPORTERS[name].usage(resolve({}, flags), SamplingFacts(**facts), "me/mine", "a.safetensors")


@pytest.mark.parametrize("name", ["single-file", "kohya"])
@pytest.mark.parametrize(
    ("layout", "prediction_type", "zero_snr", "node", "needs"),
    [
        ("sd1", EPSILON, False, None, None),
        ("sd2", EPSILON, False, None, None),
        ("sdxl", EPSILON, False, None, None),
        ("sdxl", V, True, None, None),
        ("sd1", V, False, "ModelSamplingDiscrete set to `v_prediction`", ".yaml next to the checkpoint"),
        ("sd1", V, True, "ModelSamplingDiscrete set to `v_prediction`, `zsnr = true`", "Zero Terminal SNR"),
        ("sd2", V, False, "ModelSamplingDiscrete set to `v_prediction`", None),
        ("sd2", V, True, "ModelSamplingDiscrete set to `v_prediction`, `zsnr = true`", "Zero Terminal SNR"),
    ],
)
def test_comfyui_and_a1111_instructions_name_what_the_student_needs(
    name: str, layout: str, prediction_type: str, zero_snr: bool, node: str | None, needs: str | None
) -> None:
    usage = usage_of(name, layout=layout, prediction_type=prediction_type, zero_snr=zero_snr)
    comfy, a1111 = (" ".join(use.lines) for use in EXPORTERS[name].programs(usage))
    assert ("ModelSamplingDiscrete" in comfy) == (node is not None)
    assert node is None or node in comfy
    assert ("zsnr" in comfy) == (zero_snr and layout != "sdxl")
    assert ("; needs " in a1111) == (needs is not None)
    assert needs is None or needs in a1111
    assert "set to lcm" not in comfy


@pytest.mark.parametrize("name", ["kohya", "single-file", "diffusers-lora", "peft"])
def test_python_code_samples_at_the_trained_time_steps(name: str) -> None:
    code = EXPORTERS[name].python(usage_of(name, scheduler_options={"original_inference_steps": 2}))
    assert "original_inference_steps=2)" in code
    assert "num_inference_steps=2" in code
    compile(code, name, "exec")
    assert "original_inference_steps" not in EXPORTERS[name].python(usage_of(name))


@pytest.mark.parametrize("name", ["kohya", "single-file"])
def test_a_card_is_rendered_for_an_export(name: str, tmp_path: Path) -> None:
    flags = {"teacher.model": "sd15", "student.kind": "lora", "run.validation_guidance_scale": 1.0}
    facts = SamplingFacts(layout="sd1", prediction_type=V, zero_snr=True)
    text = render_card(resolve({}, flags), tmp_path / "x", facts, export=(name, "me/mine", "a.safetensors")).text
    assert "- ComfyUI: Copy a.safetensors to models/" in text
    assert "ModelSamplingDiscrete set to `v_prediction`, `zsnr = true`" in text
    assert "## Measured" not in text
    assert str(tmp_path) not in text
    assert "\n\n\n" not in text
