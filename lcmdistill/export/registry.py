"""`lcmdistill export`: a run's product in the format of other programs, each reloaded and compared before it is done."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lcmdistill.config.guidance import omega_range
from lcmdistill.export import EXPORTERS
from lcmdistill.export.diffusers_pipeline import write_pipeline
from lcmdistill.export.lora_formats import header, write_diffusers_lora, write_kohya, write_peft
from lcmdistill.export.onnx import cases_of, need_onnx, verify_onnx, write_onnx
from lcmdistill.export.single_file import configs_of, file_header, read_back, write_single_file
from lcmdistill.export.trained_student import TrainedStudent, load_trained_student
from lcmdistill.export.verify import BOUNDS, Outputs, check_close, difference, network_outputs, pipeline_outputs
from lcmdistill.students.lora import merge_lora
from lcmdistill.students.lora_files import DIFFUSERS_LORA, Lora
from lcmdistill.teachers.base import has_omega_input
from lcmdistill.teachers.compat import dtype_option
from lcmdistill.teachers.naming import public_name
from lcmdistill.teachers.pipelines import network_of
from lcmdistill.teachers.registry import family_of
from lcmdistill.utils.atomic import atomic_dir, atomic_file
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.run_dir import check_writable

# (product, format, output, folder): writes the card of an export into the folder that becomes the output.
WriteCard = Callable[[TrainedStudent, str, Path, Path], None]


def _no_card(product: TrainedStudent, name: str, output: Path, folder: Path) -> None:
    """Write no card."""


@dataclass(frozen=True)
class Request:
    """What was asked of an exporter. guidance_scale: diffusers' convention, for an omega that is to be baked in."""

    output: Path
    dtype: torch.dtype
    guidance_scale: float
    verify: bool
    quantize: str | None = None
    write_card: WriteCard = _no_card


def pipeline(product: TrainedStudent, request: Request) -> str:
    """A diffusers pipeline folder, really cast, with the student's scheduler."""
    if product.lora is not None:
        raise UsageError("a LoRA run has no U-Net of its own; use --format fused for a full pipeline, or kohya")
    return _pipeline_folder(product, request)


def fused(product: TrainedStudent, request: Request) -> str:
    """A LoRA merged into its base: a full diffusers pipeline that needs no peft."""
    _lora_of(product, "fused")
    return _pipeline_folder(product, request)


def _merge_adapter(product: TrainedStudent, made: Any) -> None:
    """Merge a LoRA, if the student is one, into the network of its pipeline."""
    if product.lora is not None:
        merge_lora(network_of(made))


def _pipeline_folder(product: TrainedStudent, request: Request) -> str:
    made = product.pipeline()
    expected = pipeline_outputs(made, request.guidance_scale) if request.verify else {}
    _merge_adapter(product, made)
    with atomic_dir(request.output) as aside:
        write_pipeline(made.to(dtype=request.dtype), aside, "")
        request.write_card(product, "pipeline", request.output, aside)
        if not request.verify:
            return f"{request.output}: not verified"
        from diffusers import DiffusionPipeline

        del made  # so that one copy is in memory at a time
        again = DiffusionPipeline.from_pretrained(aside, **dtype_option(request.dtype))
        got = pipeline_outputs(again, request.guidance_scale)
        return check_close(got, expected, BOUNDS[request.dtype], request.output)


def _lora_of(product: TrainedStudent, name: str) -> Lora:
    if product.lora is None:
        raise UsageError(
            f"--format {name} is for LoRA runs and {product.run} is a full student; use pipeline or single-file"
        )
    return product.lora


def kohya(product: TrainedStudent, request: Request) -> str:
    """One .safetensors that ComfyUI, A1111 and diffusers read."""
    lora = _lora_of(product, "kohya")
    with atomic_file(_file(request.output)) as aside:
        told, expected = _trained(product, request, lora)
        write_kohya(lora, aside, told, request.dtype)
        return _verified_lora(product, request, expected, aside.parent, aside.name)


def diffusers_lora(product: TrainedStudent, request: Request) -> str:
    """A folder for diffusers' load_lora_weights, with the adapter's metadata."""
    lora = _lora_of(product, "diffusers-lora")
    with atomic_dir(request.output) as aside:
        told, expected = _trained(product, request, lora)
        write_diffusers_lora(lora, aside, told)
        return _verified_lora(product, request, expected, aside, None)


def _trained(product: TrainedStudent, request: Request, lora: Lora) -> tuple[dict[str, str], Outputs]:
    """A LoRA's header, and what it gives; the pipeline that tells both is gone before another is loaded."""
    trained = product.pipeline()
    if family_of(trained).uses_peft_only:
        raise UsageError(
            f"a {type(trained).__name__} loads no such file; use --format peft, or fused for a full pipeline"
        )
    told = header(lora, product.config, product.run.name, trained)
    family, network = family_of(trained), network_of(trained)
    return told, network_outputs(family, network, request.guidance_scale) if request.verify else {}


def _verified_lora(product: TrainedStudent, request: Request, expected: Outputs, folder: Path, name: str | None) -> str:
    if not request.verify:
        return f"{request.output}: not verified"
    fresh = product.base_pipeline()
    family = family_of(fresh)
    bare = network_outputs(family, fresh.unet, request.guidance_scale)
    fresh.load_lora_weights(str(folder), weight_name=name or DIFFUSERS_LORA)
    # The base is in fp32 on both sides, and half precision rounds no more than what the LoRA adds, which may be little.
    bound = BOUNDS[torch.float32]
    if name and request.dtype != torch.float32:
        bound += BOUNDS[request.dtype] * difference(bare["network"], expected["network"])
    return check_close(network_outputs(family, fresh.unet, request.guidance_scale), expected, bound, request.output)


