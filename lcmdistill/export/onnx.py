"""The format `onnx`: graphs with the folders and input names that ONNX pipelines expect, verified in onnxruntime.

The layout is that of optimum's ORTStableDiffusionPipeline and diffusers' OnnxStableDiffusionPipeline. Shapes: B batch,
C channels, h w latent size, H W pixels, L tokens, D width of the prompt's embedding, W width of omega's.
"""

import importlib.util
import itertools
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lcmdistill.export.base import Exporter, ExportRequest, Usage, merge_adapter, require_support, unverified
from lcmdistill.export.diffusers_pipeline import add_vocabularies, remove_local_names
from lcmdistill.export.trained_student import TrainedStudent
from lcmdistill.export.verify import check_close, network_inputs, smallest_side
from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.registry import family_of
from lcmdistill.utils.atomic import atomic_dir
from lcmdistill.utils.errors import UsageError

OPSET = 20

BOUNDS = {None: 1e-4, "int8": 0.08}
"""The largest difference allowed, relative to the largest value, by quantization. In int8 the tiny teacher differs by .042;
with weights of five bits it would differ by .11, with one wrong scale by .1."""

BATCHES = (1, 2, 3)

INT8_OPERATORS = ["MatMul", "Gemm"]
"Convolutions stay in fp32: in int8, onnxruntime took 3 to 10 times as long on a CPU, with 4 times the error."


@dataclass(frozen=True)
class Part:
    """One graph.

    Attributes:
        folder: Its folder in the export.
        module: The module to trace.
        config: The config to write next to the graph.
        axes: The dynamic axes of each input.
        outputs: The names of the outputs.
        example: Returns inputs for a batch size and a size of latents.
    """

    folder: str
    module: nn.Module
    config: Any
    axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    example: Callable[[int, tuple[int, int]], dict[str, Tensor]]


class Case(NamedTuple):
    """Inputs of one graph, and the outputs of torch for them."""

    folder: str
    inputs: Mapping[str, Tensor]
    expected: tuple[Tensor, ...]


class _UNet(nn.Module):
    """A U-Net with diffusers' added_cond_kwargs as plain inputs, in the order of `network_inputs`."""

    def __init__(self, family: TeacherFamily, unet: Any) -> None:
        super().__init__()
        self.family = family
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        optional = {"text_embeds": text_embeds, "time_ids": time_ids, "timestep_cond": timestep_cond}
        inputs |= {name: value for name, value in optional.items() if value is not None}
        return self.unet(**self.family.network_kwargs(self.family, self.unet, inputs), return_dict=False)[0]


class _TextEncoder(nn.Module):
    """A text encoder with named outputs; "hidden_states.0" is the input of the first layer."""

    def __init__(self, encoder: Any, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.outputs = outputs

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.encoder(input_ids, output_hidden_states=True)
        hidden = {f"hidden_states.{i}": value for i, value in enumerate(output.hidden_states)}
        return tuple(hidden[name] if name in hidden else output[name] for name in self.outputs)


class _VaeDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample, return_dict=False)[0]


