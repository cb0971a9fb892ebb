"""What a run made, written and loaded again, and how an export of it is compared with it.

Shapes: B batch, C h w latents, L D embeddings.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmdistill.checkpoint import checkpoints, load_checkpoint
from lcmdistill.config import flatten
from lcmdistill.consistency import omega_embedding
from lcmdistill.errors import RunError, UsageError
from lcmdistill.export.lora_files import Lora, alpha_of, from_checkpoint, header, rank_of, write_kohya
from lcmdistill.export.pipeline import save_pipeline, student_pipeline
from lcmdistill.export.single_file import BOUNDS
from lcmdistill.lora import ONLINE, adapter_parameters, add_lora, choose_adapter
from lcmdistill.modelcard import model_card
from lcmdistill.rundir import has_product, recorded, teacher_of
from lcmdistill.settings import RunConfig, StudentConfig
from lcmdistill.student import Student
from lcmdistill.teachers import load_pipeline, load_teacher
from lcmdistill.teachers.base import Teacher


@dataclass(frozen=True)
class Product:
    """A finished run. recorded: its settings, {"section.key": value}; lora: its adapter, None for a full student."""

    run: Path
    recorded: Mapping[str, Any]
    lora: Lora | None

    @property
    def guidance_scale(self) -> float:
        """What the run recommends to draw with, in diffusers' convention."""
        return float(self.recorded["run.validation_guidance_scale"])

    def teacher(self) -> Teacher:
        """The teacher, loaded afresh."""
        return load_teacher(**teacher_of(self.recorded))

    def base_pipeline(self) -> Any:
        """The teacher on an LCMScheduler: what a LoRA is loaded into."""
        teacher = self.teacher()
        return student_pipeline(teacher, teacher.network, self.recorded["data.resolution"])

    def pipeline(self) -> Any:
        """The student as a diffusers pipeline in fp32; a LoRA's has the adapter on, unfused."""
        if self.lora is None:
            return load_pipeline(str(self.run / "pipeline"))
        pipeline = self.base_pipeline()
        modules = tuple(self.recorded["student.target_modules"])
        shape = StudentConfig(rank=rank_of(self.lora), alpha=alpha_of(self.lora), target_modules=modules)
        add_lora(pipeline.unet, ONLINE, shape, seed=0)
        with torch.no_grad():
            for name, parameter in adapter_parameters(pipeline.unet, ONLINE).items():
                path, _, part = name.rpartition(".")
                parameter.copy_(self.lora[path].down if part == "lora_A" else self.lora[path].up)
        choose_adapter(pipeline.unet, ONLINE)
        return pipeline


def write_product(config: RunConfig, folder: Path, teacher: Teacher, student: Student) -> Path:
    """What the run was for: RUN/pipeline of a full student, RUN/lora of an adapter. Returns its path."""
    if config.student.kind == "lora":
        lora = from_checkpoint(student.averaged or student.trainable, config.student.alpha)
        path = folder / "lora" / f"{folder.name}.safetensors"
        write_kohya(lora, path, header(lora, flatten(config), folder.name, teacher.pipeline))
        return path
    pipeline = student_pipeline(teacher, student.for_drawing(), config.data.resolution).to("cpu")
    save_pipeline(pipeline, folder / "pipeline", model_card(config, folder, teacher))
    return folder / "pipeline"


def load_product(run: Path) -> Product:
    """A finished run's product. Raises UsageError if the folder is no run, or the run has not finished."""
    found = recorded(run)
    if not found:
        raise UsageError(f"{run} is no run of lcmdistill: it holds no config.toml; name a folder such as runs/tiny-lcm")
    if found.get("student.kind", "full") == "full":
        if not has_product(run):
            raise UsageError(f"the run {run} has no pipeline/ yet; run its distill command again to finish it")
        return Product(run, found, None)
    saved = checkpoints(run / "checkpoints")
    if not saved or not has_product(run):
        raise UsageError(f"the run {run} has no lora/ yet; run its distill-lora command again to finish it")
    groups, _ = load_checkpoint(saved[-1])
    return Product(run, found, from_checkpoint(groups["target"] or groups["student"], float(found["student.alpha"])))


@torch.no_grad()
def unet_step(unet: Any, guidance_scale: float) -> Tensor:
    """A U-Net's output on fixed inputs, (2, C, h, w) fp32, computed in fp32."""
    generator = torch.Generator().manual_seed(0)
    side, config = 2 ** len(unet.config.block_out_channels), unet.config
    z = torch.randn(2, config.in_channels, side, side, generator=generator)
    c = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    w = omega_embedding(torch.full((2,), guidance_scale - 1.0)) if config.time_cond_proj_dim is not None else None
    return unet.float().eval()(z, torch.tensor([999, 259]), c, timestep_cond=w, return_dict=False)[0]


def compared(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> str:
    """A sentence with the largest difference, as a part of the largest value. Raises RunError above the dtype's bound."""
    difference = float((got - expected).abs().max() / expected.abs().max())
    bound = BOUNDS[dtype]
    if not difference <= bound:
        raise RunError(
            f"{what} does not give the trained model's output: off by {difference:.2g}, allowed is {bound:g}"
        )
    return f"{what}: reloaded, largest difference {difference:.2g} of the largest value (allowed {bound:g})"


@contextlib.contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """An export that fails its own check does not stay behind."""
    import shutil

    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise
