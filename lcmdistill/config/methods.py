"""What the world is told of a run's method: its name, its paper, what samples it, and what it does with guidance. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

ETA = 0.3
"gamma, the share of fresh noise in a step of a TCDScheduler (Zheng et al. 2024)"


@dataclass(frozen=True)
class Method:
    """full, lora: what such a student is called; how: what was done with its teacher; scheduler: diffusers' class that
    samples it; sampler: its name in user interfaces; tags: of the model card."""

    full: str
    lora: str
    paper: str
    how: str = "distilled from"
    scheduler: str = "LCMScheduler"
    sampler: str = "LCM"
    tags: tuple[str, ...] = ("consistency-model",)

    def call(self, steps: int, guidance_scale: float) -> str:
        """What is written in Python to draw with its pipeline."""
        eta = f", eta={ETA}" if self.scheduler == "TCDScheduler" else ""
        return f'pipeline("a prompt", num_inference_steps={steps}, guidance_scale={guidance_scale:g}{eta})'


_LCM = ("lcm", "latent-consistency-model")

METHODS: dict[str, Method] = {
    "lcm": Method("LCM", "LCM-LoRA", "Luo et al. 2023, arXiv:2310.04378", tags=_LCM),
    "lcf": Method("LCM", "LoRA on an LCM", "Luo et al. 2023, arXiv:2310.04378", how="fine-tuned from", tags=_LCM),
    "tcd": Method(
        "TCD student",
        "TCD-LoRA",
        "Zheng et al. 2024, arXiv:2402.19159",
        scheduler="TCDScheduler",
        sampler="TCD",
        tags=("tcd", "trajectory-consistency-distillation"),
    ),
    "cd": Method("consistency model", "consistency LoRA", "Song et al. 2023, arXiv:2303.01469"),
    "ct": Method("consistency model", "consistency LoRA", "Song et al. 2023, arXiv:2303.01469", how="trained from"),
    "ict": Method(
        "consistency model", "consistency LoRA", "Song & Dhariwal 2023, arXiv:2310.14189", how="trained from"
    ),
}

FREE_GUIDANCE = 2.0
"the guidance scale to draw with where CFG acts on the student; high ones burn the colours of so few steps"


class OmegaRange(NamedTuple):
    """What omega was trained with; diffusers' guidance_scale is one more."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """As a guidance scale, the middle of the range."""
        return (self.low + self.high) / 2 + 1

    @property
    def omega(self) -> str:
        """In words: "omega 7.5", "omega 2 to 14"."""
        return f"omega {self.low:g}" if self.low == self.high else f"omega {self.low:g} to {self.high:g}"

    @property
    def scale(self) -> str:
        """The same as diffusers' guidance_scale: "8.5", "3 to 15"."""
        return f"{self.low + 1:g}" if self.low == self.high else f"{self.low + 1:g} to {self.high + 1:g}"


def describe_objective(settings: Mapping[str, Any]) -> str:
    """How the objective steps, {"section.key": value}: "ddim solver, k = 20"."""
    words = {"solver": "{} solver", "skip": "k = {}", "scales": "N = {}", "s1": "N growing to {}"}
    return ", ".join(w.format(settings[f"objective.{k}"]) for k, w in words.items() if f"objective.{k}" in settings)


def a1111_clip_skip(count: int, *, is_xl: bool) -> int:
    """A1111's number for diffusers' clip_skip: it counts from the layer that is read, which of SDXL is the last but one."""
    return count + (2 if is_xl else 1)


def omega_range(settings: Mapping[str, Any]) -> OmegaRange | None:
    """The omegas of a run, {"section.key": value}; None if its method leaves guidance free: CFG acts on the student."""
    if settings.get("objective.guidance") == "free" or "objective.w_min" not in settings:
        return None
    return OmegaRange(settings["objective.w_min"], settings["objective.w_max"])