def need_onnx() -> None:
    """Raise UsageError if the optional packages are not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        raise UsageError("--format onnx needs: pip install 'lcmdistill[onnx]'")


def parts_of(pipeline: Any, guidance_scale: float) -> list[Part]:
    """Return U-Net, text encoders and VAE decoder of a pipeline, in fp32 on the CPU. guidance_scale: of the examples."""
    family = family_of(pipeline)
    encoders = ((name, getattr(pipeline, name).float().eval()) for name in family.text_encoders)
    return [
        _unet(family, pipeline.unet.float().eval(), guidance_scale),
        *(_text_encoder(encoder, name, all_layers=family.text_layers_read) for name, encoder in encoders),
        _vae_decoder(pipeline.vae.float().eval()),
    ]


def _unet(family: TeacherFamily, unet: Any, guidance_scale: float) -> Part:
    def example(batch: int, size: tuple[int, int]) -> dict[str, Tensor]:
        return network_inputs(family, unet, guidance_scale, batch=batch, size=size)

    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in example(1, _sizes(unet)[0])}
    # The time is (1,) in ONNX pipelines and (B,) in ours: its axis is opened after the trace, see _open_timestep.
    axes |= {"sample": {0: "batch", 2: "height", 3: "width"}, "timestep": {}}
    axes["encoder_hidden_states"][1] = "sequence"
    return Part("unet", _UNet(family, unet), unet.config, axes, ("out_sample",), example)


def _text_encoder(encoder: Any, folder: str, *, all_layers: bool) -> Part:
    """all_layers: give the layers' inputs too, which SDXL's pipelines take their embeddings from."""
    config = encoder.config

    def example(batch: int, size: tuple[int, int]) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(batch)
        # int32, as ONNX pipelines give them.
        shape = (batch, config.max_position_embeddings)
        return {"input_ids": torch.randint(config.vocab_size, shape, generator=rng, dtype=torch.int32)}

    projects = hasattr(encoder, "text_projection")
    outputs = ("text_embeds", "last_hidden_state") if projects else ("last_hidden_state", "pooler_output")
    outputs += tuple(f"hidden_states.{i}" for i in range(config.num_hidden_layers) if all_layers)
    return Part(folder, _TextEncoder(encoder, outputs), config, {"input_ids": {0: "batch"}}, outputs, example)


def _vae_decoder(vae: Any) -> Part:
    def example(batch: int, size: tuple[int, int]) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(batch)
        return {"latent_sample": torch.randn(batch, vae.config.latent_channels, *size, generator=rng)}

    axes = {"latent_sample": {0: "batch", 2: "height", 3: "width"}}
    return Part("vae_decoder", _VaeDecoder(vae), vae.config, axes, ("sample",), example)


def _sizes(unet: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return two small sizes of latents that the U-Net can halve at each level; the first is not square."""
    side = smallest_side(unet)
    return (side, 2 * side), (side, side)


