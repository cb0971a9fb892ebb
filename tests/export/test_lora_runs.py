"""The LoRA student: the teacher bit for bit with the adapter off, the published sizes, and files that keep the update."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from lcmdistill.cli import app
from lcmdistill.config.resolve import with_values
from lcmdistill.config.toml import read_toml
from lcmdistill.export import registry as exporting
from lcmdistill.export.base import ExportRequest
from lcmdistill.export.lora_formats import export_peft, header
from lcmdistill.export.trained_student import load_trained_student
from lcmdistill.export.verify import network_inputs, network_output
from lcmdistill.hub.model_card import model_card, write_run_card
from lcmdistill.sampling.generate import find_model, load_student, scheduler_for_loras
from lcmdistill.students.build import make_student
from lcmdistill.students.lora import ONLINE, TARGET
from lcmdistill.students.lora_files import SCHEDULER_KEY
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.lora.adapters import adapter_parameters, choose_adapter, lora_layers
from lcmdistill.teachers.lora.files import load_lora
from lcmdistill.teachers.registry import FAMILIES
from lcmdistill.utils.checkpoint import load_checkpoint, save_checkpoint
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import checkpoints
from tests.support.lora import disturb, lora_student
from tests.support.models import BUILDERS, opened
from tests.support.runs import resolve
from tests.support.teachers import Command


def unet_step(unet: Any) -> torch.Tensor:
    return network_output(FAMILIES["sd"], unet, network_inputs(FAMILIES["sd"], unet, 1.0))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, small_teacher: Path, image_folder: Path) -> Path:
    """A finished distill-lora run with alpha != rank, its checkpoint's adapter replaced by one that is far from zero."""
    run = tmp_path_factory.mktemp("lora") / "run"
    words = ["distill-lora", "--teacher", str(small_teacher), "--data", str(image_folder), "--resolution", "16"]
    words += ["--rank", "4", "--alpha", "3", "--target", "ema", "--max-train-steps", "2", "--batch-size", "2"]
    words += ["--gradient-accumulation-steps", "1", "--output", str(run), "--set", "run.log_every=1"]
    words += ["--set", f"data.cache_dir={run.parent / 'cache'}"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    groups, state = load_checkpoint(run / "checkpoints" / "step-00000002")
    disturb(groups["target"])
    save_checkpoint(run / "checkpoints", 2, groups, state)
    return run


def test_a_run_writes_a_kohya_file_and_a_card(lora_run: Path):
    (path,) = (lora_run / "lora").glob("*.safetensors")
    tensors = load_file(path)
    assert all(key.startswith("lora_unet_") for key in tensors)
    assert all(value.dtype == torch.float16 for value in tensors.values())
    alphas = {float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    assert alphas == {3.0}
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["ss_network_dim"] == "4"
    assert header["ss_network_alpha"] == "3"
    assert "omega 7.5" in header["modelspec.description"]
    assert "guidance scale 8.5" in header["modelspec.description"]
    assert header["lcmdistill.scheduler"] == "LCMScheduler"
    card = (lora_run / "README.md").read_text()
    assert "load_lora_weights" in card
    assert (lora_run / "lora" / "README.md").read_text() == card
    shown = yaml.safe_load(card.split("---\n")[1])["widget"]
    captions = (lora_run / "captions.json").read_text()
    assert len(shown) == 4
    assert all(f'"{each["text"]}"' in captions for each in shown)  # the user's own
    places = [each["output"]["url"] for each in shown]
    assert [place for place in places if not (lora_run / "lora" / place).is_file()] == []
    (grid,) = re.findall(r"\]\((samples/step-\S+)\)", card)
    assert (lora_run / "lora" / grid).is_file()


def python_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


def test_the_code_on_a_card_runs(lora_run: Path, small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in (lora_run, small_teacher):  # what lies on this machine is called by its name
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(python_of((lora_run / "README.md").read_text()), found)
    assert found["image"].size == (16, 16)


@pytest.mark.parametrize(
    ("alias", "stands_for", "licence"),
    [
        ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"),
        ("tiny", "tiny", "apache-2.0"),
        ("small", "small", None),
        ("/opt/models/my model.safetensors", "my model.safetensors", None),
    ],
)
def test_published_files_have_a_name_and_a_license_and_no_local_path(
    lora_run: Path, tmp_path: Path, small_teacher: Path, alias: str, stands_for: str, licence: str | None
):
    alias = str(small_teacher) if alias == "small" else alias
    product = load_trained_student(lora_run)
    assert product.lora is not None
    own = {"teacher.model": alias, "student.kind": "lora", "run.validation_guidance_scale": 1.0}
    own |= {
        "data.sources": ("/home/me/pictures", "https://me:secret@host/a.tar?key=secret"),
        "run.output": "/home/me/runs/x",
    }
    config = resolve({}, {**own, "run.push_to_hub": "me/mine"})
    metadata = header(product.lora, config, "it", product.base_pipeline())
    assert (metadata["ss_sd_model_name"], metadata["modelspec.author"]) == (stands_for, "me")
    assert metadata.get("modelspec.license") == licence
    card = model_card(config, Path("x"), product.teacher())
    assert f"distilled from `{stands_for}`" in card
    opened = {"tiny": '"lcmdistill") / "assets" / "tiny"'}.get(alias, f'"{stands_for}"')
    assert opened in python_of(card)
    assert (".from_single_file(" in python_of(card)) == stands_for.endswith(".safetensors")
    assert ("base_model: stable-diffusion-v1-5/stable-diffusion-v1-5" in card) == (alias == "sd15")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front.get("license") == licence
    assert (f"The license is the teacher's: {licence}." in card) == (licence is not None)
    for text in (card, json.dumps(metadata)):
        assert "/home/me" not in text
        assert "secret" not in text
        assert str(small_teacher.parent) not in text
        assert "/opt" not in text
    recorded = with_values(product.config, {"teacher.model": alias})
    request = ExportRequest(tmp_path / "peft", torch.float32, 1.0, verify=False)
    export_peft(replace(product, config=recorded), request)
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == stands_for


@pytest.mark.parametrize(
    ("layout", "architecture", "version", "is_v2"),
    [
        ("sd1", "stable-diffusion-v1/lora", "sd_v1", "False"),
        ("sd2", "stable-diffusion-v2-768-v/lora", "sd_v2_v", "True"),
        ("sdxl", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False"),
    ],
)
def test_the_header_tells_the_bases_architecture(
    lora_run: Path, tmp_path: Path, layout: str, architecture: str, version: str, is_v2: str
):
    product = load_trained_student(lora_run)
    assert product.lora is not None
    metadata = header(product.lora, product.config, "it", opened(BUILDERS[layout](tmp_path / "base")))
    assert metadata["modelspec.architecture"] == architecture
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == (version, is_v2)


def test_the_exporters_verification_can_fail(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lcmdistill.export import lora_writers as lora_files
    from lcmdistill.utils.errors import RunError

    whole = lora_files.kohya_tensors

    def without_alpha(lora: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {k: v for k, v in whole(lora, dtype).items() if not k.endswith(".alpha")}

    monkeypatch.setattr(lora_files, "kohya_tensors", without_alpha)
    with pytest.raises(RunError, match="does not reproduce the trained model"):
        exporting.export(lora_run, "kohya", tmp_path / "a.safetensors", dtype="fp32", guidance_scale=None, verify=True)
    assert not list(tmp_path.iterdir()), "a file that failed its check must not stay"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_small_lora_that_is_lost_is_noticed_in_half_precision(
    lora_run: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    """It adds less than a whole model's weights lose by being rounded."""
    from lcmdistill.export import lora_writers as lora_files
    from lcmdistill.export import trained_student as product
    from lcmdistill.utils.errors import RunError

    loaded = product.from_checkpoint

    def little(tensors: Any, alpha: float) -> Any:
        return {path: replace(layer, up=1e-4 * layer.up) for path, layer in loaded(tensors, alpha).items()}

    monkeypatch.setattr(product, "from_checkpoint", little)
    options: dict[str, Any] = {"dtype": dtype, "guidance_scale": None, "verify": True}
    output = exporting.export(lora_run, "kohya", tmp_path / "whole.safetensors", **options)
    assert "reloaded, largest difference" in output
    whole = lora_files.kohya_tensors

    def without_ups(lora: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {k: v * ("lora_up" not in k) for k, v in whole(lora, dtype).items()}

    monkeypatch.setattr(lora_files, "kohya_tensors", without_ups)
    with pytest.raises(RunError, match="does not reproduce the trained model"):
        exporting.export(lora_run, "kohya", tmp_path / "lost.safetensors", **options)


@pytest.mark.parametrize("name", ["kohya", "diffusers-lora", "peft"])
def test_sample_loads_every_kind_of_lora(name: str, lora_run: Path, tmp_path: Path):
    output = tmp_path / ("out.safetensors" if name == "kohya" else "out")
    exporting.export(lora_run, name, output, dtype="fp32", guidance_scale=None, verify=False)
    product = load_trained_student(lora_run)
    pipeline = product.base_pipeline()
    load_lora(pipeline, str(output), "it")
    expected = unet_step(product.pipeline().unet)
    assert torch.allclose(unet_step(pipeline.unet), expected, atol=1e-5 * float(expected.abs().max()))


def test_a_lora_of_another_base_is_refused_with_counts(lora_run: Path, tmp_path: Path):
    from safetensors.torch import save_file

    (path,) = (lora_run / "lora").glob("*.safetensors")
    tensors = {k.replace("mid_block", "other_block"): v for k, v in load_file(path).items()}
    save_file(tensors, tmp_path / "other.safetensors")
    absent = sum("other_block" in key and key.endswith(".alpha") for key in tensors)
    with pytest.raises(UsageError, match=f"{absent} of its layers are absent"):
        load_lora(load_trained_student(lora_run).base_pipeline(), str(tmp_path / "other.safetensors"), "it")


def test_formats_that_a_lora_run_cannot_be(lora_run: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="use --format fused"):
        exporting.export(lora_run, "pipeline", tmp_path / "a", dtype="fp16", guidance_scale=None, verify=True)


def test_a_half_precision_pipeline_generates_without_a_dtype(lora_run: Path, tmp_path: Path):
    from diffusers import DiffusionPipeline

    exporting.export(lora_run, "fused", tmp_path / "half", dtype="fp16", guidance_scale=None, verify=True)
    assert all(v.dtype == torch.float16 for v in load_file(tmp_path / "half/text_encoder/model.safetensors").values())
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "half")
    image = pipeline("a red apple", num_inference_steps=1, guidance_scale=1.0, height=16, width=16).images[0]
    assert image.size == (16, 16)


def test_a_run_of_the_lora_alone_samples(lora_run: Path, tmp_path: Path):
    words = ["sample", str(lora_run), "--steps", "2", "--prompt", "a red apple", "--output", str(tmp_path / "s")]
    result = CliRunner().invoke(app, [*words, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "guidance scale 1" in result.output


def test_a_run_that_goes_on_under_another_name_has_one_lora(lora_run: Path, tmp_path: Path):
    run = tmp_path / "renamed"
    shutil.copytree(lora_run, run)
    config = resolve(read_toml(run / "config.toml"), {"run.output": str(run)})
    teacher = load_teacher(config.teacher.model)
    student = make_student(teacher, config.student, dtype=torch.float32, seed=0, checkpointing=False)
    exporting.write_trained_student(config, run, teacher, student, "")
    write_run_card(config, run, teacher)
    assert sorted(path.name for path in (run / "lora").iterdir()) == [
        ".checksums.json",
        "README.md",
        "renamed.safetensors",
        "samples",
    ]
    assert find_model(str(run)).loras == (str(run / "lora" / "renamed.safetensors"),)


def test_another_lora_in_a_run_folder_is_not_used(lora_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    for words, message in [
        (("kohya", run / "lora" / "again.safetensors"), "is in a folder that the run itself writes"),
        (("peft", run / "samples" / "peft"), "is in a folder that the run itself writes"),
    ]:
        with pytest.raises(UsageError, match=message):
            exporting.export(run, *words, dtype="fp32", guidance_scale=None, verify=False)
    exporting.export(run, "peft", run / "peft", dtype="fp32", guidance_scale=None, verify=False)
    (run / "lora" / ".run.partial.safetensors").touch()  # of a process that was killed
    assert len(find_model(str(run)).loras) == 1
    shutil.copy(run / "lora" / "run.safetensors", run / "lora" / "style.safetensors")
    for use in (lambda: find_model(str(run)), lambda: load_trained_student(run)):
        with pytest.raises(UsageError, match=r"lora contains 2 LoRAs \(run.safetensors, style.safetensors\)"):
            use()


def test_a_lora_without_its_checkpoints_is_not_called_unfinished(lora_run: Path, tmp_path: Path):
    shutil.copytree(lora_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UsageError, match=r"holds no checkpoint.* or use \S+run.safetensors as it is"):
        load_trained_student(tmp_path / "run")


def test_a_run_of_a_lora_is_found_with_its_teachers_own_files(lora_run: Path, tmp_path: Path):
    shutil.copytree(lora_run, tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    text = config.read_text().replace("[teacher]\n", '[teacher]\nrevision = "r"\nvariant = "fp16"\n')
    config.write_text(text + "# checksum: any\n")
    found = find_model(str(tmp_path / "run"))
    usual = {"allow_pickle": False, "vae_dtype": "fp32", "vae_tiling": False}
    options = {key: value for key, value in found.options.items() if value is not None}
    assert options == {"revision": "r", "variant": "fp16", **usual}


def test_two_loras_at_once_add_up(lora_run: Path):
    (path,) = (lora_run / "lora").glob("*.safetensors")
    pipeline = load_trained_student(lora_run).base_pipeline()
    bare = unet_step(pipeline.unet)
    load_lora(pipeline, str(path), "a")
    load_lora(pipeline, str(path), "b")
    pipeline.set_adapters(["a", "b"], [0.5, 0.5])
    half_and_half = unet_step(pipeline.unet)
    pipeline.set_adapters(["a"], [1.0])
    one = unet_step(pipeline.unet)
    assert torch.allclose(half_and_half, one, atol=1e-4)
    assert not torch.allclose(one, bare, atol=1e-6)


def test_choosing_an_adapter_moves_no_weights(small_teacher: Path):
    _, student = lora_student(small_teacher, target="ema")
    before = {k: v.clone() for k, v in adapter_parameters(student.network, TARGET).items()}
    for name in (ONLINE, None, TARGET, ONLINE):
        choose_adapter(lora_layers(student.network).values(), name)
    assert all(torch.equal(before[k], v) for k, v in adapter_parameters(student.network, TARGET).items())


@pytest.mark.parametrize(
    ("first", "second", "scheduler_of_second", "chosen", "is_reported"),
    [
        ("TCDScheduler", None, "DDIMScheduler", "TCDScheduler", False),
        (None, "TCDScheduler", "DDIMScheduler", "TCDScheduler", False),
        (None, None, "DDIMScheduler", "LCMScheduler", False),
        (None, None, "TCDScheduler", "TCDScheduler", False),
        ("LCMScheduler", "TCDScheduler", "DDIMScheduler", "LCMScheduler", True),
    ],
)
@pytest.mark.parametrize("name", ["kohya", "diffusers-lora", "peft"])
def test_a_lora_is_sampled_with_the_scheduler_of_its_header(
    first: str | None,
    second: str | None,
    scheduler_of_second: str,
    chosen: str,
    is_reported: bool,
    name: str,
    lora_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    from safetensors.torch import save_file

    loras = []
    for i, scheduler in enumerate((first, second)):
        place = tmp_path / f"{i}"
        output = place / "out.safetensors" if name == "kohya" else place
        exporting.export(lora_run, name, output, dtype="fp32", guidance_scale=None, verify=False)
        (file,) = place.glob("*.safetensors")
        with safe_open(file, framework="pt") as opened_file:
            values = dict(opened_file.metadata())
        assert values.pop(SCHEDULER_KEY) == "LCMScheduler"
        save_file(load_file(file), file, metadata={**values, **({SCHEDULER_KEY: scheduler} if scheduler else {})})
        loras.append(str(output))
    assert scheduler_for_loras(loras, scheduler_of_second) == chosen
    printed = capsys.readouterr().out
    assert ("is for a TCDScheduler, and" in printed) == is_reported
    if scheduler_of_second == "DDIMScheduler" and not is_reported:
        pipeline = load_student(load_trained_student(lora_run).config.teacher.model, torch.device("cpu"), loras)
        assert type(pipeline.scheduler).__name__ == chosen


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_best_validation_s_weights_are_exported_on_request(
    kind: str, lora_run: Path, small_run: Path, tmp_path: Path, command: Command
):
    from lcmdistill.training.best import keep_best

    run = tmp_path / "run"
    shutil.copytree(lora_run if kind == "lora" else small_run, run)
    shutil.rmtree(run / "checkpoints" / "best", ignore_errors=True)
    name, output = ("fused", tmp_path / "last") if kind == "lora" else ("pipeline", tmp_path / "last")
    words = ["export", run, "--format", name, "--dtype", "fp32"]
    code, _, error = command(*words, "--weights", "best", "--output", tmp_path / "none")
    assert (code, "has no best checkpoint" in error) == (2, True)

    last = load_trained_student(run)
    groups, _ = load_checkpoint(checkpoints(run / "checkpoints")[-1])
    better = {key: value + 0.05 for key, value in groups["target"].items()}
    (run / "metrics.jsonl").write_text('{"step": 1, "val/ssim_4": 0.9}\n')
    keep_best(run, "ssim_4", 1, better)
    for weights in ("last", "best"):
        output = tmp_path / weights
        code, printed, error = command(*words, "--weights", weights, "--output", output)
        assert (code, error) == (0, "")
        assert "largest difference" in printed
    files = [tmp_path / weights / "unet/diffusion_pytorch_model.safetensors" for weights in ("last", "best")]
    of_last, of_best = map(load_file, files)
    assert any(not torch.equal(of_last[key], of_best[key]) for key in of_last)
    if kind == "full":
        assert all(torch.equal(of_best[key], value) for key, value in better.items())
        assert all(torch.equal(of_last[key], value) for key, value in last.pipeline().unet.state_dict().items())
