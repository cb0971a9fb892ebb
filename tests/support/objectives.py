"""Helpers that several tests share."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Conditioning, Network
from lcmdistill.objectives import OBJECTIVES
from tests.support.oracle import oracle_models

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

NULL = Conditioning({"prompt_embeds": torch.full((1, 3, 2), -0.2)})


def gaussian_batch(size: int, std: float = 0.5) -> Batch:
    """Data N(mean of the prompt, std^2), as the oracle's teacher believes it to be."""
    g = torch.Generator().manual_seed(0)
    means = torch.linspace(-1, 1, size).view(-1, 1, 1)
    latents = means[..., None] + std * torch.randn(size, 2, 4, 4, generator=g)
    return Batch(latents, Conditioning({"prompt_embeds": means.expand(-1, 3, 2).clone()}))


def fields_of(objective: str) -> set[str]:
    return {field.name for field in dataclasses.fields(OBJECTIVES[objective])}


def made(objective: str, *, step: int | None = None, steps: int = 1024, **fields: Any) -> Any:
    """An objective with those of the fields that it has; `step` apart, in whichever way it says how far apart t and s are."""
    known = fields_of(objective)
    if step is not None:
        size = {"skip": step, "scales": steps // step + 1, "s0": steps // step, "s1": steps // step}
        size |= {"q": 8 * steps / step, "stages": 1}  # so that 1 - r / t, which is n(t) / q, is at most about a half
        fields = {**size, **fields}
    return OBJECTIVES[objective](**{key: value for key, value in fields.items() if key in known})


CONSISTENCY = [name for name in OBJECTIVES if OBJECTIVES[name].info.train_step == "consistency"]
"the methods of the contract `Objective`"

each_objective = pytest.mark.parametrize("objective", CONSISTENCY)


def asked_of(objective: str, schedule: NoiseSchedule, **fields: Any) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
    """(t, w) of every question to each network, for 64 samples."""
    exact = oracle_models(schedule, NULL)
    asked: dict[str, list[tuple[Tensor, Tensor | None]]] = {"teacher": [], "student": [], "target": []}

    def spy(role: str) -> Network:
        def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
            asked[role].append((t, w))
            return exact.teacher.network(z, t, c, w)

        return network

    models = exact
    for role in asked:
        models = models.with_network(role, spy(role))
    own = made(objective, solver="ddim", w_min=3.0, w_max=4.0, **fields)
    models.loss(own, gaussian_batch(64), Rng(0, 0, range(64)))
    return asked