def write_onnx(pipeline: Any, folder: Path, quantize: str | None) -> None:
    """Write graphs, configs, tokenizer and scheduler into an existing folder, without the VAE encoder and a safety checker.

    Args:
        pipeline: The pipeline; a LoRA must be merged into its U-Net.
        folder: The folder.
        quantize: "int8" for int8 weights and activations in every matrix product, otherwise None.
    """
    size = _sizes(pipeline.unet)[0]
    for part in parts_of(pipeline, 1.0):
        (folder / part.folder).mkdir()
        with _quietly(), tempfile.TemporaryDirectory(dir=folder) as temporary:
            _trace(part, size, (Path(temporary) if quantize else folder / part.folder) / "model.onnx")
            if quantize:
                _to_int8(Path(temporary) / "model.onnx", folder / part.folder / "model.onnx")
        config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
        text = json.dumps(config, indent=2, sort_keys=True, default=list)
        (folder / part.folder / "config.json").write_text(text + "\n", encoding="utf-8")
    for name in _tokenizers(pipeline):
        getattr(pipeline, name).save_pretrained(folder / name)
    add_vocabularies(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    remove_local_names(folder)
    (folder / "model_index.json").write_text(json.dumps(_index(pipeline), indent=2) + "\n", encoding="utf-8")


def _index(pipeline: Any) -> dict[str, Any]:
    """Return model_index.json: optimum's class for this model, and parts named as in diffusers' OnnxStableDiffusionPipeline."""
    import diffusers

    family, graph, absent = family_of(pipeline), ["diffusers", "OnnxRuntimeModel"], [None, None]
    index = {
        "_class_name": family.onnx_classes[type(pipeline).__name__],
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": absent,
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        "text_encoder": graph,
        "tokenizer": ["transformers", type(pipeline.tokenizer).__name__],
        "unet": graph,
        "vae_decoder": graph,
        "vae_encoder": absent,
    }
    index |= dict.fromkeys(family.text_encoders, graph)
    index |= {name: ["transformers", type(getattr(pipeline, name)).__name__] for name in _tokenizers(pipeline)}
    return index | family.onnx_options(pipeline)


def _tokenizers(pipeline: Any) -> list[str]:
    """Return the names of a pipeline's tokenizers, one per text encoder."""
    return [name.replace("text_encoder", "tokenizer") for name in family_of(pipeline).text_encoders]


@torch.no_grad()
def _trace(part: Part, size: tuple[int, int], path: Path) -> None:
    """Trace a part with a batch of 2, because an axis of length 1 would become a constant.

    Weights above 2 GB are written to a file next to the graph.
    """
    inputs = part.example(2, size)
    if "timestep" in inputs:
        inputs["timestep"] = inputs["timestep"][:1]
    program = torch.onnx.export(
        part.module,
        kwargs=inputs,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=list(part.outputs),
        dynamic_shapes={name: dict(axes) for name, axes in part.axes.items()},
        verbose=False,
    )
    assert program is not None
    _open_timestep(program.model)
    program.save(path)


def _open_timestep(model: Any) -> None:
    """Allow `timestep` of shape (1,) or (B,): the graph broadcasts it, and only the declared shape is too narrow."""
    import onnx_ir

    for value in model.graph.inputs:
        if value.name == "timestep":
            value.shape = onnx_ir.Shape(["steps"])


def _to_int8(source: Path, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        path,
        op_types_to_quantize=INT8_OPERATORS,
        per_channel=True,
        weight_type=QuantType.QInt8,
        reduce_range=True,  # 7-bit weights: 8-bit ones overflow on processors without VNNI, with 4 times the error
        use_external_data_format=source.with_name(f"{source.name}.data").is_file(),
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the messages of the exporter and the quantizer. Errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "root", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@torch.no_grad()
def cases_of(pipeline: Any, guidance_scale: float) -> list[Case]:
    """Return the outputs of every part of a pipeline in torch, in fp32, at three batch sizes and two sizes of latents."""
    cases = []
    for part in parts_of(pipeline, guidance_scale):
        for batch in BATCHES:
            for size in _sizes(pipeline.unet):
                inputs = part.example(batch, size)
                output = part.module(**inputs)
                cases.append(Case(part.folder, inputs, (output,) if isinstance(output, Tensor) else output))
    return cases


def verify_onnx(folder: Path, cases: Sequence[Case], quantize: str | None, what: object) -> str:
    """Run each graph in onnxruntime, and return a sentence with the largest relative difference from torch.

    Args:
        folder: The folder of the graphs.
        cases: Of the exported pipeline, with its LoRA applied but not merged.
        quantize: The quantization, which determines the bound.
        what: The export, for messages.

    Raises:
        RunError: A difference is above BOUNDS[quantize].
    """
    import onnxruntime

    got: dict[str, list[Tensor]] = {}
    expected: dict[str, list[Tensor]] = {}
    for part, group in itertools.groupby(cases, key=lambda case: case.folder):
        session = onnxruntime.InferenceSession(folder / part / "model.onnx", providers=["CPUExecutionProvider"])
        for case in group:
            names = [output.name for output in session.get_outputs()]
            outputs = session.run(names, {name: value.numpy() for name, value in case.inputs.items()})
            got.setdefault(part, []).extend(torch.from_numpy(output) for output in outputs)
            expected.setdefault(part, []).extend(case.expected)
    return check_close(got, expected, BOUNDS[quantize], what)


def export_onnx(student: TrainedStudent, request: ExportRequest) -> str:
    """Write U-Net, text encoders and VAE decoder as ONNX graphs in fp32 or int8, with configs; a LoRA is merged first.

    Args:
        student: The trained student.
        request: What to write, and where.

    Returns:
        A sentence with the largest difference from the student.
    """
    need_onnx()
    pipeline = student.pipeline()
    require_support(pipeline, "onnx", student.config.student.kind, bool(family_of(pipeline).onnx_classes))
    cases = cases_of(pipeline, request.guidance_scale) if request.verify else []
    merge_adapter(student, pipeline)
    with atomic_dir(request.output) as folder:
        write_onnx(pipeline, folder, request.quantize)
        request.write_card(student, "onnx", request.output, folder)
        if not request.verify:
            return unverified(request.output)
        del pipeline
        return verify_onnx(folder, cases, request.quantize, request.output)


def python_code(usage: Usage) -> str:
    """Return the Python code that opens the folder with optimum and generates an image."""
    facts, family = usage.facts, usage.facts.family
    kind = family.student_pipeline_class(facts.has_omega_input, bool(usage.method.sampling_options))
    name = family.onnx_classes[kind or family.pipeline_classes[0]]
    return f"""from optimum.onnxruntime import {name}

pipeline = {name}.from_pretrained("{usage.place}")
{usage.call}"""


ONNX = Exporter(
    key="onnx",
    title="ONNX graphs in fp32 or int8",
    student_kinds=("full", "lora"),
    writes="folder",
    write=export_onnx,
    python=python_code,
    library="optimum",
    quantizations=tuple(name for name in BOUNDS if name),
    keeps_omega_input=True,
)
