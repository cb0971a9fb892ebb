"""TDM learns a mixture of Gaussians in the plane."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcmdistill.diffusion.ema import ema_update
from lcmdistill.diffusion.parameterization import X0Eps
from lcmdistill.diffusion.schedules import vp_schedule
from lcmdistill.diffusion.types import Conditioning, TeacherNetwork
from lcmdistill.objectives.tdm import TrajectoryDistributionMatching as Tdm
from tests.support.objectives import SD15

SCHEDULE = vp_schedule(SD15)

MEANS, STD = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]), 0.2


def mixture(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
    """The exact denoiser of four equal Gaussians in the plane. z: (B, 2, 1, 1)."""
    a, s, x = SCHEDULE.alpha(t).view(-1, 1), SCHEDULE.sigma(t).view(-1, 1), z.flatten(1)
    variance = a**2 * STD**2 + s**2
    offset = x[:, None] - a[:, None] * MEANS
    share = (-offset.square().sum(-1) / (2 * variance)).softmax(1)
    x0 = (share[..., None] * (MEANS + (a * STD**2 / variance)[:, None] * offset)).sum(1)
    return X0Eps(x0.view_as(z), ((x - a * x0) / s).view_as(z))


class Corrected(nn.Module):
    """The mixture's denoiser plus what a small network learns."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        a, s = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        inputs = torch.cat([z.flatten(1), t[:, None] / 1000, a.flatten(1)], 1)
        x0 = mixture(z, t, c, w).x0 + self.layers(inputs).view_as(z)
        return X0Eps(x0, (z - a * x0) / s)


class BatchRng:
    """Draws for a whole batch at once, which is faster than those of the samples' places."""

    device = "cpu"

    def __init__(self, size: int) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(0)

    def normal(self, stream: str, shape: Any) -> Tensor:
        return torch.randn(self.size, *shape, generator=self.generator)

    def uniform(self, stream: str, *, fresh: bool = False) -> Tensor:
        return torch.rand(self.size, generator=self.generator)

    def integers(self, stream: str, high: int) -> Tensor:
        return torch.randint(high, (self.size,), generator=self.generator)


def energy_distance(one: Tensor, other: Tensor) -> float:
    between, within = torch.cdist(one, other).mean(), torch.cdist(one, one).mean() + torch.cdist(other, other).mean()
    return (2 * between - within).item()


def of_size(size: int, seed: int = 1) -> tuple[Conditioning, Tensor, Tensor]:
    """No prompt, samples of the mixture, and noise."""
    g = torch.Generator().manual_seed(seed)
    samples = MEANS[torch.randint(4, (size,), generator=g)] + STD * torch.randn(size, 2, generator=g)
    return Conditioning({"prompt_embeds": torch.zeros(size, 1, 1)}), samples, torch.randn(size, 2, 1, 1, generator=g)


@pytest.mark.parametrize(("target", "decoupled"), [("x0", False), ("score", False), ("score", True)])
def test_a_mixture_is_learnt_in_two_steps(target: Any, decoupled: bool) -> None:
    """Of two DDIM steps the teacher itself has an energy distance of .32 to its own distribution."""
    objective = Tdm(segments=2, critic_target=target, distance="l2", w_min=0.0, w_max=0.0, decoupled=decoupled)
    student, critic, average = Corrected(0), Corrected(1), Corrected(0)
    optimizers = [torch.optim.Adam(net.parameters(), lr=5e-3, betas=(0.0, 0.95)) for net in (student, critic)]
    cond, _, _ = of_size(256)
    teacher = TeacherNetwork(mixture, Conditioning({"prompt_embeds": torch.zeros(1, 1, 1)}))
    rng: Any = BatchRng(256)

    def step(optimizer: Any, loss: Tensor) -> None:
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    everyone, samples, noise = of_size(2000)

    @torch.no_grad()
    def distance() -> float:
        images = objective.rollout(average, SCHEDULE, everyone, noise).x0[0].flatten(1)
        shares = torch.cdist(images, MEANS).argmin(1).bincount(minlength=4) / 2000
        assert shares.min() > 0.15  # no mode is lost
        return energy_distance(images, samples)

    assert distance() > 0.3
    for _ in range(400):
        with torch.no_grad():
            rollout = objective.rollout(student, SCHEDULE, cond, rng.normal("noise", (2, 1, 1)))
        step(optimizers[1], objective.critic_loss(critic, SCHEDULE, cond, rollout, rng))
        step(optimizers[0], objective.student_loss(student, critic, teacher, SCHEDULE, cond, rollout, rng).loss)
        ema_update(average.parameters(), student.parameters(), 0.95)
    assert distance() < 0.05
