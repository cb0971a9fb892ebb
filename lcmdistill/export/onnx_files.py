"""ONNX graphs in the folders and with the input names that ONNX pipelines know, compared with torch in onnxruntime.

The layout is that of optimum's ORTStableDiffusionPipeline and diffusers' OnnxStableDiffusionPipeline. Shapes: B batch,
C channels, h w latent size, H W pixels, L tokens, D width of the prompt's embedding, W width of omega's.
"""

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcmdistill.consistency import omega_embedding
from lcmdistill.errors import RunError, UsageError
from lcmdistill.export.pipeline import add_vocabularies

OPSET = 20
BOUNDS = {None: 1e-4, "int8": 0.1}
"the largest difference allowed, as a part of the largest value, by what was quantized"
BATCHES = (1, 2, 3)
INT8_OPERATORS = ["MatMul", "Gemm"]
"convolutions stay in fp32: onnxruntime's int8 ones took 3 to 10 times as long on a CPU, and were 4 times as far off"

Example = Callable[[int, int, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """One graph. axes: the dynamic axes of each input; example: inputs for (batch, height, width) in latents."""

    folder: str
    module: nn.Module
    config: Any
    axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    example: Example


class _UNet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False)[0]


class _TextEncoder(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.encoder(input_ids)
        return output.last_hidden_state, output.pooler_output


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


def parts_of(pipeline: Any) -> list[Part]:
    """U-Net, text encoder and VAE decoder of a diffusers pipeline, in fp32 on the CPU."""
    models = [m.float().eval() for m in (pipeline.unet, pipeline.text_encoder, pipeline.vae)]
    return [make(model) for make, model in zip((_unet, _text_encoder, _vae_decoder), models, strict=True)]


def _unet(unet: Any) -> Part:
    takes_omega, config = unet.config.time_cond_proj_dim is not None, unet.config
    image = {0: "batch", 2: "height", 3: "width"}
    # The time is (1,) in ONNX pipelines and (B,) in ours: its axis is opened after the trace, see _open_timestep.
    axes = {"sample": image, "timestep": {}, "encoder_hidden_states": {0: "batch", 1: "sequence"}}
    axes |= {"timestep_cond": {0: "batch"}} if takes_omega else {}

    def example(batch: int, height: int, width: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(batch)
        inputs = {
            "sample": torch.randn(batch, config.in_channels, height, width, generator=rng),
            "timestep": torch.tensor([499]),
            "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim, generator=rng),
        }
        if takes_omega:
            w = torch.rand(batch, generator=rng) * 8.0
            inputs["timestep_cond"] = omega_embedding(w, config.time_cond_proj_dim)
        return inputs

    return Part("unet", _UNet(unet), config, axes, ("out_sample",), example)


def _text_encoder(encoder: Any) -> Part:
    config = encoder.config

    def example(batch: int, height: int, width: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(batch)
        # int32, as ONNX pipelines give them.
        shape = (batch, config.max_position_embeddings)
        return {"input_ids": torch.randint(config.vocab_size, shape, generator=rng, dtype=torch.int32)}

    axes, outputs = {"input_ids": {0: "batch"}}, ("last_hidden_state", "pooler_output")
    return Part("text_encoder", _TextEncoder(encoder), config, axes, outputs, example)


def _vae_decoder(vae: Any) -> Part:
    def example(batch: int, height: int, width: int) -> dict[str, Tensor]:
        rng = torch.Generator().manual_seed(batch)
        return {"latent_sample": torch.randn(batch, vae.config.latent_channels, height, width, generator=rng)}

    axes = {"latent_sample": {0: "batch", 2: "height", 3: "width"}}
    return Part("vae_decoder", _VaeDecoder(vae), vae.config, axes, ("sample",), example)


def _sizes(pipeline: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two small sizes of latents that the U-Net can halve at each of its levels; the first is not square."""
    side = 2 ** len(pipeline.unet.config.block_out_channels)
    return (side, 2 * side), (side, side)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_onnx(pipeline: Any, folder: Path, quantize: str | None) -> None:
    """Write graphs, configs, tokenizer and scheduler into an existing folder.

    quantize: "int8" for int8 weights in every matrix product, quantized activations with them. A U-Net must have its LoRA
    fused. The encoder of the VAE and a safety checker are left out.
    """
    size = _sizes(pipeline)[0]
    for part in parts_of(pipeline):
        (folder / part.folder).mkdir()
        with _quietly(), tempfile.TemporaryDirectory(dir=folder) as passing:
            _trace(part, size, (Path(passing) if quantize else folder / part.folder) / "model.onnx")
            if quantize:
                _to_int8(Path(passing) / "model.onnx", folder / part.folder / "model.onnx")
        config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
        text = json.dumps(config, indent=2, sort_keys=True, default=list)
        (folder / part.folder / "config.json").write_text(text + "\n", encoding="utf-8")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    add_vocabularies(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_index(pipeline), indent=2) + "\n", encoding="utf-8")


def _index(pipeline: Any) -> dict[str, Any]:
    """model_index.json: optimum's class for this model; the parts are named for diffusers' OnnxStableDiffusionPipeline."""
    import diffusers

    takes_omega = pipeline.unet.config.time_cond_proj_dim is not None
    graph, absent = ["diffusers", "OnnxRuntimeModel"], [None, None]
    return {
        "_class_name": "ORTLatentConsistencyModelPipeline" if takes_omega else "ORTStableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": absent,
        "requires_safety_checker": False,
        "safety_checker": absent,
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        "text_encoder": graph,
        "tokenizer": ["transformers", type(pipeline.tokenizer).__name__],
        "unet": graph,
        "vae_decoder": graph,
        "vae_encoder": absent,
    }


@torch.no_grad()
def _trace(part: Part, size: tuple[int, int], path: Path) -> None:
    """Trace with a batch of 2: an axis of length 1 would be taken for a constant. Weights over 2 GB go to a file beside."""
    inputs = part.example(2, *size)
    program = torch.onnx.export(
        part.module,
        tuple(inputs.values()),
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
    """Let `timestep` be (1,) or (B,): the graph broadcasts it to the batch, and only its declaration is too narrow."""
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
        use_external_data_format=source.with_name(f"{source.name}.data").is_file(),
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter and the quantizer report on their own business; what goes wrong is raised all the same."""
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


# -- verification ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def verify_onnx(folder: Path, reference: Any, quantize: str | None) -> float:
    """The largest difference of each graph in onnxruntime from torch, at three batch sizes and two sizes of latents.

    As a part of the reference's largest value. reference: the pipeline that it was made of, in fp32; its LoRA, if any, on
    and not fused. Raises RunError above BOUNDS[quantize].
    """
    import onnxruntime

    worst = 0.0
    for part in parts_of(reference):
        session = onnxruntime.InferenceSession(folder / part.folder / "model.onnx", providers=["CPUExecutionProvider"])
        for batch in BATCHES:
            for size in _sizes(reference):
                off = _difference(session, part, part.example(batch, *size))
                if not off <= BOUNDS[quantize]:  # a NaN is above any bound
                    raise RunError(
                        f"{part.folder}/model.onnx does not give torch's output: off by {off:.2g} at batch {batch} and "
                        f"{size[0]}x{size[1]} latents, allowed is {BOUNDS[quantize]:g}"
                    )
                worst = max(worst, off)
    return worst


def _difference(session: Any, part: Part, inputs: Mapping[str, Tensor]) -> float:
    got = session.run(list(part.outputs), {name: value.numpy() for name, value in inputs.items()})
    expected = part.module(*inputs.values())
    pairs = zip(got, [expected] if isinstance(expected, Tensor) else expected, strict=True)
    return max(float((torch.from_numpy(a) - b).abs().max() / b.abs().max()) for a, b in pairs)
