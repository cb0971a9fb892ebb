"""`lcmdistill export`: a run's product in the format of other programs, each reloaded and compared before it is done."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcmdistill.checkpoint import written_aside
from lcmdistill.errors import RunError, UsageError
from lcmdistill.export.lora_files import Lora, header, write_diffusers_lora, write_kohya, write_peft
from lcmdistill.export.onnx_files import BOUNDS, need_onnx, verify_onnx, write_onnx
from lcmdistill.export.pipeline import save_pipeline
from lcmdistill.export.product import Product, compared, load_product, removed_on_error, unet_step
from lcmdistill.export.single_file import verify_single_file, write_single_file
from lcmdistill.modelcard import card_for
from lcmdistill.teachers import resolve_alias
from lcmdistill.teachers.base import takes_omega


@dataclass(frozen=True)
class Request:
    """What was asked of an exporter. guidance_scale: diffusers' convention, for an omega that is to be baked in."""

    output: Path
    dtype: torch.dtype
    guidance_scale: float
    verify: bool
    quantize: str | None = None


def pipeline(product: Product, request: Request) -> str:
    """A diffusers pipeline folder, really cast, with an LCMScheduler."""
    if product.lora is not None:
        raise UsageError("a LoRA run has no U-Net of its own; use --format fused for a full pipeline, or kohya")
    return _pipeline_folder(product, product.pipeline(), request)


def fused(product: Product, request: Request) -> str:
    """A LoRA merged into its base: a full diffusers pipeline that needs no peft."""
    _lora_of(product, "fused")
    return _pipeline_folder(product, _without_adapter(product), request)


def _without_adapter(product: Product) -> Any:
    """The student's pipeline; a LoRA is merged into its U-Net."""
    made = product.pipeline()
    if product.lora is not None:
        made.unet.fuse_lora()
        made.unet.unload_lora()
    return made


def _pipeline_folder(product: Product, made: Any, request: Request) -> str:
    with removed_on_error(request.output):
        save_pipeline(made.to(dtype=request.dtype), request.output, _card(product))
        if not request.verify:
            return f"{request.output}: not verified"
        from diffusers import DiffusionPipeline

        again = DiffusionPipeline.from_pretrained(request.output, torch_dtype=request.dtype)
        expected = unet_step(product.pipeline().unet, request.guidance_scale)
        return compared(unet_step(again.unet, request.guidance_scale), expected, request.dtype, str(request.output))


def _card(product: Product) -> str:
    path = product.run / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def export_card(run: Path, name: str, place: str, file: str = "") -> str:
    """The run's card, telling how an export is used. place: its folder, or the hub's repository; file: see card_for."""
    product = load_product(run)
    has_omega = product.lora is None and name in ("pipeline", "onnx")
    guidance = product.guidance_scale if has_omega else None
    loaded_as = "pipeline" if name == "fused" else name
    model = resolve_alias(str(product.recorded["teacher.model"]))
    return card_for(_card(product), loaded_as, place, file, model, guidance)


def _lora_of(product: Product, name: str) -> Lora:
    if product.lora is None:
        raise UsageError(
            f"--format {name} is for LoRA runs and {product.run} is a full student; use pipeline or single-file"
        )
    return product.lora


def _header(product: Product, lora: Lora) -> dict[str, str]:
    return header(lora, product.recorded, product.run.name, product.base_pipeline())


def kohya(product: Product, request: Request) -> str:
    """One .safetensors that ComfyUI, A1111 and diffusers read."""
    lora = _lora_of(product, "kohya")
    path = _file(request.output)
    with removed_on_error(path):
        write_kohya(lora, path, _header(product, lora), request.dtype)
        return _verified_lora(product, request, path, path.parent, path.name)


def diffusers_lora(product: Product, request: Request) -> str:
    """A folder for diffusers' load_lora_weights, with the adapter's metadata."""
    lora = _lora_of(product, "diffusers-lora")
    with removed_on_error(request.output):
        write_diffusers_lora(lora, request.output, _header(product, lora))
        return _verified_lora(product, request, request.output, request.output, None)


def _verified_lora(product: Product, request: Request, what: Path, folder: Path, name: str | None) -> str:
    if not request.verify:
        return f"{what}: not verified"
    fresh = product.base_pipeline()
    fresh.load_lora_weights(str(folder), weight_name=name)
    dtype = request.dtype if name else torch.float32
    return compared(unet_step(fresh.unet, 1.0), unet_step(product.pipeline().unet, 1.0), dtype, str(what))


