"""Diffusers folders of somebody else: no code of theirs runs, and odd but valid ones load."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lcmdistill.report.info import describe
from lcmdistill.teachers.folders import _check_tokenizer, check_classes, check_kernels
from lcmdistill.teachers.loading import load_pipeline, load_teacher
from lcmdistill.teachers.text_encoders import _open
from lcmdistill.utils.errors import UsageError
from tests.support.teachers import Command, edited

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("_class_name", ["pipeline", "Mine"], r"custom pipeline class \(pipeline\.Mine\).*supported are StableDiff"),
        ("_class_name", 3, r"custom pipeline class \(3\)"),
        ("unet", ["mine", "Mine"], r"custom class for its unet \(mine\.Mine\), and code of a model is not run"),
        ("unet", ["diffusers", "a.b"], r"custom class for its unet"),
        ("unet", ["diffusers", ["mine", "Mine"]], r"custom class for its unet"),
        (
            "unet",
            ["diffusers", "DiffusionPipeline"],
            r"DiffusionPipeline as its unet, which chooses its classes itself",
        ),
        ("image_encoder", ["pipeline_utils", "DiffusionPipeline"], r"DiffusionPipeline as its image_encoder"),
        ("text_encoder", ["transformers", "AutoModel"], r"AutoModel as its text_encoder"),
        ("unet", "a.b", r"states 'a\.b' for its unet, and not \[library, class\]"),
        ("vae", {"0": "x"}, r"states \{'0': 'x'\} for its vae"),
        ("scheduler", ["os", "system"], r"custom class for its scheduler \(os\.system\)"),
        ("extra", ["mine", "Mine", "more"], r"custom class for its extra"),
    ],
)
def test_code_in_a_folder_is_never_run(
    tmp_path: Path, small_teacher: Path, key: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edited(small_teacher, tmp_path / "teacher", "model_index.json", lambda index: {**index, key: value})
    for part in (".", "unet", "scheduler"):
        for name in ("pipeline.py", "mine.py"):
            (folder / part / name).write_text(CODE)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    with pytest.raises(UsageError, match=message):
        load_pipeline(str(folder))
    assert not list(folder.rglob("ran"))
    assert "mine" not in sys.modules


@pytest.mark.parametrize(
    "setting",
    [
        {"_attn_implementation": "owner/kernel"},
        {"attn_implementation": {"": "owner/kernel@main:forward"}},
        {"text_config": {"_attn_implementation_internal": "owner/kernel"}},
        {"_experts_implementation": "owner/kernel"},
    ],
)
def test_kernels_of_the_hub_are_never_run(setting: dict[str, Any], small_teacher: Path, tmp_path: Path) -> None:
    """transformers downloads such a kernel and imports it, where the package `kernels` is installed."""
    folder = edited(
        small_teacher, tmp_path / "teacher", "text_encoder/config.json", lambda config: {**config, **setting}
    )
    with pytest.raises(UsageError, match=r"text_encoder/config\.json states .*which is code of the hub"):
        load_pipeline(str(folder))
    with pytest.raises(UsageError, match="which is code of the hub"):
        _open(CLIPTextModel, folder / "text_encoder", {})
    check_kernels("config.json", {"_attn_implementation": "sdpa", "attn_implementation": None, "a": {"path": "x/y"}})


def test_code_of_a_hub_model_is_refused_before_anything_is_loaded(
    tmp_path: Path, small_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline

    folder = edited(
        small_teacher, tmp_path / "a", "model_index.json", lambda index: {**index, "unet": ["mine", "Mine"]}
    )
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *a, **k: str(folder))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=r"owner/name has a custom class for its unet \(mine\.Mine\)"):
        load_pipeline("owner/name")


@pytest.mark.parametrize(
    "value", [["stable_diffusion", "StableDiffusionSafetyChecker"], [None, None], ["diffusers", "X"]]
)
def test_parts_of_the_known_libraries_may_be_named(value: list[Any]) -> None:
    check_classes("it", {"_class_name": "StableDiffusionPipeline", "safety_checker": value})


def as_variant(folder: Path) -> Path:
    for part, name in WEIGHTS.items():
        (folder / part / name).rename(folder / part / name.replace(".safetensors", ".fp16.safetensors"))
    return folder


def test_weights_of_a_variant_only_name_the_option(command: Command, small_teacher: Path, tmp_path: Path) -> None:
    folder = as_variant(Path(shutil.copytree(small_teacher, tmp_path / "teacher")))
    with pytest.raises(UsageError, match="weights of the variant fp16 only; pass --variant fp16"):
        load_teacher(str(folder))
    expected = load_teacher(str(small_teacher)).fingerprint(with_network=True)
    assert load_teacher(str(folder), variant="fp16").fingerprint(with_network=True) == expected
    assert "needs --variant fp16" in dict(describe(str(folder)))["unet"]
    # `sample` has no such option, and takes what is there.
    code, _, error = command("sample", folder, "--prompt", "a", "--steps", 1, "--resolution", 16)
    assert (code, error) == (0, "")


def test_a_square_sample_size_may_be_a_list(small_teacher: Path, tmp_path: Path) -> None:
    folder = edited(small_teacher, tmp_path / "a", "unet/config.json", lambda config: {**config, "sample_size": [8, 8]})
    teacher = load_teacher(str(folder))
    assert teacher.usual["data.resolution"] == load_teacher(str(small_teacher)).usual["data.resolution"] == 16
    assert teacher.network.config.sample_size == 8
    assert dict(describe(str(folder)))["resolution"] == "16 px"


def test_pickled_weights_in_parts_are_loaded_on_request(small_teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_teacher, tmp_path / "teacher"))
    for part, name in WEIGHTS.items():
        tensors = load_file(folder / part / name)
        (folder / part / name).unlink()
        stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
        keys, where = sorted(tensors), {}
        for i, some in enumerate((keys[::2], keys[1::2]), 1):
            file = f"{stem}-{i:05d}-of-00002.bin"
            torch.save({key: tensors[key] for key in some}, folder / part / file)
            where |= dict.fromkeys(some, file)
        (folder / part / f"{stem}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with pytest.raises(UsageError, match="holds pickled weights only"):
        load_teacher(str(folder))
    expected = load_teacher(str(small_teacher)).fingerprint(with_network=True)
    assert load_teacher(str(folder), allow_pickle=True).fingerprint(with_network=True) == expected


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vae", {"scaling_factor": math.nan}, "scaling_factor of its vae is nan"),
        ("vae", {"scaling_factor": None}, "scaling_factor of its vae is None"),
        ("vae", {"scaling_factor": 0}, "scaling_factor of its vae is 0"),
        ("vae", {"shift_factor": "x"}, "shift_factor of its vae is 'x'"),
        ("vae", {"latents_mean": [0.5] * 4}, "a VAE with latents_mean, a scale per channel"),
        ("unet", {"sample_size": "x"}, "sample_size of its unet is 'x'"),
        ("unet", {"sample_size": 10**9}, "sample_size of its unet is 1000000000"),
        ("scheduler", {"beta_start": math.nan}, "beta_start of its scheduler is nan"),
        ("scheduler", {"beta_end": math.inf}, "betas of its scheduler is 'NaN'"),
        ("scheduler", {"num_train_timesteps": 0}, "cannot be loaded as a diffusers pipeline"),
    ],
)
def test_settings_that_no_model_can_have_are_refused(
    small_teacher: Path, tmp_path: Path, part: str, values: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(small_teacher, tmp_path / "teacher"))
    path = folder / part / f"{'scheduler_' * (part == 'scheduler')}config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(UsageError, match=message):
        load_teacher(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_teacher_with_nan_is_refused_when_it_is_loaded(small_teacher: Path, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(small_teacher, tmp_path / "teacher"))
    path = folder / part / WEIGHTS[part]
    tensors = load_file(path)
    tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"the weights of its {part} contain NaN or Inf"):
        load_teacher(str(folder))


@pytest.mark.parametrize(("part", "name"), [("unet", "config.json"), ("scheduler", "scheduler_config.json")])
@pytest.mark.parametrize(("text", "message"), [("[]", "is not a table of settings"), ("{", "cannot be read as JSON")])
def test_a_damaged_configuration_is_named(
    part: str, name: str, text: str, message: str, small_teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_teacher, tmp_path / "teacher")
    (folder / part / name).write_text(text)
    with pytest.raises(UsageError, match=f"{part}/{name} {message}.*; restore the file"):
        load_pipeline(str(folder))


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_a_byte_order_mark_is_named(name: str, small_teacher: Path, tmp_path: Path) -> None:
    """diffusers and transformers do not read such a file, and do not say which it is."""
    folder = shutil.copytree(small_teacher, tmp_path / "teacher")
    path = folder / name
    if not path.exists():
        pytest.skip("this version of transformers writes no such file")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(
        UsageError, match=f"{re.escape(str(path))} starts with a byte-order mark.*save the file as UTF-8"
    ):
        load_pipeline(str(folder))
    path.write_bytes(path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode().encode("utf-16"))
    with pytest.raises(UsageError, match=f"{re.escape(str(path))} cannot be read as JSON"):
        load_pipeline(str(folder))


def test_settings_that_a_library_refuses_end_in_a_sentence(small_teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_teacher, tmp_path / "teacher")
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": "many"}))
    with pytest.raises(UsageError, match=r"cannot be loaded as a diffusers pipeline: .*(vocab_size|'size')"):
        load_pipeline(str(folder))
    path.unlink()
    with pytest.raises(UsageError, match=r"text_encoder is incomplete: it has weights and no config\.json"):
        load_pipeline(str(folder))


WORDS, MERGES = (
    {"a": 0, "b</w>": 1, "c": 2, "ab</w>": 3, "cab</w>": 4, "<|end|>": 5},
    "#version: 0.2\na b</w>\nc ab</w>\n",
)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it has no vocab.json and no merges.txt and no tokenizer_config.json"),
        ({"tokenizer_config.json": "{}"}, "it has no vocab.json and no merges.txt"),
        ({"vocab.json": json.dumps(WORDS), "tokenizer_config.json": "{}"}, "it has no merges.txt"),
        ({"tokenizer.json": "{}"}, "it has no tokenizer_config.json"),
        (
            {"merges.txt": MERGES.partition("c ab")[0]},
            r"merges.txt does not belong to vocab.json \(1 words have no merge\)",
        ),
        (
            {"merges.txt": MERGES.replace("c", "a")},
            r"merges.txt does not belong to vocab.json \('a ab</w>' makes no word\)",
        ),
        ({"merges.txt": MERGES}, None),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, None),
        ({"spiece.model": "", "tokenizer_config.json": "{}"}, None),
    ],
)
def test_a_tokenizer_without_its_whole_vocabulary_is_refused(
    files: dict[str, str], message: str | None, tmp_path: Path
) -> None:
    """transformers makes a tokenizer of nothing, which reads every word as the same one."""
    if "merges.txt" in files:
        files = {"vocab.json": json.dumps(WORDS), "tokenizer_config.json": "{}", **files}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if message is None:
        _check_tokenizer(tmp_path)
    else:
        with pytest.raises(UsageError, match=message):
            _check_tokenizer(tmp_path)
