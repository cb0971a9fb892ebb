"""ONNX exports: the names and shapes that pipelines expect, the same numbers as torch, and nothing half-written."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcmdistill import cli
from lcmdistill.diffusion.consistency import omega_embedding
from lcmdistill.export import onnx as onnx_files
from lcmdistill.export import registry as export
from lcmdistill.export.trained_student import load_trained_student
from lcmdistill.export.verify import network_output
from lcmdistill.hub.model_card import put_export_card
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.finished_runs import finished_run
from tests.support.teachers import build_teacher

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra onnx is not installed",
)

OPTIONS: dict[str, Any] = {"dtype": "fp16", "guidance_scale": None, "verify": True}


@pytest.fixture(scope="module")
def shallow_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with one cross-attention layer on the way down only: tracing takes seconds per layer."""
    blocks = {"mid_block_type": None, "up_block_types": ("UpBlock2D", "UpBlock2D")}
    return build_teacher(tmp_path_factory.mktemp("shallow") / "shallow", **blocks)


@pytest.fixture(scope="module")
def full_run(shallow_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(shallow_teacher, "full", tmp_path_factory.mktemp("full") / "run")


@pytest.fixture(scope="module")
def lora_run(shallow_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(shallow_teacher, "lora", tmp_path_factory.mktemp("lora") / "run")


@pytest.fixture(scope="module")
def full_export(full_run: Path) -> tuple[Path, str]:
    """The folder of a full student's graphs, and the sentence about it."""
    output = full_run.parent / "onnx"
    return output, export.export(full_run, "onnx", output, **OPTIONS, write_card=put_export_card)


@pytest.fixture(scope="module")
def lora_export(lora_run: Path) -> tuple[Path, str]:
    """The folder of a fused LoRA's graphs, and the sentence about it."""
    output = lora_run.parent / "onnx"
    return output, export.export(lora_run, "onnx", output, **OPTIONS)


def session(folder: Path, part: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(folder / part / "model.onnx", providers=["CPUExecutionProvider"])


def names(values: list[Any]) -> list[str]:
    return [value.name for value in values]


@needs_onnx
def test_the_folder_is_laid_out_as_onnx_pipelines_expect(full_export: tuple[Path, str]) -> None:
    folder, sentence = full_export
    assert "largest difference" in sentence
    graphs = {str(path.parent.relative_to(folder)) for path in folder.rglob("model.onnx")}
    assert graphs == {"unet", "text_encoder", "vae_decoder"}
    assert all((folder / name / "config.json").is_file() for name in graphs)
    assert (folder / "tokenizer" / "vocab.json").is_file()
    assert (folder / "scheduler" / "scheduler_config.json").is_file()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "ORTLatentConsistencyModelPipeline"
    assert json.loads((folder / "unet" / "config.json").read_text())["time_cond_proj_dim"] == 256
    # optimum takes the latents' scale from here
    assert json.loads((folder / "vae_decoder" / "config.json").read_text())["scaling_factor"] == 0.5
    assert "ORTLatentConsistencyModelPipeline" in (folder / "README.md").read_text()


@needs_onnx
def test_the_graphs_have_the_usual_inputs_and_outputs(full_export: tuple[Path, str]) -> None:
    import onnx

    folder = full_export[0]
    unet, text, vae = (session(folder, name) for name in ("unet", "text_encoder", "vae_decoder"))
    assert names(unet.get_inputs()) == ["sample", "timestep", "encoder_hidden_states", "timestep_cond"]
    assert [value.type for value in unet.get_inputs()] == ["tensor(float)", "tensor(int64)", *["tensor(float)"] * 2]
    assert unet.get_inputs()[0].shape == ["batch", 4, "height", "width"]
    assert names(unet.get_outputs()) == ["out_sample"]
    assert [(v.name, v.type) for v in text.get_inputs()] == [("input_ids", "tensor(int32)")]
    assert names(text.get_outputs()) == ["last_hidden_state", "pooler_output"]
    assert (names(vae.get_inputs()), names(vae.get_outputs())) == (["latent_sample"], ["sample"])
    model = onnx.load(folder / "unet" / "model.onnx")
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]


@needs_onnx
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12)])
@pytest.mark.parametrize("batch", [1, 2, 5])
@torch.no_grad()
def test_the_graphs_give_torch_s_numbers(
    batch: int, height: int, width: int, full_run: Path, full_export: tuple[Path, str]
) -> None:
    pipeline, folder, rng = (
        load_trained_student(full_run).pipeline(),
        full_export[0],
        torch.Generator().manual_seed(batch),
    )
    z, c = torch.randn(batch, 4, height, width, generator=rng), torch.randn(batch, 77, 16, generator=rng)
    t, w = torch.randint(1000, (batch,), generator=rng), torch.rand(batch, generator=rng) * 10
    cond = omega_embedding(w, 256)
    inputs = {"sample": z, "timestep": t, "encoder_hidden_states": c, "timestep_cond": cond}
    for times in (t, t[:1]):  # one for each sample, or one for all as ONNX pipelines have it
        feed = {name: value.numpy() for name, value in {**inputs, "timestep": times}.items()}
        (got,) = session(folder, "unet").run(None, feed)
        assert_close(got, pipeline.unet(z, times, c, timestep_cond=cond, return_dict=False)[0])
    (got,) = session(folder, "vae_decoder").run(None, {"latent_sample": z.numpy()})
    assert_close(got, pipeline.vae.decode(z, return_dict=False)[0])
    ids = pipeline.tokenizer(["a cat"] * batch, padding="max_length", return_tensors="pt").input_ids
    got, pooled = session(folder, "text_encoder").run(None, {"input_ids": ids.numpy().astype(np.int32)})
    expected = pipeline.text_encoder(ids)
    assert_close(got, expected.last_hidden_state)
    assert_close(pooled, expected.pooler_output)


