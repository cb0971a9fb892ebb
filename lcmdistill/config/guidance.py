"""The range of guidance in training, in the paper's convention (omega) and in diffusers' (omega + 1)."""

from typing import NamedTuple

from lcmdistill.config.schema import RunConfig


class OmegaRange(NamedTuple):
    """The smallest and largest omega of a run; diffusers' guidance_scale is omega + 1."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The middle of the range, as a guidance scale."""
        return (self.low + self.high) / 2 + 1

    @property
    def omega(self) -> str:
        """The range in words: "omega 7.5", "omega 2 to 14"."""
        return f"omega {self.low:g}" if self.low == self.high else f"omega {self.low:g} to {self.high:g}"

    @property
    def scale(self) -> str:
        """The range as diffusers' guidance_scale: "8.5", "3 to 15"."""
        return f"{self.low + 1:g}" if self.low == self.high else f"{self.low + 1:g} to {self.high + 1:g}"


def omega_range(config: RunConfig) -> OmegaRange | None:
    """Return the range of a run; None if its objective does not distill guidance, so that CFG acts on the student."""
    objective = config.objective
    if getattr(objective, "guidance", None) == "free" or not hasattr(objective, "w_min"):
        return None
    return OmegaRange(objective.w_min, objective.w_max)
