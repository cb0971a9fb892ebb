"""`lcmdistill info`: teachers, runs and LoRAs, described from their files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcmdistill.export import registry as export
from lcmdistill.export.single_file import write_single_file
from lcmdistill.report.info import describe
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.finished_runs import finished_run
from tests.support.models import FAMILY_BUILDERS, opened
from tests.support.teachers import Command


@pytest.mark.parametrize("family", list(FAMILY_BUILDERS))
def test_a_teacher_is_described(family: str, tmp_path: Path) -> None:
    folder = FAMILY_BUILDERS[family](tmp_path / "model")
    pipeline, rows = opened(folder), dict(describe(str(folder)))
    assert type(pipeline).__name__ in rows["type"]
    assert "not supported" not in rows["type"]
    is_flow = family in ("sd3", "sana", "flux")
    wanted = "velocity (flow matching)" if is_flow else pipeline.scheduler.config.prediction_type
    assert rows["prediction type"] == wanted
    shift = "shift by image size" if family == "flux" else "shift 3"
    assert (f"rectified flow, {shift}, T = 1000" in rows["schedule"]) is is_flow
    assert rows.get("guidance input", "no").startswith("yes") == (family == "flux")
    assert ("zero-terminal SNR" in rows["schedule"]) == (family == "sd2")
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            tables = [
                value for key, value in part.named_buffers() if key.endswith("pos_embed") and key in part.state_dict()
            ]
            count = sum(value.numel() for value in (*part.parameters(), *tables))
            assert rows[name] == f"{count:,} parameters, fp32 on disk"
    assert rows["license"] == "not specified"


def test_runs_and_their_exports_are_described(tmp_path: Path, small_teacher: Path, command: Command) -> None:
    rows = describe(str(finished_run(small_teacher, "full", tmp_path / "full")))
    assert rows[1] == ("type", f"run: LCM (Luo et al. 2023, arXiv:2310.04378), distilled from {small_teacher}")
    assert dict(rows)["type"].startswith("LatentConsistencyModelPipeline")  # the result follows
    assert dict(rows)["guidance input"].startswith("yes")
    assert dict(rows)["guidance"] == "omega 5 to 15 (guidance_scale 6 to 16)"
    run = finished_run(small_teacher, "lora", tmp_path / "lora")
    options = {"dtype": "fp16", "guidance_scale": None, "verify": False}
    for name, output in {"kohya": "a.safetensors", "diffusers-lora": "b", "peft": "c"}.items():
        export.export(run, name, tmp_path / output, **options)
        rows = dict(describe(str(tmp_path / output)))
        assert rows["type"].startswith(f"LoRA, {name.removesuffix('-lora')} keys, on ")
        assert (rows["rank"], float(rows["alpha"])) == ("4", 3.0)
        assert rows["base"] == small_teacher.name
    code, out, error = command("info", "a.safetensors")
    assert (code, error) == (0, "")
    assert "header ss_network_dim" in out


def test_a_single_file_is_described(tmp_path: Path, small_teacher: Path) -> None:
    pipeline = opened(small_teacher)
    write_single_file(pipeline, tmp_path / "a.safetensors", dtype=torch.float16)
    rows = dict(describe(str(tmp_path / "a.safetensors")))
    assert rows["detected as"].startswith("Stable Diffusion 1 (CLIP's text encoder")
    assert rows["U-Net"] == f"{sum(p.numel() for p in pipeline.unet.parameters()):,} parameters, fp16 on disk"


@pytest.mark.parametrize("style", ["prefixed", "bare", "diffusers"])
def test_a_unet_only_file_is_described(style: str, tmp_path: Path, small_teacher: Path) -> None:
    pipeline = opened(small_teacher)
    write_single_file(pipeline, tmp_path / "a.safetensors", dtype=torch.float16)
    unet = {k: v for k, v in load_file(tmp_path / "a.safetensors").items() if k.startswith("model.diffusion_model.")}
    if style == "bare":
        unet = {key.removeprefix("model.diffusion_model."): value for key, value in unet.items()}
    if style == "diffusers":
        unet = {key: value.half() for key, value in pipeline.unet.state_dict().items()}
    save_file(unet, tmp_path / "b.safetensors")
    rows = dict(describe(str(tmp_path / "b.safetensors")))
    assert rows["U-Net"] == f"{sum(p.numel() for p in pipeline.unet.parameters()):,} parameters, fp16 on disk"
    assert rows["VAE"] == rows["text encoders"] == "not in the file; --base MODEL supplies what is missing"


def test_a_layer_without_a_rank_ends_nothing(tmp_path: Path) -> None:
    save_file(
        {"lora_unet_a.lora_down.weight": torch.zeros(()), "b.attn2.to_k.weight": torch.zeros(())},
        tmp_path / "a.safetensors",
    )
    assert dict(describe(str(tmp_path / "a.safetensors")))["rank"] == "none"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["lora_unet_a.oft_diag", "lora_unet_b.oft_diag"], "LoRA, OFT, kohya keys, on 2 layers"),
        (["lora_unet_a.a1.weight", "lora_unet_a.b2.weight"], "LoRA, GLoRA, kohya keys, on 1 layers"),
        (
            [f"unet.{path}.to_q.{end}" for path in "ab" for end in ("lora_A.weight", "lora_B.weight", "dora_scale")],
            "LoRA, DoRA, diffusers keys, on 2 layers",
        ),
        (
            [f"base_model.model.{path}.hada_{part}" for path in "ab" for part in ("w1_a", "w1_b", "w2_a", "w2_b")],
            "LoRA, LoHa, diffusers keys, on 2 layers",
        ),
    ],
)
def test_every_kind_of_lora_is_named_with_its_layers(keys: list[str], text: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(4, 4) for key in keys}, tmp_path / "a.safetensors")
    assert dict(describe(str(tmp_path / "a.safetensors")))["type"] == text.replace("1 layers", "1 layer")


def test_a_peft_folder_of_another_kind_is_described(tmp_path: Path) -> None:
    save_file({"base_model.model.a.hada_w1_a": torch.zeros(4, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA", "r": 4, "alpha": 3}')
    rows = dict(describe(str(tmp_path)))
    assert (rows["type"], rows["alpha"]) == ("LoRA, LoHa, peft keys, on 1 layer", "3")


def test_a_usage_hint_is_shown_whole(tmp_path: Path) -> None:
    hint = "LCM sampler, 4 steps, " * 20
    tensors = {"lora_unet_a.lora_down.weight": torch.zeros(4, 4), "lora_unet_a.lora_up.weight": torch.zeros(4, 4)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"modelspec.usage_hint": hint, "table": "x" * 1000})
    rows = dict(describe(str(tmp_path / "a.safetensors")))
    assert rows["header modelspec.usage_hint"] == hint
    assert rows["header table"] == "x" * 117 + "..."


def test_the_bundled_teacher_is_described_without_torch() -> None:
    from lcmdistill.teachers.naming import ALIASES

    code = "import sys; from lcmdistill.report.info import describe; "
    code += f"print(describe({ALIASES['tiny']!r}), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "LICENSES.md" in out or "apache" in out.lower()
    assert out.strip().endswith("False")


@pytest.mark.parametrize(
    ("model", "kind"), [("nothing", UsageError), ("a.ckpt", UsageError), (".", UsageError), ("owner/none", RunError)]
)
def test_other_paths_are_refused(
    model: str, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.ckpt").write_bytes(b"rubbish")
    with pytest.raises(kind) as caught:
        describe(model)
    assert "\n" not in str(caught.value)