def assert_close(got: Any, expected: torch.Tensor) -> None:
    assert got.shape == tuple(expected.shape)
    assert np.abs(got - expected.numpy()).max() <= 1e-4 * expected.abs().max()


@needs_onnx
@pytest.mark.slow
@torch.no_grad()
def test_a_lora_is_fused_and_diffusers_onnx_pipeline_generates(lora_run: Path, lora_export: tuple[Path, str]) -> None:
    from diffusers import OnnxStableDiffusionPipeline

    folder, product = lora_export[0], load_trained_student(lora_run)
    example = onnx_files.parts_of(product.pipeline(), 1.0)[0].example(2, (8, 8))
    (got,) = session(folder, "unet").run(None, {name: value.numpy() for name, value in example.items()})
    assert_close(got, network_output(product.family, product.pipeline().unet, example))
    with pytest.raises(AssertionError):  # without the LoRA it would be another
        assert_close(got, network_output(product.family, product.base_pipeline().unet, example))

    drawn: Any = OnnxStableDiffusionPipeline.from_pretrained(folder, vae_encoder=None)
    drawn.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    settings: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
    (image,) = drawn("a cat", height=64, width=64, latents=latents, **settings).images
    assert image.shape == (16, 16, 3)
    assert np.isfinite(image).all()


@needs_onnx
@pytest.mark.slow
def test_int8_is_smaller_and_stays_within_its_own_bound(
    full_run: Path, full_export: tuple[Path, str], tmp_path: Path
) -> None:
    output = tmp_path / "int8"
    # random weights, unlike trained ones, pass rounding on from layer to layer
    export.export(full_run, "onnx", output, **{**OPTIONS, "verify": False}, quantize="int8")
    for part in ("unet", "text_encoder", "vae_decoder"):
        quantized, whole = (folder / part / "model.onnx" for folder in (output, full_export[0]))
        assert quantized.stat().st_size < whole.stat().st_size
    # it really computes in int8: the fp32 bound does not hold
    cases = onnx_files.cases_of(load_trained_student(full_run).pipeline(), 4.0)
    with pytest.raises(RunError, match="does not reproduce the trained model"):
        onnx_files.verify_onnx(output, cases, None, output)


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student is the tiny teacher: trained weights, unlike random ones, do not pass rounding on."""
    from lcmdistill.config.toml import to_toml
    from lcmdistill.export.diffusers_pipeline import save_pipeline
    from lcmdistill.sampling.student_pipeline import student_pipeline
    from lcmdistill.students.full import full_student
    from lcmdistill.teachers.loading import load_teacher
    from tests.support.runs import resolve

    run, teacher = tmp_path_factory.mktemp("trained") / "run", load_teacher("tiny")
    student = full_student(teacher.network, "zero", seed=0).eval().requires_grad_(False)
    save_pipeline(student_pipeline(teacher, student), run / "pipeline", "")
    (run / "config.toml").write_text(
        to_toml(resolve({}, {"teacher.model": "tiny", "run.validation_guidance_scale": 4.0}))
    )
    return run


@pytest.fixture(scope="module")
def int8_export(trained_run: Path) -> tuple[Path, str]:
    """The folder of a trained student's int8 graphs, and the sentence about it."""
    output = trained_run.parent / "int8"
    return output, export.export(trained_run, "onnx", output, **OPTIONS, quantize="int8")


