"""Runs whose teacher is a base with two LoRAs: what they record and write, and the LoRA that runs on the plain base."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcmdistill.config.recorded import read_run_config
from lcmdistill.export import registry as exporting
from lcmdistill.export.verify import difference
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.sampling.generate import find_model, generate, load_student
from lcmdistill.teachers.loading import load_pipeline
from lcmdistill.training.preflight import dry_run
from lcmdistill.utils.checkpoint import load_checkpoint, save_checkpoint
from lcmdistill.utils.errors import UsageError
from tests.support.lora import disturb
from tests.support.lora_files import outputs, two_loras
from tests.support.lycoris import lycoris_file
from tests.support.models import opened
from tests.support.runs import distill, resolve
from tests.support.teachers import SMALL


def settings_of(folder: Path, base: Path, images: Path, loras: tuple[str, ...], **more: Any) -> dict[str, Any]:
    settings = {**SMALL, "teacher.model": str(base), "teacher.loras": loras, "data.sources": (str(images),)}
    settings |= {"data.cache_dir": str(folder / "cache"), "optim.max_train_steps": 2}
    return settings | {key.replace("__", "."): value for key, value in more.items()}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory, small_teacher: Path) -> tuple[str, ...]:
    """A LoCon and a LoRA with layers of the text encoder, with scales."""
    first, second = two_loras(small_teacher, tmp_path_factory.mktemp("loras"))
    return f"{first}:0.5", f"{second}:0.8"


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, small_teacher: Path, image_folder: Path, loras: tuple[str, ...]
) -> dict[str, Path]:
    """Three finished runs: a full student, and a LoRA relative to its teacher and to the base."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, more in (
        ("full", {}),
        ("teacher", {"student__kind": "lora", "student__rank": 2}),
        ("base", {"student__kind": "lora", "student__rank": 2, "student__lora_relative_to": "base"}),
    ):
        flags = settings_of(folder, small_teacher, image_folder, loras, **more)
        found[name] = distill(resolve({}, {**flags, "run.output": str(folder / name)}))
        if name != "full":  # as after a long training
            groups, state = load_checkpoint(found[name] / "checkpoints" / "step-00000002")
            disturb(groups["target"] or groups["student"])
            save_checkpoint(found[name] / "checkpoints", 2, groups, state)
    return found


def image(folder: Path) -> bytes:
    """An image of a run, as `lcmdistill sample` generates it."""
    found = find_model(str(folder))
    device = torch.device("cpu")
    student = load_student(found.path, device, found.loras, options=found.options, scheduler=found.scheduler)
    return generate(student, ["red heart"], [0], steps=2, guidance_scale=1.0)[0].image.tobytes()


def test_a_run_records_its_loras_and_exports_the_fused_teacher(
    runs: dict[str, Path], small_teacher: Path, loras: tuple[str, ...]
) -> None:
    config = read_run_config(runs["full"], OBJECTIVES)
    assert config is not None
    assert config.teacher.loras == loras
    checksums = config.teacher.lora_checksums
    assert checksums is not None
    assert [len(checksum) for checksum in checksums] == [64, 64]
    card = (runs["full"] / "README.md").read_text()
    assert "with the LoRA locon.safetensors (0.5) and style.safetensors (0.8) with lcmdistill" in card
    assert (
        f"`style.safetensors` was fused into the teacher at scale 0.8 (SHA-256 `{checksums[1][:10]}`); this student"
        in card
    )
    assert str(Path(loras[0]).parent) not in card
    fused, saved = load_pipeline(str(small_teacher), loras=loras), opened(runs["full"] / "pipeline")
    for name, value in fused.text_encoder.state_dict().items():
        assert torch.equal(value, saved.text_encoder.state_dict()[name]), name
    assert len(image(runs["full"])) == 16 * 16 * 3


def test_the_card_of_a_lora_says_what_it_is_used_with(runs: dict[str, Path]) -> None:
    relative, whole = ((runs[name] / "README.md").read_text() for name in ("teacher", "base"))
    assert "; load them together with this LoRA" in relative
    assert 'pipeline.load_lora_weights("style.safetensors")\npipeline.fuse_lora(lora_scale=0.8)' in relative
    assert "Load Checkpoint, Load LoRA locon.safetensors at strength 0.5, Load LoRA style.safetensors at" in relative
    assert "<lora:locon:0.5> <lora:style:0.8> <lora:teacher:1>" in relative
    assert "; this student contains them" in whole
    assert "style.safetensors at strength" not in whole
    assert "fuse_lora" not in whole


def test_a_lora_of_the_base_is_the_one_of_the_teacher_with_its_loras(runs: dict[str, Path]) -> None:
    """Without the fp16 of its file, which the exports below leave out, the images are the same."""
    a, b = (torch.frombuffer(bytearray(image(runs[name])), dtype=torch.uint8).float() for name in ("teacher", "base"))
    assert (a - b).abs().max() <= 3
    assert find_model(str(runs["base"])).options["loras"] is None
    assert find_model(str(runs["teacher"])).options["loras"] is not None


