"""The options of the training commands, told in plain words: each one once, with the setting that it stands for."""

import math
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lcmdistill.config.presets import PresetName
from lcmdistill.config.schema import (
    AutoOnOff,
    Precision,
    PredictionType,
    TargetKind,
    Tracker,
)
from lcmdistill.diffusion import SOLVERS
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.utils.errors import UsageError

Private = Annotated[
    bool,
    typer.Option(
        "--private", help="With --push-to-hub: a new repository is private; an existing one keeps its visibility."
    ),
]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback when something fails.")]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]

PushToHub = Annotated[
    str | None,
    typer.Option(help="Upload the result and its model card to this hub repository (OWNER/NAME); needs a login."),
]


def finite(value: float | None) -> float | None:
    """A number that is given must be one."""
    if value is not None and not math.isfinite(value):
        raise UsageError(f"--guidance-scale is {value}; it must be a finite number")
    return value


def one_of(registry: Iterable[str]) -> Any:
    """Return the type of an option that takes a key of a registry."""
    return Literal[tuple(registry)]  # pyright: ignore[reportInvalidTypeForm]


def _option(kind: Any, text: str, *names: str) -> Any:
    return Annotated[kind, typer.Option(*names, help=text)]


WHAT: dict[str, Any] = {
    "teacher": _option(
        str | None,
        "tiny, an alias (sd15, sd21, sdxl, ssd1b), a hub id, a local diffusers folder, or a .safetensors checkpoint.  "
        "[default: sd15]",
    ),
    "data": _option(
        list[str] | None,
        "What to learn on; repeatable: image folder, .tar shards (folder, file, URL, braces), tiny, or teacher for no "
        "data set at all.  [default: teacher; tiny for the tiny teacher]",
    ),
    "prompts": _option(str | None, "File of prompts, one a line, for --data teacher.  [default: a bundled list]"),
}
"what is distilled, and on what"

FULL: dict[str, Any] = {
    "output": _option(str | None, "The run's folder.  [default: runs/TEACHER-OBJECTIVE]"),
    "learning_rate": _option(float | None, "AdamW's learning rate.  [default: 1e-6; tiny 1e-4]"),
}
"of a full student"

LORA: dict[str, Any] = {
    "output": _option(str | None, "The run's folder.  [default: runs/TEACHER-OBJECTIVE-lora]"),
    "rank": _option(int | None, "r, the rank of each layer's update.  [default: 64; tiny 16]"),
    "alpha": _option(float | None, "The update is scaled by alpha / r.  [default: 64; tiny 16]"),
    "target": _option(
        TargetKind | None, "Target network: the live adapter, or an EMA of it.  [default: live; tiny ema]"
    ),
    "dropout": _option(float | None, "Dropout on the adapter's inputs.  [default: 0]"),
    "target_modules": _option(
        list[str] | None,
        "Layers to adapt, by the end of their names; repeatable.  [default: the published list]",
    ),
    "learning_rate": _option(float | None, "AdamW's learning rate.  [default: 1e-4; tiny 1e-3]"),
}
"of a LoRA"

