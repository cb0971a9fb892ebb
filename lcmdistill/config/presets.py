"""Published settings by name, as differences from the defaults. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lcmdistill.config.schema import LORA_MODULES, TargetKind


class PresetName(StrEnum):
    """The keys of PRESETS, spelled out for --help."""

    paper = "paper"
    diffusers = "diffusers"
    lcm_lora = "lcm-lora"
    fast = "fast"


@dataclass(frozen=True)
class Preset:
    """Published settings, {"section.key": value}, for either command.

    Attributes:
        source: Where they were published.
        full: For full students; None if the source has none.
        lora: For LoRAs; None if the source has none.
        both: For both. A value of None leaves the key to the teacher.
    """

    source: str
    full: Mapping[str, Any] | None = None
    lora: Mapping[str, Any] | None = None
    both: Mapping[str, Any] = field(default_factory=dict)

    def values(self, kind: str) -> Mapping[str, Any] | None:
        """Return the preset's settings for `distill` (kind "full") or `distill-lora` ("lora"), or None if it has none."""
        values = self.lora if kind == "lora" else self.full
        return None if values is None else {**self.both, **values}


PRESETS: dict[str, Preset] = {
    "paper": Preset(
        "Luo et al. 2023, arXiv:2310.04378, 512 px; the batch of 72 is per process",
        both={
            "objective.skip": 20,
            "objective.times": "all",
            "objective.solver": "ddim",
            "objective.distance": "l2",
            "objective.w_min": 2.0,
            "objective.w_max": 14.0,
        },
        full={
            "objective.ema_decay": 0.999943,
            "student.target": TargetKind.ema,
            "optim.learning_rate": 8e-6,
            "optim.batch_size": 4,
            "optim.gradient_accumulation_steps": 18,
            "optim.max_train_steps": 100_000,
        },
    ),
    "diffusers": Preset(
        "the public consistency distillation scripts of diffusers",
        both={
            "objective.skip": 20,
            "objective.times": "grid",
            "objective.solver": "ddim",
            "objective.distance": "huber",
            "objective.w_min": None,  # 5, and 3 for SDXL
            "objective.w_max": 15.0,
            "optim.batch_size": 4,
            "optim.gradient_accumulation_steps": 3,
            "optim.max_train_steps": 1000,
            "optim.lr_scheduler": "constant",
            "optim.weight_decay": 0.0,
            "optim.max_grad_norm": 1.0,
        },
        full={
            "objective.ema_decay": 0.95,
            "student.target": TargetKind.ema,
            "student.omega_init": "random",
            "optim.learning_rate": 1e-6,
        },
        lora={
            "student.target": TargetKind.live,
            "student.rank": 64,
            "student.alpha": 64.0,
            "student.target_modules": LORA_MODULES,
            "optim.learning_rate": 1e-4,
        },
    ),
    "lcm-lora": Preset(
        "Luo et al. 2023b, arXiv:2311.05556; the learning rate, which it does not state, is that of the public script",
        lora={
            "objective.w_min": 7.5,
            "objective.w_max": 7.5,
            "student.target": TargetKind.live,
            "student.rank": 64,
            "student.alpha": 64.0,
            "student.target_modules": LORA_MODULES,
            "optim.learning_rate": 1e-4,
        },
    ),
    "fast": Preset(
        "a first look, not from a paper: a fifth of the steps, and half the steps for the teacher's images",
        both={
            "data.teacher_steps": 10,
            "optim.max_train_steps": 200,
            "run.checkpoint_every": 100,
            "run.validate_every": 100,
        },
        full={"optim.learning_rate": 8e-6},  # the paper's
        lora={"student.rank": 16, "student.alpha": 16.0},
    ),
}