def fewer_bits(weight: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (np.round(weight / 8.0) * 8).clip(-128, 127).astype(np.int8), scale


def scales_off_by_a_tenth(weight: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return weight, scale * 1.1


def channels_mixed_up(weight: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return weight, np.roll(scale, 1)


def overflowing(weight: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As of sums kept in too few bits: the largest weights are cut off."""
    return weight.clip(-24, 24), scale


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("spoil", [fewer_bits, scales_off_by_a_tenth, channels_mixed_up, overflowing])
def test_int8_of_a_trained_model_passes_and_a_broken_one_does_not(
    spoil: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    trained_run: Path,
    int8_export: tuple[Path, str],
    tmp_path: Path,
) -> None:
    import onnx

    folder, message = int8_export
    assert "(allowed 0.08)" in message
    shutil.copytree(folder, tmp_path / "broken")
    path = tmp_path / "broken" / "unet" / "model.onnx"
    model = onnx.load(path)
    values = {value.name: value for value in model.graph.initializer}
    weights = [name.removesuffix("_quantized") for name in values if name.endswith("_quantized")]
    assert len(weights) > 50
    for name in weights:
        weight, scale = values[f"{name}_quantized"], values[f"{name}_scale"]
        for value, other in zip((weight, scale), spoil(*map(onnx.numpy_helper.to_array, (weight, scale))), strict=True):
            value.CopyFrom(onnx.numpy_helper.from_array(other, value.name))
    onnx.save(model, path)
    cases = onnx_files.cases_of(load_trained_student(trained_run).pipeline(), 4.0)
    with pytest.raises(RunError, match="its unet differs by"):
        onnx_files.verify_onnx(tmp_path / "broken", cases, "int8", "it")


@needs_onnx
@pytest.mark.slow
@torch.no_grad()
def test_pictures_of_int8_are_those_of_fp32(trained_run: Path, int8_export: tuple[Path, str]) -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    pipeline, graph = load_trained_student(trained_run).pipeline(), session(int8_export[0], "unet")
    prompts = ["red heart", "grinning face", "dog face", "pizza"]
    prompt_embeds, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    cond = omega_embedding(torch.zeros(4), 256)
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def of_torch(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return pipeline.unet(z, t, prompt_embeds, timestep_cond=cond, return_dict=False)[0]

    def of_int8(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        feed = {"sample": z, "timestep": t[None], "encoder_hidden_states": prompt_embeds, "timestep_cond": cond}
        return torch.from_numpy(graph.run(None, {name: value.numpy() for name, value in feed.items()})[0])

    def drawn(network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        pipeline.scheduler.set_timesteps(4)
        z, generator = noise, torch.Generator().manual_seed(1)
        for t in pipeline.scheduler.timesteps:
            z, clean = pipeline.scheduler.step(network(z, t), t, z, generator=generator, return_dict=False)
        return (pipeline.vae.decode(clean / pipeline.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    found = similarity(drawn(of_int8), drawn(of_torch), data_range=1.0, reduction="none")
    assert isinstance(found, torch.Tensor)
    assert float(found.min()) > 0.9, found


@pytest.mark.parametrize("absent", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_one_sentence(
    absent: str, full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(UsageError, match=r"^--format onnx needs: pip install 'lcmdistill\[onnx\]'$"):
        export.export(full_run, "onnx", tmp_path / "onnx", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_quantize_is_for_onnx_only(
    full_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(full_run), "--format", "pipeline", "--quantize", "int8", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["lcmdistill", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "--quantize int8 is for --format onnx" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_an_export_that_fails_its_check_leaves_nothing(
    full_run: Path, full_export: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(pipeline: Any, folder: Path, quantize: str | None) -> None:
        shutil.copytree(full_export[0], folder, dirs_exist_ok=True)

    monkeypatch.setattr(onnx_files, "write_onnx", other)
    monkeypatch.setitem(onnx_files.BOUNDS, None, 1e-12)
    with pytest.raises(RunError, match=r"onnx does not reproduce the trained model: its unet differs by .* 1e-12"):
        export.export(full_run, "onnx", tmp_path / "onnx", **OPTIONS)
    assert list(tmp_path.iterdir()) == []
