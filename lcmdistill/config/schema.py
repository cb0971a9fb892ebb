"""Every setting of a run, described once: field docstrings become `--help`, the comments in config.toml and the guide."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal


class Precision(StrEnum):
    """The dtype of autocast around the networks; schedules, conversions and losses are always fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class PredictionType(StrEnum):
    """What a network can predict."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"
    sample = "sample"


class TargetKind(StrEnum):
    """The target network: the live student or its EMA."""

    live = "live"
    ema = "ema"


class AutoOnOff(StrEnum):
    """A feature that is worthwhile in some runs only."""

    auto = "auto"
    on = "on"
    off = "off"


class Shard(StrEnum):
    """Whether several processes hold shards of the networks instead of copies."""

    auto = "auto"
    off = "off"
    full = "full"


class Tracker(StrEnum):
    """Experiment trackers, in addition to metrics.jsonl."""

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


MOST = 10**9
"the largest whole number that a setting accepts: none is meant to be larger, and libraries fail on some that are"


def setting(default: Any, **properties: Any) -> Any:
    """Return a field with properties that other parts of the program ask for.

    Args:
        default: The default value.
        **properties: `unset` (what the default None means, for help texts); `least`, `most` (bounds, included; without
            `most` a whole number is at most MOST); `below` (a bound, excluded); `mutable_on_resume` (a resumed run may be
            given another value); `decided_by_teacher` (the teacher's files decide unless it is set);
            `decided_by_memory_plan` (`run.memory` may change it); `only_for` (the kind of student that it acts on).
    """
    return field(default=default, metadata=properties)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """[teacher]: the network to distill."""

    model: str = "sd15"
    "Model to distill: tiny (bundled), an alias (such as sd15, sdxl, sd35-medium), a hub id, a folder or a .safetensors file."
    revision: str | None = None
    "Branch, tag or commit of a hub model."
    variant: str | None = None
    "Variant of the weight files, such as fp16."
    prediction_type: PredictionType | None = setting(None, unset="as its files state")
    "Override the teacher's prediction type if its files are wrong or do not state it."
    vae: str | None = setting(None, unset="the teacher's own")
    "Replacement for the teacher's VAE: a diffusers folder, a hub id, or a .safetensors file."
    text_encoder: tuple[str, ...] | None = setting(None, unset="the teacher's own")
    "Replacement for the teacher's text encoders, one each: a diffusers folder, a hub id, or a .safetensors file."
    base: str | None = setting(None, unset="none")
    "Model that supplies the parts which a .safetensors file lacks, such as VAE and text encoders for a U-Net."
    loras: tuple[str, ...] | None = None
    "LoRA to fuse into the teacher before it teaches: FILE or FILE:SCALE, such as style.safetensors:0.8. Repeatable."
    lora_checksums: tuple[str, ...] | None = setting(None, unset="those of the files", decided_by_teacher=True)
    "SHA-256 of each of these files. A run records them, and refuses files that have changed."
    vae_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    "Precision of the VAE. SDXL's own VAE overflows in fp16."
    vae_tiling: bool = False
    "Decode and encode image by image in tiles of 512 px: less memory; tile borders may be faintly visible."
    clip_skip: int | None = setting(None, least=0)
    "Number of CLIP layers to skip, counted as in diffusers: 1 is A1111's clip skip 2, or 3 for SDXL."
    drop: tuple[str, ...] | None = None
    "Component to leave out: safety_checker, which some licenses require keeping, or text_encoder_3, the T5 of SD 3."
    allow_pickle: bool = setting(False, mutable_on_resume=True)
    "Also load .bin weights, which can run any code. Never taken from a file; LCMDISTILL_ALLOW_PICKLE=1 for all commands."


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """[student]: what is trained, and how it starts."""

    omega_init: Literal["zero", "random"] = setting("zero", only_for="full")
    "Initial weights of a full student's omega projection. zero starts exactly at the teacher; the public scripts use random."
    start: str = "teacher"
    "Initial weights: the teacher's, those of a run or a LoRA (its path), or scratch: random ones, for full students."
    kind: Literal["full", "lora"] = "full"
    "A full network (distill) or a LoRA on the teacher (distill-lora). The command decides."
    target: TargetKind = TargetKind.ema
    "Target network: the live student, or an EMA of it."
    rank: int = setting(64, least=1, most=16384, only_for="lora")
    "LoRA rank r."
    alpha: float = setting(64.0, only_for="lora")
    "LoRA alpha. The update is scaled by alpha / r."
    dropout: float = setting(0.0, least=0, below=1, only_for="lora")
    "LoRA dropout."
    offload_target: bool = setting(False, mutable_on_resume=True, decided_by_memory_plan=True)
    "Keep the EMA's fp32 weights on the CPU and compute with a copy in the networks' precision."
    quantize_base: Literal["none", "int8", "fp8", "nf4"] = setting("none", decided_by_memory_plan=True, only_for="lora")
    "Quantize the frozen linear layers under the LoRA, which teacher and student share: less memory, slightly other weights."
    target_modules: tuple[str, ...] = setting(
        LORA_MODULES, unset="those of the published LCM-LoRAs", decided_by_teacher=True, only_for="lora"
    )
    "Layers that get a LoRA, matched by name suffix."
    lora_relative_to: Literal["teacher", "base"] = setting("teacher", only_for="lora")
    "teacher: the LoRA is applied on top of the teacher's LoRAs. base: the file contains those LoRAs as well."


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """[data]: the training data and how it is prepared."""

    sources: tuple[str, ...] = ("teacher",)
    "Training data: image folder, .tar shards (folder, file, URL or braces), tiny, or teacher to train without a data set."
    prompts: str | None = setting(None, unset="a bundled list")
    "Text file with one prompt per line, for the source teacher."
    resolution: int = setting(512, least=1, most=16384, decided_by_teacher=True)
    "Training resolution in pixels, a multiple of the VAE's factor. Other teachers use their native resolution."
    max_samples: int | None = setting(
        None, least=1, unset="what the run can use, or one per prompt", mutable_on_resume=True
    )
    "Maximum number of samples to prepare."
    buckets: tuple[str, ...] | None = setting(None, unset="one square")
    "Aspect-ratio buckets: crop each image to the nearest of several sizes, auto or HEIGHTxWIDTH in pixels."
    crop: Literal["center", "random"] = "center"
    "Which part of a resized image is kept."
    flip: bool = False
    "Mirror each image horizontally with probability 1/2."
    caption_drop: float = setting(0.0, least=0, most=1)
    "Fraction of captions that training replaces by the empty prompt, 0 to 1."
    min_size: int = setting(0, least=0)
    "Skip images whose shorter side has fewer pixels."
    max_watermark: float | None = setting(None, unset="keep all")
    "Skip images whose metadata state a pwatermark above this value. Images without that entry are kept."
    holdout: float = setting(0.05, least=0, most=0.5)
    "Share of the samples of your own data held out of training to validate and evaluate: 4 to 200; none of fewer than 40."
    guidance_scale: float = setting(7.5, decided_by_teacher=True)
    "Guidance scale of the images that the source teacher generates (omega + 1). Trajectories use the objective's omega."
    teacher_steps: int = setting(20, least=1, most=1000)
    "DPM-Solver++ steps of the images that the source teacher generates; of a trajectory, its solver's evaluations."
    trajectory: int = setting(0, least=0)
    "States of the teacher's own trajectory per generated sample: training starts on it, such as 8. 0 noises finished latents."
    teacher_cache_samples: int = setting(0, least=0)
    "Noises and times per sample for which teacher outputs are computed beforehand and cached. 0 caches none."
    cache: Literal["on", "off"] = "on"
    "off encodes images while it trains, and keeps none: for data that no disk holds. Each process reads its own shards."
    cache_dir: str | None = setting(None, unset="~/.cache/lcmdistill", mutable_on_resume=True)
    "Folder of cached latents and teacher outputs, shared between runs."
    cache_limit: float = setting(200.0, least=0, mutable_on_resume=True)
    "Size limit of that folder in GB. Least recently used entries are evicted first, never those of this run."


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """[optim]: the optimizer and the size of a step."""

    optimizer: Literal["adamw", "adamw8bit"] = setting("adamw", decided_by_memory_plan=True)
    "Optimizer: AdamW, or the 8-bit AdamW of bitsandbytes (CUDA only)."
    learning_rate: float = setting(8e-6, least=0)
    "Learning rate (AdamW)."
    batch_size: int = setting(4, least=1, most=65536, decided_by_memory_plan=True)
    "Batch size per process (GPU)."
    gradient_accumulation_steps: int = setting(3, least=1, most=65536, decided_by_memory_plan=True)
    "Gradient accumulation steps."
    max_train_steps: int = setting(4000, least=1, mutable_on_resume=True)
    "Number of optimizer steps."
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    "Learning rate schedule after the warmup."
    warmup_steps: int = setting(0, least=0)
    "Steps over which the learning rate rises from 0."
    weight_decay: float = setting(0.0, least=0)
    "Weight decay (AdamW)."
    beta1: float = setting(0.9, least=0, below=1)
    "First beta (AdamW)."
    beta2: float = setting(0.999, least=0, below=1)
    "Second beta (AdamW)."
    adam_eps: float = setting(1e-8, least=0)
    "Epsilon (AdamW)."
    max_grad_norm: float = setting(1.0, least=0)
    "Maximum gradient norm. 0 turns clipping off."


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """[run]: the output folder, the seed, and how often to log, save and validate."""

    output: str | None = setting(None, unset="runs/TEACHER-OBJECTIVE, with -lora for a LoRA", mutable_on_resume=True)
    "Output folder of the run."
    seed: int = setting(0, least=0, most=2**63 - 1)
    "Random seed."
    precision: Precision = Precision.auto
    "Mixed precision. auto is bf16 or fp16 on a GPU that supports it, and fp32 on a CPU."
    device: str = setting("auto", mutable_on_resume=True)
    "Device: auto, cpu, cuda, cuda:1, mps."
    memory: str = setting("auto", mutable_on_resume=True)
    "GPU memory limit in GiB (12 for a 12 GB card) that the plan must meet: a number, auto (the free memory) or off."
    gradient_checkpointing: bool = setting(False, mutable_on_resume=True, decided_by_memory_plan=True)
    "Gradient checkpointing: recompute activations in the backward pass, for less memory and about a sixth more time."
    shard: Shard = setting(Shard.auto, mutable_on_resume=True, decided_by_memory_plan=True)
    "Shard weights, gradients and moments over the processes (FSDP2) instead of copying them. auto: if they do not fit one GPU."
    compile: AutoOnOff = setting(AutoOnOff.auto, mutable_on_resume=True)
    "Use torch.compile: faster steps after minutes of compilation. auto: full students on CUDA, from 2000 steps per shape."
    log_every: int = setting(10, least=1, mutable_on_resume=True)
    "Steps between two lines of metrics."
    checkpoint_every: int = setting(200, least=1, mutable_on_resume=True)
    "Steps between two checkpoints."
    keep_checkpoints: int = setting(2, least=1, mutable_on_resume=True)
    "Number of most recent checkpoints to keep."
    validate_every: int = setting(200, least=0, mutable_on_resume=True)
    "Steps between two validation grids. 0 turns validation off."
    validation_prompts: tuple[str, ...] = setting((), mutable_on_resume=True)
    "Prompts of the validation grid. The default is a fixed list."
    validation_guidance_scale: float | None = setting(
        None, unset="the middle of the trained range", mutable_on_resume=True
    )
    "Guidance scale of the validation grid (diffusers' convention, omega + 1)."
    best_metric: Literal["none", "rmse_1", "rmse_2", "rmse_4", "rmse_8", "ssim_1", "ssim_2", "ssim_4", "ssim_8"] = (
        setting("ssim_4", mutable_on_resume=True)
    )
    "Metric that selects checkpoints/best: agreement with the teacher in validation, at that many steps."
    profile: int = setting(0, least=0, mutable_on_resume=True)
    "Steps to trace with torch.profiler into RUN/profile/, after a warmup of 3. 0 turns it off."
    report_to: Tracker = setting(Tracker.none, mutable_on_resume=True)
    "Experiment tracker, in addition to metrics.jsonl."
    push_to_hub: str | None = setting(None, mutable_on_resume=True)
    "Upload the result and its model card to this hub repository (OWNER/NAME). Requires a login."
    hub_private: bool = setting(False, mutable_on_resume=True)
    "Make a new hub repository private. An existing one keeps its visibility."


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run. `objective` is the chosen objective's own dataclass."""

    objective_name: str = "lcm"
    objective: Any = None
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunSection = field(default_factory=RunSection)
    chosen: frozenset[str] = field(default=frozenset(), compare=False)
    "Keys that were set explicitly or by the defaults of a known teacher: the teacher's files do not override them."
    explicit: frozenset[str] = field(default=frozenset(), compare=False)
    "Keys that the command line or a file set."


SECTIONS: dict[str, type] = {
    "teacher": TeacherConfig,
    "student": StudentConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "run": RunSection,
}


def known_sections() -> str:
    """Return the names of the sections, for messages."""
    return ", ".join(sorted([*SECTIONS, "objective"]))
