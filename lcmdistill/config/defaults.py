"""Defaults that depend on the teacher, the objective and the kind of student."""

from typing import Any

from lcmdistill.config.schema import TargetKind

# The defaults of `distill` are those of the LCM paper (Luo et al. 2023, arXiv:2310.04378) that make a student in a day on
# one GPU: its learning rate of 8e-6, and the 4,000 steps that its authors found enough, with the public script's batch of 12.
#
# Defaults of a teacher known by name. Any other teacher has those of the dataclasses and `Teacher.usual`.
ALIAS_DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "data.sources": ("tiny",),
        "data.resolution": 64,
        "data.guidance_scale": 4.5,
        "objective.w_min": 1.0,
        "objective.w_max": 5.0,
        "optim.batch_size": 32,
        "optim.gradient_accumulation_steps": 1,
        "optim.learning_rate": 1e-4,
        "optim.max_train_steps": 400,
        "run.checkpoint_every": 200,
        "run.validate_every": 200,
    },
    "sd21": {"data.resolution": 768},
    "sdxl": {"data.resolution": 1024},
    "ssd1b": {"data.resolution": 1024},
}

# Additional defaults of `distill-lora`, for any teacher and for those known by name. The public LoRA script keeps no EMA,
# and the LCM-LoRA report fixes omega, because an adapter has no input for it. Learning rate, batch and length are the script's.
LORA_DEFAULTS: dict[str, Any] = {
    "student.target": TargetKind.live,
    "objective.w_min": 7.5,
    "objective.w_max": 7.5,
    "optim.learning_rate": 1e-4,
    "optim.max_train_steps": 1000,
}

LORA_ALIAS_DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "student.rank": 16,
        "student.alpha": 16.0,
        "student.target": TargetKind.ema,
        "objective.w_min": 3.5,
        "objective.w_max": 3.5,
        "optim.learning_rate": 1e-3,
        "optim.max_train_steps": 400,
    }
}
