"""Every setting of a run: one frozen tree, its defaults, and what they mean in plain words. No torch here."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal


class Precision(StrEnum):
    """What autocast does around the network; schedules, conversions and the loss are fp32 always."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class PredictionType(StrEnum):
    """What a network can predict, spelled out so that --help needs no torch."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"
    sample = "sample"


class TargetKind(StrEnum):
    """What the student is compared with."""

    live = "live"
    ema = "ema"


class AutoOnOff(StrEnum):
    """Of what is worth it in some runs only."""

    auto = "auto"
    on = "on"
    off = "off"


class Tracker(StrEnum):
    """Where metrics go besides metrics.jsonl."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"


# The layers of the published LCM-LoRAs (Luo et al. 2023b). time_cond_proj is not there, and must not be: the programs
# that read LoRA files know no such layer.
LORA_MODULES = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """[teacher]: the network to distil."""

    model: str = "sd15"
    "tiny, an alias (sd15, sd21, sdxl, ssd1b), a hub id, a local diffusers folder, or a .safetensors checkpoint"
    revision: str | None = None
    "branch, tag or commit of a hub model"
    variant: str | None = None
    "weight files' variant, such as fp16"
    prediction_type: PredictionType | None = None
    "what the network predicts, where its files are wrong or do not say; by default what they say"
    vae: str | None = None
    "a VAE in place of its own: a diffusers folder, a hub id, or a .safetensors file"
    vae_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    "arithmetic inside the VAE; in fp16 SDXL's own overflows"
    vae_tiling: bool = False
    "the VAE works image by image, in tiles of 512 px: less memory, and edges of tiles that may just be seen"
    clip_skip: int | None = None
    "CLIP's last layers that have no part in what a prompt says, in diffusers' count: 1 is A1111's clip skip 2, and 3 of SDXL"
    drop: tuple[str, ...] | None = None
    "parts that the student's pipeline goes without: safety_checker, which a teacher's licence may ask to keep"
    allow_pickle: bool = False
    "also read .bin weights; a pickle can run any code, so only from an author you trust"


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """[student]: how the student starts."""

    omega_init: Literal["zero", "random"] = "zero"
    "first weights of a full student's omega projection: zero starts exactly at the teacher, random is the scripts' way"
    start: Literal["teacher", "scratch"] = "teacher"
    "first weights of a full student: the teacher's, or fresh ones, as Consistency Training was published with"
    kind: Literal["full", "lora"] = "full"
    "a network of its own, or an adapter on the teacher's; the command says which"
    target: TargetKind = TargetKind.ema
    "the target network: an EMA of the student, or the student itself"
    rank: int = 64
    "r of a LoRA: the rank of each layer's update"
    alpha: float = 64.0
    "alpha of a LoRA: its update is scaled by alpha / r"
    dropout: float = 0.0
    "dropout on a LoRA's inputs, at least 0 and below 1"
    offload_target: bool = False
    "the EMA target's fp32 weights rest on the CPU, and the device computes with a copy in the precision of the networks"
    target_modules: tuple[str, ...] = LORA_MODULES
    "which of the teacher's layers get a LoRA, by the end of their names"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """[data]: what is learnt on, and how it is prepared."""

    sources: tuple[str, ...] = ("teacher",)
    "shards (folder, file, URL, braces), image folders, tiny, or teacher for no data set at all"
    prompts: str | None = None
    "file of prompts, one a line, for the source `teacher`; by default the bundled list"
    resolution: int = 512
    "side of the training images in pixels, a multiple of the VAE's factor"
    max_samples: int | None = None
    "most samples to prepare; by default what the run can use (files), or one a prompt (teacher)"
    buckets: tuple[str, ...] | None = None
    "sizes that images are cut to instead of one square, each to the nearest: auto, or HEIGHTxWIDTH in pixels"
    crop: Literal["center", "random"] = "center"
    "which part of a resized image is kept"
    flip: bool = False
    "mirror each image left to right with probability one half"
    caption_drop: float = 0.0
    "share of captions replaced by the empty prompt in training, 0 to 1"
    min_size: int = 0
    "skip images whose shorter side has fewer pixels"
    max_watermark: float | None = None
    "skip images whose metadata say pwatermark above this; images that do not say are kept"
    guidance_scale: float = 7.5
    "guidance with which the source `teacher` draws (diffusers' convention, omega + 1)"
    teacher_steps: int = 20
    "DPM-Solver++ steps with which the source `teacher` draws"
    teacher_cache_samples: int = 0
    "noises and times a sample that the teacher is asked about beforehand, its answers kept; 0 asks at every step, always anew"
    cache_dir: str | None = None
    "where prepared latents are kept and shared between runs; by default ~/.cache/lcmdistill"
    cache_limit: float = 200.0
    "GB that what is kept there may take: what no run has used for longest goes first, and nothing that this run needs"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """[optim]: AdamW and the size of a step."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    "AdamW, or bitsandbytes' with moments of eight bits, on CUDA"
    learning_rate: float = 1e-6
    "AdamW's learning rate after the warm-up"
    batch_size: int = 4
    "samples a process takes at once"
    gradient_accumulation_steps: int = 3
    "micro-batches summed up for one step"
    max_train_steps: int = 1000
    "optimiser steps of the whole run"
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    "what the learning rate does after the warm-up"
    warmup_steps: int = 0
    "steps over which the learning rate rises from 0"
    weight_decay: float = 0.0
    "AdamW's weight decay"
    beta1: float = 0.9
    "AdamW's first beta"
    beta2: float = 0.999
    "AdamW's second beta"
    adam_eps: float = 1e-8
    "AdamW's epsilon"
    max_grad_norm: float = 1.0
    "gradients are clipped to this norm; 0 leaves them alone"


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """[run]: where, with what seed, and how often to tell."""

    output: str | None = None
    "the run's folder; by default runs/TEACHER-OBJECTIVE"
    seed: int = 0
    "the one seed that every random draw comes from"
    precision: Precision = Precision.auto
    "arithmetic inside the networks; auto is bf16 or fp16 on a GPU that has it, fp32 on a CPU"
    device: str = "auto"
    "auto, cpu, cuda, cuda:1, mps, ..."
    memory: str = "auto"
    "GPU memory limit in GiB, the unit of a 12 GB card: a number, auto (the free memory of a GPU; no limit on a CPU) or off"
    gradient_checkpointing: bool = False
    "recompute activations in the backward pass: less memory, about a third more time"
    compile: AutoOnOff = AutoOnOff.auto
    "compile the networks: faster steps, minutes before the first; auto: full students on CUDA, from 2000 steps a shape on"
    log_every: int = 10
    "steps between two lines of metrics"
    checkpoint_every: int = 200
    "steps between two checkpoints"
    keep_checkpoints: int = 2
    "how many of the last checkpoints are kept"
    validate_every: int = 200
    "steps between two validation grids; 0 draws none"
    validation_prompts: tuple[str, ...] = ()
    "prompts of the validation grid; by default a few fixed ones"
    validation_guidance_scale: float | None = None
    "guidance of the validation grid (diffusers' convention, omega + 1); by default the middle of the trained range"
    best_metric: Literal["none", "rmse_1", "rmse_2", "rmse_4", "rmse_8", "ssim_1", "ssim_2", "ssim_4", "ssim_8"] = (
        "ssim_4"
    )
    "what checkpoints/best is chosen by: agreement with the teacher in validation, at so many steps"
    profile: int = 0
    "steps to trace with torch.profiler, after a warm-up of 3, into the run's profile folder; 0 traces none"
    report_to: Tracker = Tracker.none
    "tracker besides metrics.jsonl"
    push_to_hub: str | None = None
    "hub repository, OWNER/NAME, that the finished product and its card are uploaded to"
    hub_private: bool = False
    "make a new hub repository private; an existing one keeps its visibility"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is told. `objective` holds the fields of the chosen objective's own dataclass."""

    objective_name: str = "lcm"
    objective: Any = None
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunSection = field(default_factory=RunSection)
    chosen: frozenset[str] = field(default=frozenset(), compare=False)
    "the keys that somebody chose, be it for a teacher known by name: what a teacher's files say does not touch them"


SECTIONS: dict[str, type] = {
    "teacher": TeacherConfig,
    "student": StudentConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "run": RunSection,
}


def known_sections() -> str:
    """The sections of a configuration, for messages."""
    return ", ".join(sorted([*SECTIONS, "objective"]))
