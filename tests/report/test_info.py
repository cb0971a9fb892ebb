"""`lcmdistill info`: teachers, runs and LoRAs, described from their files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcmdistill.export import registry as export
from lcmdistill.export.single_file import write_single_file
from lcmdistill.report.info import _damage, describe
from lcmdistill.utils.checksums import write_checksums
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


@pytest.mark.parametrize("size", [1000, 2**20 + 1])
def test_damage_to_what_a_run_wrote_is_a_row(size: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(size))
    write_checksums(tmp_path)
    assert _damage(tmp_path) == []
    path.write_bytes(bytes(size - 1) + b"1")
    assert len(_damage(tmp_path)) == (size == 1000)  # a large file is not read
    path.unlink()
    (row,) = _damage(tmp_path)
    assert row[0] == "damage"
    assert str(row[1]).startswith(f"{path} is missing; restore it")


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


OTHERS: dict[str, tuple[dict[str, tuple[int, ...]], str, str]] = {
    "ControlNet": ({"control_model.zero_convs.0.0.weight": (4, 4)}, "ControlNet", "cannot be used here"),
    "ControlNet of diffusers": (
        {
            "controlnet_cond_embedding.conv_in.weight": (4, 3, 3, 3),
            "down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3),
        },
        "ControlNet",
        "cannot be used here",
    ),
    "IP-Adapter with a LoRA": (
        {"image_proj.proj.weight": (4, 4), "ip_adapter.0.to_q_lora.down.weight": (4, 4)},
        "IP-Adapter",
        "cannot be used here",
    ),
    "VAE": (
        {"encoder.conv_in.weight": (4, 3, 3, 3), "decoder.conv_in.weight": (4, 4, 3, 3)},
        "VAE",
        "pass it as --vae",
    ),
    "VAE of a checkpoint": ({"first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3)}, "VAE", "pass it as --vae"),
    "embedding": ({"emb_params": (8, 768)}, "textual inversion", "cannot be used here"),
    "embedding of XL": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "textual inversion", "cannot be used here"),
    "upscaler": (
        {"model.0.weight": (64, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3)},
        "upscaler",
        "cannot",
    ),
    "CLIP": (
        {"text_model.embeddings.token_embedding.weight": (9, 8)},
        "CLIP text encoder",
        "pass it as --text-encoder",
    ),
    "OpenCLIP": ({"transformer.resblocks.0.ln_1.weight": (8,)}, "CLIP text encoder", "pass it as --text-encoder"),
    "T5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}, "T5 text encoder", "cannot be used as a file"),
    "FLUX": ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "FLUX transformer", "cannot be used as a file"),
    "part of a folder": (
        {"transformer_blocks.0.attn.to_q.weight": (8, 8)},
        "transformer with",
        "cannot be used as a file; pass its diffusers folder",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_are_no_model_are_named_with_their_use(name: str, tmp_path: Path) -> None:
    shapes, title, use = OTHERS[name]
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "a.safetensors")
    rows = dict(describe(str(tmp_path / "a.safetensors")))
    assert rows["type"].startswith(title)
    assert rows["use"].startswith(use)


def test_pickles_and_gguf_are_named_without_opening_them(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "new.ckpt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "it.gguf").write_bytes(b"GGUF\x03\0\0\0")
    for file, title in (("new.ckpt", "pickle of PyTorch"), ("old.pt", "pickle of PyTorch"), ("it.gguf", "GGUF")):
        rows = dict(describe(str(tmp_path / file)))
        assert rows["type"].startswith(title)
        assert rows["use"].startswith("cannot be used here; use ")
        (tmp_path / file).rename(tmp_path / "renamed.safetensors")
        with pytest.raises(UsageError, match=rf"renamed.safetensors is a {title}.*; cannot be used here; use "):
            describe(str(tmp_path / "renamed.safetensors"))


@pytest.mark.parametrize(
    ("keys", "use"),
    [
        (["lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight"], "pass it as --lora to sample"),
        (["lora_unet_a.oft_blocks"], "cannot be used here (OFT)"),
        (["lora_unet_a.a1.weight"], "cannot be used here (GLoRA)"),
        (
            ["lora_unet_a.lora_down.weight", "bundle_emb.x.string_to_param.*"],
            "cannot be used here (textual inversions)",
        ),
        (["diffusion_model.a.lora_down.weight"], "cannot be used here (ComfyUI's model keys)"),
    ],
)
def test_info_states_whether_a_lora_can_be_used(keys: list[str], use: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(4, 4) for key in keys}, tmp_path / "a.safetensors")
    assert dict(describe(str(tmp_path / "a.safetensors")))["use"].startswith(use)


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

    code = "import sys; from lcmdistill.report.info import _damage, describe; "
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