HOW: dict[str, Any] = {
    "buckets": _option(
        list[str] | None,
        "Cut images to several sizes instead of one square, each to the nearest: auto, or HEIGHTxWIDTH; repeatable.",
    ),
    "objective": _option(one_of(OBJECTIVES) | None, "The method.  [default: lcm]"),
    "solver": _option(one_of(SOLVERS) | None, "The teacher's PF-ODE solver.  [default: ddim; cd heun]"),
    "guidance": _option(
        Literal["baked", "free"] | None,
        "lcm, tcd: baked into the student, or left free, so that CFG and negative prompts still act; lcf: as the LCM was "
        "trained, which a run tells.  [default: baked]",
    ),
    "skip": _option(
        int | None, "lcm, lcf, tcd: k, the teacher's time steps between the two points compared.  [default: 20]"
    ),
    "max_train_steps": _option(int | None, "Optimiser steps.  [default: 1000; tiny 400]"),
    "batch_size": _option(int | None, "Samples a process takes at once.  [default: 4; tiny 32]"),
    "gradient_accumulation_steps": _option(
        int | None, "Micro-batches summed up for one optimiser step.  [default: 3; tiny 1]"
    ),
    "resolution": _option(
        int | None,
        "Side of the training images in pixels; another teacher's is its own.  "
        "[default: 512; sd21 768, sdxl 1024, ssd1b 1024, tiny 64]",
    ),
    "seed": _option(int | None, "The one seed of every random draw.  [default: 0]"),
    "precision": _option(Precision | None, "Arithmetic inside the networks.  [default: auto]"),
    "memory": _option(
        str | None,
        "GPU memory limit in GiB (12 for a 12 GB card), met by gradient checkpointing, smaller micro-batches and the like: "
        "a number, auto (the free memory of a GPU) or off.  [default: auto]",
    ),
    "compile": _option(
        AutoOnOff | None,
        "Compile the networks: faster steps, minutes before the first; auto: full students on CUDA, in long runs.  "
        "[default: auto]",
    ),
    "device": _option(str | None, "auto, cpu, cuda, cuda:1, mps.  [default: auto]"),
    "revision": _option(str | None, "Branch, tag or commit of a hub teacher."),
    "prediction_type": _option(
        PredictionType | None, "What the teacher predicts, where its files are wrong or do not say."
    ),
    "vae": _option(
        str | None, "A VAE in place of the teacher's: a diffusers folder, a hub id, or a .safetensors file."
    ),
    "clip_skip": _option(
        int | None, "Layers of CLIP to skip, as diffusers counts: 1 is A1111's clip skip 2, and 3 of SDXL."
    ),
    "drop": _option(
        list[str] | None,
        "safety_checker: leave it out of the run's pipeline, which else carries the teacher's, as its licence may ask.",
    ),
    "variant": _option(str | None, "Variant of the teacher's weight files, such as fp16."),
    "profile": _option(int | None, "Trace this many steps with torch.profiler into RUN/profile/.  [default: 0]"),
    "report_to": _option(Tracker | None, "Tracker besides metrics.jsonl.  [default: none]"),
    "push_to_hub": PushToHub,
    "private": Private,
    "preset": _option(PresetName | None, "Published settings by name; a file and flags win over them."),
    "config": _option(Path | None, "TOML file of settings; flags win over it."),
    "set_": _option(
        list[str] | None, "Any setting, section.key=value; repeatable. --dry-run prints them all.", "--set"
    ),
    "dry_run": _option(bool, "Check everything, print the settings and an estimate, and stop.", "--dry-run"),
    "debug": Debug,
}
"of every training"

# The setting that each option stands for; the rest of HOW is about the command itself.
SETTINGS = {
    "teacher": "teacher.model",
    "revision": "teacher.revision",
    "variant": "teacher.variant",
    "prediction_type": "teacher.prediction_type",
    "vae": "teacher.vae",
    "clip_skip": "teacher.clip_skip",
    "drop": "teacher.drop",
    "data": "data.sources",
    "prompts": "data.prompts",
    "resolution": "data.resolution",
    "buckets": "data.buckets",
    "objective": "objective.name",
    "solver": "objective.solver",
    "guidance": "objective.guidance",
    "skip": "objective.skip",
    "max_train_steps": "optim.max_train_steps",
    "batch_size": "optim.batch_size",
    "gradient_accumulation_steps": "optim.gradient_accumulation_steps",
    "learning_rate": "optim.learning_rate",
    "output": "run.output",
    "seed": "run.seed",
    "precision": "run.precision",
    "memory": "run.memory",
    "compile": "run.compile",
    "device": "run.device",
    "profile": "run.profile",
    "report_to": "run.report_to",
    "push_to_hub": "run.push_to_hub",
    "private": "run.hub_private",
    "rank": "student.rank",
    "alpha": "student.alpha",
    "target": "student.target",
    "dropout": "student.dropout",
    "target_modules": "student.target_modules",
}


def takes(options: Mapping[str, Any]) -> Callable[[Callable[..., Path]], Callable[..., Path]]:
    """Give a function of **keywords these options for its signature, which is all that typer reads. None is their default,
    and False a flag's."""

    def with_options(command: Callable[..., Path]) -> Callable[..., Path]:
        parameters = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=False if kind.__origin__ is bool else None, annotation=kind)
            for name, kind in options.items()
        ]
        command.__signature__ = Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = dict(options)
        return command

    return with_options