def peft(product: Product, request: Request) -> str:
    """A peft adapter folder."""
    lora = _lora_of(product, "peft")
    with removed_on_error(request.output):
        write_peft(lora, request.output, resolve_alias(str(product.recorded["teacher.model"])))
        if not request.verify:
            return f"{request.output}: not verified"
        from peft import PeftModel

        fresh = PeftModel.from_pretrained(product.base_pipeline().unet, str(request.output))
        expected = unet_step(product.pipeline().unet, 1.0)
        return compared(unet_step(fresh, 1.0), expected, torch.float32, str(request.output))


def single_file(product: Product, request: Request) -> str:
    """An A1111 / ComfyUI checkpoint: U-Net, VAE and text encoder in one file; LoRA fused, omega baked."""
    path = _file(request.output)
    made = _without_adapter(product)
    with removed_on_error(path):
        bakes = takes_omega(made.unet)
        write_single_file(made, path, dtype=request.dtype, guidance_scale=request.guidance_scale if bakes else None)
        use = "put it among the checkpoints of A1111 or ComfyUI: LCM sampler, 4 steps, CFG 1"
        if not request.verify:
            return f"{path}: not verified; {use}"
        with _as_folder(product, made) as folder:
            off = verify_single_file(
                path,
                folder,
                product.pipeline().unet,
                guidance_scale=request.guidance_scale if bakes else None,
                dtype=request.dtype,
            )
        return f"{path}: reloaded, largest difference {off:.2g} of the largest value; {use}"


@contextmanager
def _as_folder(product: Product, made: Any) -> Iterator[Path]:
    """The diffusers folder that a single file is read back with: the run's own, or a passing one for a LoRA's base."""
    if product.lora is None:
        yield product.run / "pipeline"
        return
    with tempfile.TemporaryDirectory() as passing:
        made.to(dtype=torch.float32).save_pretrained(passing)
        yield Path(passing)


def onnx(product: Product, request: Request) -> str:
    """U-Net, text encoder and VAE decoder as ONNX graphs in fp32 or int8, with configs; a LoRA is merged first."""
    need_onnx()
    with written_aside(request.output) as aside:
        write_onnx(_without_adapter(product), aside, request.quantize)
        card = export_card(product.run, "onnx", str(request.output))
        (aside / "README.md").write_text(card, encoding="utf-8")
        if not request.verify:
            return f"{request.output}: not verified"
        off = verify_onnx(aside, product.pipeline(), request.quantize)
    allowed = BOUNDS[request.quantize]
    return (
        f"{request.output}: run in onnxruntime, largest difference {off:.2g} of the largest value (allowed {allowed:g})"
    )


def _file(output: Path) -> Path:
    if output.suffix != ".safetensors":
        raise UsageError(f"--output {output} must end in .safetensors for this format")
    return output


EXPORTERS: dict[str, Callable[[Product, Request], str]] = {
    "pipeline": pipeline,
    "fused": fused,
    "kohya": kohya,
    "diffusers-lora": diffusers_lora,
    "peft": peft,
    "single-file": single_file,
    "onnx": onnx,
}


def export(
    run: Path,
    name: str,
    output: Path,
    *,
    dtype: str,
    guidance_scale: float | None,
    verify: bool,
    quantize: str | None = None,
) -> str:
    """Write a run's product and compare it with the run; returns a sentence that says how far off it is.

    dtype: fp16, bf16 or fp32; quantize: None or int8. Raises UsageError for a format that the run cannot be, RunError if
    the reloaded file gives other values.
    """
    if quantize is not None and name != "onnx":
        raise UsageError(f"--quantize {quantize} is for --format onnx; leave it out, or choose --dtype for {name}")
    product = load_product(run)
    if output.exists():
        raise UsageError(f"--output {output} exists; name a new one")
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    request = Request(
        output=output,
        dtype=dtypes[dtype],
        guidance_scale=product.guidance_scale if guidance_scale is None else guidance_scale,
        verify=verify,
        quantize=quantize,
    )
    try:
        return EXPORTERS[name](product, request)
    except OSError as error:
        raise RunError(f"{output} cannot be written: {error}") from error