@pytest.mark.parametrize("form", ["kohya", "diffusers-lora"])
def test_it_runs_on_the_plain_base_in_diffusers(
    form: str, runs: dict[str, Path], small_teacher: Path, loras: tuple[str, ...], tmp_path: Path
) -> None:
    """Its export has checked the network; here the text encoder is compared, too."""
    name = "it.safetensors" if form == "kohya" else "it"
    options: dict[str, Any] = {"dtype": "fp32", "guidance_scale": None, "verify": True}
    exporting.export(runs["base"], form, tmp_path / name, **options)
    exporting.export(runs["teacher"], form, tmp_path / f"relative-{name}", **options)
    whole, fused = opened(small_teacher), load_pipeline(str(small_teacher), loras=loras)
    for pipeline, file in ((whole, tmp_path / name), (fused, tmp_path / f"relative-{name}")):
        weights = file.name if form == "kohya" else "pytorch_lora_weights.safetensors"
        pipeline.load_lora_weights(str(file.parent if form == "kohya" else file), weight_name=weights)
    expected = outputs(fused)
    for part, values in outputs(whole).items():
        assert difference(values, expected[part]) < 1e-4, part


def test_a_format_without_text_encoders_refuses_them(runs: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "fp32", "guidance_scale": None, "verify": True}
    with pytest.raises(
        UsageError, match="--format peft holds the network only, and the teacher's LoRAs also change the text"
    ):
        exporting.export(runs["base"], "peft", tmp_path / "it", **options)
    exporting.export(runs["teacher"], "peft", tmp_path / "relative", **options)


def test_a_lora_that_contains_its_teachers_loras_starts_no_run(
    runs: dict[str, Path], tmp_path: Path, small_teacher: Path, image_folder: Path, loras: tuple[str, ...]
) -> None:
    more = {"student__kind": "lora", "student__rank": 2, "student__start": str(runs["base"])}
    flags = settings_of(tmp_path, small_teacher, image_folder, loras, **more)
    with pytest.raises(UsageError, match=r"contains the LoRAs of its teacher .* would add them twice"):
        distill(resolve({}, {**flags, "run.output": str(tmp_path / "run")}))
    flags = {**flags, "student.start": str(runs["teacher"]), "optim.max_train_steps": 1}
    assert distill(resolve({}, {**flags, "run.output": str(tmp_path / "run")})).is_dir()


def test_a_changed_lora_is_refused_by_everything_that_opens_the_run(
    tmp_path: Path, small_teacher: Path, image_folder: Path
) -> None:
    file, _ = two_loras(small_teacher, tmp_path)
    flags = settings_of(tmp_path, small_teacher, image_folder, (str(file),), student__kind="lora", student__rank=2)
    flags |= {"run.output": str(tmp_path / "run"), "optim.max_train_steps": 1}
    run = distill(resolve({}, flags))
    resumed = {**flags, "optim.max_train_steps": 2}
    distill(resolve({}, resumed))
    save_file({key: 2 * value for key, value in load_file(file).items()}, file)
    with pytest.raises(UsageError, match=r"a LoRA of the teacher has changed since the run in .* started"):
        distill(resolve({}, {**resumed, "optim.max_train_steps": 3}))
    with pytest.raises(UsageError, match=r"--teacher-lora .*locon\.safetensors has changed"):
        image(run)
    with pytest.raises(UsageError, match=r"teacher\.loras"):
        distill(resolve({}, {**resumed, "teacher.loras": (f"{file}:0.5",), "optim.max_train_steps": 3}))


def test_a_dry_run_names_the_loras(
    tmp_path: Path, small_teacher: Path, image_folder: Path, loras: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    flags = settings_of(tmp_path, small_teacher, image_folder, loras)
    with caplog.at_level(logging.INFO):
        dry_run(resolve({}, {**flags, "run.output": str(tmp_path / "run")}))
    assert "small with locon.safetensors (0.5) and style.safetensors (0.8), epsilon-predicting" in caplog.text


def test_what_a_lora_cannot_contain_is_refused_before_training(
    tmp_path: Path, small_teacher: Path, image_folder: Path
) -> None:
    save_file(lycoris_file(opened(small_teacher).unet, "LoKr"), tmp_path / "lokr.safetensors")
    more = {"student__kind": "lora", "student__rank": 2, "student__lora_relative_to": "base"}
    flags = settings_of(tmp_path, small_teacher, image_folder, (str(tmp_path / "lokr.safetensors"),), **more)
    config = resolve({}, {**flags, "run.output": str(tmp_path / "run")})
    with pytest.raises(
        UsageError, match=r"lokr\.safetensors is of the kind LoKr, which a LoRA cannot contain exactly; use"
    ):
        distill(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"teacher.loras": ("a.safetensors:strong",)}, "the scale is 'strong' and must be a number"),
        ({"student.kind": "lora", "student.lora_relative_to": "base"}, "is base, but the teacher has no LoRAs"),
        ({"teacher.lora_checksums": ("00",)}, "lora_checksums is set, but the teacher has no LoRAs"),
    ],
)
def test_settings_without_effect_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve({}, flags)