def peft(product: TrainedStudent, request: Request) -> str:
    """A peft adapter folder."""
    lora = _lora_of(product, "peft")
    with atomic_dir(request.output) as aside:
        write_peft(lora, aside, public_name(product.config.teacher.model), product.sampling_header())
        if not request.verify:
            return f"{request.output}: not verified"
        from peft import PeftModel

        family = product.family
        expected = network_outputs(family, network_of(product.pipeline()), request.guidance_scale)
        fresh = PeftModel.from_pretrained(network_of(product.base_pipeline()), str(aside)).get_base_model()
        got = network_outputs(family, fresh, request.guidance_scale)
        return check_close(got, expected, BOUNDS[torch.float32], request.output)


def single_file(product: TrainedStudent, request: Request) -> str:
    """An A1111 / ComfyUI checkpoint: U-Net, VAE and text encoders in one file; LoRA fused, omega baked."""
    path, made = _file(request.output), product.pipeline()
    _need_format(made, "single-file", bool(family_of(made).layouts))
    expected = pipeline_outputs(made, request.guidance_scale) if request.verify else {}
    _merge_adapter(product, made)
    bakes, free = has_omega_input(made.unet), omega_range(product.config) is None
    cfg = product.guidance_scale if free else 1.0
    with atomic_file(path) as aside, configs_of(made) as configs:
        write_single_file(
            made,
            aside,
            dtype=request.dtype,
            guidance_scale=request.guidance_scale if bakes else None,
            metadata=file_header(product.config, path.stem),
            method=product.method,
            cfg=cfg,
        )
        use = (
            f"put it among the checkpoints of A1111 or ComfyUI: {product.method.sampler} sampler, 4 steps, CFG {cfg:g}"
        )
        omegas = omega_range(product.config)
        if bakes and omegas and not omegas.low <= request.guidance_scale - 1 <= omegas.high:
            use += f"; it was trained with guidance scales of {omegas.scale} and never saw {request.guidance_scale:g}"
        if not request.verify:
            return f"{path}: not verified; {use}"
        del made
        got = pipeline_outputs(read_back(aside, configs), request.guidance_scale)
        return f"{check_close(got, expected, BOUNDS[request.dtype], path)}; {use}"


def onnx(product: TrainedStudent, request: Request) -> str:
    """U-Net, text encoders and VAE decoder as ONNX graphs in fp32 or int8, with configs; a LoRA is merged first."""
    need_onnx()
    made = product.pipeline()
    _need_format(made, "onnx", bool(family_of(made).onnx_classes))
    cases = cases_of(made, request.guidance_scale) if request.verify else []
    _merge_adapter(product, made)
    with atomic_dir(request.output) as aside:
        write_onnx(made, aside, request.quantize)
        request.write_card(product, "onnx", request.output, aside)
        if not request.verify:
            return f"{request.output}: not verified"
        del made
        return verify_onnx(aside, cases, request.quantize, request.output)


def _need_format(made: Any, name: str, is_supported: bool) -> None:
    """Raise UsageError for a student whose format has no place for it."""
    if not is_supported:
        raise UsageError(
            f"--format {name} is for U-Nets that take prompts, not for {type(made).__name__}; use pipeline"
        )


_OWN = ("pipeline", "lora", "checkpoints", "samples")
"parts of a run's folder that it replaces, or reads whole"


def _file(output: Path) -> Path:
    if output.suffix != ".safetensors":
        raise UsageError(f"--output {output} must end in .safetensors for this format")
    return output


def export(
    run: Path,
    name: str,
    output: Path,
    *,
    dtype: str,
    guidance_scale: float | None,
    verify: bool,
    quantize: str | None = None,
    weights: Literal["last", "best"] = "last",
    write_card: WriteCard = _no_card,
) -> str:
    """Write a run's product and compare it with the run; returns a sentence that says how far off it is.

    dtype: fp16, bf16 or fp32; quantize: None or int8; weights: of the run's end, or of its best validation. Raises
    UsageError for a format that the run cannot be, RunError if the reloaded file gives other values.
    """
    if quantize is not None and name != "onnx":
        raise UsageError(f"--quantize {quantize} is for --format onnx; leave it out, or choose --dtype for {name}")
    product = load_trained_student(run, weights)
    if output.exists():
        raise UsageError(f"--output {output} exists; name a new one")
    if run.resolve() in output.resolve().parents and output.resolve().relative_to(run.resolve()).parts[0] in _OWN:
        raise UsageError(f"--output {output} lies in what the run itself writes; name a place outside of it")
    if guidance_scale is not None and (
        name != "single-file" or product.lora is not None or not omega_range(product.config)
    ):
        raise UsageError(
            f"--guidance-scale {guidance_scale:g} is for what bakes it in, the single file of a full student whose guidance is "
            "an input, and has no effect here: leave it out"
        )
    check_writable(output)
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    request = Request(
        output=output,
        dtype=dtypes[dtype],
        guidance_scale=product.guidance_scale if guidance_scale is None else guidance_scale,
        verify=verify,
        quantize=quantize,
        write_card=write_card,
    )
    try:
        return EXPORTERS[name](product, request)
    except OSError as error:
        raise RunError(f"{output} cannot be written: {error}") from error
