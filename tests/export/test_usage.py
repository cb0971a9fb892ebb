"""The instructions of the formats: nodes and files that a student's noise schedule needs, refusals, and trained time steps."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from lcmdistill.diffusion.parameterization import FLOW
from lcmdistill.export import EXPORTERS
from lcmdistill.export.base import Usage
from lcmdistill.export.registry import export
from lcmdistill.export.sampling_facts import Betas, SamplingFacts, facts_from_run, schedule_facts
from lcmdistill.hub.model_card import render_card
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.report.uses import uses
from tests.support.finished_runs import finished_run
from tests.support.runs import resolve
from tests.support.teachers import build_teacher, edited

V, EPSILON = "v_prediction", "epsilon"


def usage_of(name: str, **facts: Any) -> Usage:
    flags = {"teacher.model": "sd15", "run.validation_guidance_scale": 1.0}
    facts["family_key"] = "sdxl" if facts.get("layout") == "sdxl" else facts.get("family_key", "sd")
    flags["student.kind"] = "full" if name == "single-file" else "lora"
    return EXPORTERS[name].usage(resolve({}, flags), SamplingFacts(**facts), "me/mine", "a.safetensors")


@pytest.mark.parametrize("name", ["single-file", "kohya"])
@pytest.mark.parametrize(
    ("layout", "prediction_type", "zero_snr", "node", "needs"),
    [
        ("sd1", EPSILON, False, None, None),
        ("sd2", EPSILON, False, None, None),
        ("sdxl", EPSILON, False, None, None),
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


def test_an_sdxl_checkpoint_marks_v_prediction_and_a_lora_names_what_its_checkpoint_needs() -> None:
    facts: dict[str, Any] = {"layout": "sdxl", "prediction_type": V, "zero_snr": True}
    comfy, a1111 = (" ".join(use.lines) for use in EXPORTERS["single-file"].programs(usage_of("single-file", **facts)))
    assert "ModelSampling" not in comfy
    assert "needs" not in a1111
    comfy, a1111 = (" ".join(use.lines) for use in EXPORTERS["kohya"].programs(usage_of("kohya", **facts)))
    keys = "the keys `v_pred` and `ztsnr`"
    assert f"ModelSamplingDiscrete set to `v_prediction`, `zsnr = true`, unless the checkpoint has {keys}" in comfy
    assert f"; needs a checkpoint with {keys}" in a1111


LINEAR = Betas("linear", 0.0001, 0.02, 1000)


@pytest.mark.parametrize("name", ["single-file", "kohya"])
@pytest.mark.parametrize(
    ("layout", "betas", "in_a1111"),
    [
        ("sd1", LINEAR, ".yaml next to the checkpoint"),
        ("sd1", LINEAR._replace(schedule="trained_betas"), None),
        ("sd2", LINEAR, None),
        ("sdxl", LINEAR, None),
    ],
)
def test_a_program_that_cannot_sample_other_betas_is_said_to(
    name: str, layout: str, betas: Betas, in_a1111: str | None
) -> None:
    comfy, a1111 = EXPORTERS[name].programs(usage_of(name, layout=layout, betas=betas))
    assert (comfy.is_supported, a1111.is_supported) == (False, in_a1111 is not None)
    (line,) = comfy.lines
    assert (
        line
        == f"Cannot sample this student: its betas ({betas}) are not Stable Diffusion's, and no node sets them; "
        + ("use diffusers.")
    )
    text = " ".join(a1111.lines)
    assert (in_a1111 or f"its betas ({betas}) are not Stable Diffusion's; use diffusers") in text
    if in_a1111 and name == "kohya":
        assert "`linear_start: 0.0001, linear_end: 0.02, beta_schedule: sqrt_linear, timesteps: 1000`" in text


def test_a_lora_of_a_teacher_that_predicts_the_sample() -> None:
    comfy, a1111 = EXPORTERS["kohya"].programs(usage_of("kohya", layout="sd1", prediction_type="sample"))
    assert "ModelSamplingDiscrete set to `x0`" in comfy.lines[1]
    assert "this one predicts sample; use diffusers" in a1111.lines[0]


@pytest.mark.parametrize(("shift", "node"), [(3.0, ""), (1.0, "ModelSamplingSD3 set to shift 1")])
def test_a_flow_student_with_another_shift_than_comfyui_s(shift: float, node: str) -> None:
    facts: dict[str, Any] = {"layout": "sd3", "family_key": "sd3", "prediction_type": FLOW, "shift": shift}
    for name in ("single-file", "diffusers-lora"):
        (comfy,) = EXPORTERS[name].programs(usage_of(name, **facts))
        assert node in comfy.lines[1]
        assert ("ModelSamplingSD3" in comfy.lines[1]) == bool(node)


@pytest.mark.parametrize("prediction_type", [FLOW, "sample"])
def test_no_one_is_sent_to_write_a_single_file_that_cannot_be_written(prediction_type: str) -> None:
    usage = usage_of("single-file", layout="sd1", prediction_type=prediction_type)
    uses = EXPORTERS["single-file"].programs(usage)
    assert not any(use.is_supported for use in uses)
    assert f"a single file cannot hold a model of its kind that predicts {prediction_type}; use" in uses[0].lines[0]


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (False, None)),
        ({"rescale_betas_zero_snr": True}, (True, None)),
        ({"beta_end": 0.02}, (False, Betas("scaled_linear", 0.00085, 0.02, 1000))),
        ({"num_train_timesteps": 500}, (False, Betas("scaled_linear", 0.00085, 0.012, 500))),
        (
            {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
            (True, Betas("squaredcos_cap_v2", 0.00085, 0.012, 1000)),
        ),
        ({"trained_betas": [0.001] * 1000}, (False, Betas("trained_betas", 0.00085, 0.012, 1000))),
    ],
)
def test_a_schedule_is_compared_with_the_one_that_programs_assume(changes: dict[str, Any], expected: Any) -> None:
    assert schedule_facts({**SD, **changes})[:2] == expected


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_another_schedule_stands_in_every_document(kind: str, tmp_path: Path) -> None:
    """The last line of an export, the file's header, the card and the report."""
    file = "scheduler/scheduler_config.json"
    change = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    teacher = edited(build_teacher(tmp_path / "sd"), tmp_path / "t", file, lambda config: {**config, **change})
    run = finished_run(teacher, kind, tmp_path / "run")
    refusal = f"its betas ({LINEAR}) are not Stable Diffusion's, and no node sets them; use diffusers"
    output = tmp_path / "a.safetensors"
    name = "kohya" if kind == "lora" else "single-file"
    sentence = export(run, name, output, dtype="fp32", guidance_scale=None, verify=True)
    assert f"ComfyUI: Cannot sample this student: {refusal}" in sentence
    assert "two steps by ComfyUI's rule" not in sentence
    with safe_open(output, "pt") as opened:
        hint = opened.metadata()["modelspec.usage_hint"]
    assert f"; ComfyUI: cannot sample it: {refusal}; A1111: the file" in hint
    written = yaml.safe_load((tmp_path / "a.yaml").read_text())["model"]["params"] if kind == "full" else {}
    assert not written or [written[key] for key in ("parameterization", "beta_schedule")] == ["eps", "sqrt_linear"]
    config = require_run_config(run)
    lines = {entry["name"]: " ".join(entry["lines"]) for entry in uses(run, config, None)}
    assert lines["ComfyUI"] == f"Cannot sample this student: {refusal}."
    card = (run / "README.md").read_text()
    assert f"- ComfyUI: Cannot sample this student: {refusal}.\n" in card
    assert ("- A1111: Write a single file first" in card) == (kind == "full")
    assert facts_from_run(run, config).betas == LINEAR


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
    run = render_card(resolve({}, {**flags, "student.kind": "full"}), tmp_path / "x", facts).text
    assert "Load Checkpoint, KSampler" in run
    assert "ModelSamplingDiscrete set to `v_prediction`, `zsnr = true`" in run
    text = render_card(resolve({}, flags), tmp_path / "x", facts, export=(name, "me/mine", "a.safetensors")).text
    assert "- ComfyUI: Copy a.safetensors to models/" in text
    assert "ModelSamplingDiscrete set to `v_prediction`, `zsnr = true`" in text
    assert "## Measured" not in text
    assert str(tmp_path) not in text
    assert "\n\n\n" not in text
