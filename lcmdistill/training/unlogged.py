"""What the steps since the last line of metrics reported. It is part of a checkpoint, so that a resumed run logs the same."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcmdistill.training.distributed import Accelerator, gather
from lcmdistill.training.micro_batches import NOISE_BINS, bin_by_noise
from lcmdistill.training.train_step import StepReport


class Unlogged:
    """Losses and a method's further numbers of some steps, on the device until they are read.

    Attributes:
        losses: The mean loss of each step.
        numbers: The further numbers of each step, by name.
        by_noise: This process's samples, from clean to noise: sums of their losses, and how many there were.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.losses: list[Tensor] = []
        self.numbers: dict[str, list[Tensor]] = {}
        self.by_noise = torch.zeros(2, NOISE_BINS, device=accelerator.device)

    def add(self, report: StepReport) -> Tensor:
        """Add a step, and return its mean loss."""
        loss = torch.zeros((), device=self._accelerator.device)
        for losses, noise_levels in zip(report.losses, report.noise_levels, strict=True):
            loss += losses.mean() / len(report.losses)
            self.by_noise += bin_by_noise(losses, noise_levels)
        for name, value in report.numbers.items():
            self.numbers.setdefault(name, []).append(value)
        self.losses.append(loss)
        return loss

    def state(self) -> dict[str, Any]:
        """Return the values for a checkpoint: means and sums over all processes. All processes call it."""
        # Each process gets them back: they go on as if nobody had stopped.
        losses = list(self._over_processes(self.losses).cpu()) if self.losses else []
        numbers = {name: list(self._over_processes(values).cpu()) for name, values in self.numbers.items()}
        by_noise = gather(self.by_noise, self._accelerator).sum(0).tolist()
        return {"unlogged": losses, "by_noise": by_noise, **({"unlogged_numbers": numbers} if numbers else {})}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""
        device = self._accelerator.device
        self.losses = [loss.to(device) for loss in state["unlogged"]]
        self.numbers = {k: [v.to(device) for v in values] for k, values in state.get("unlogged_numbers", {}).items()}
        if "by_noise" in state and self._accelerator.is_main_process:  # the sum over all processes
            self.by_noise.copy_(torch.tensor(state["by_noise"]))

    def means(self) -> tuple[float, dict[str, float], list[float | None]]:
        """Return the mean loss, the further numbers, and the loss by noise level, over all processes."""
        loss = float(gather(torch.stack(self.losses).mean(), self._accelerator).mean())
        numbers = {name: float(self._over_processes(values).mean()) for name, values in self.numbers.items()}
        sums, counts = gather(self.by_noise, self._accelerator).sum(0).tolist()
        return loss, numbers, [part / n if n else None for part, n in zip(sums, counts, strict=True)]

    def clear(self) -> None:
        """Forget all, after a line of metrics."""
        self.losses.clear()
        self.numbers.clear()
        self.by_noise.zero_()

    def _over_processes(self, values: list[Tensor]) -> Tensor:
        """Return the mean over all processes of one value per step."""
        return gather(torch.stack(values), self._accelerator).mean(0)
