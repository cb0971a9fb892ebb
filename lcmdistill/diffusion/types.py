"""What objectives work with: batches, conditioning and networks.

Shapes: B batch, C latent channels, h w latent size, L tokens, D width of a token's embedding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lcmdistill.diffusion.parameterization import X0Eps, guided, network_input, to_x0_eps
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.solvers import Denoiser
from lcmdistill.diffusion.trajectory import Trajectory


@dataclass(frozen=True)
class Conditioning:
    """The inputs of a network besides z, t and omega: named tensors, each (B, ...).

    "prompt_embeds" is (B, L, D). Only the teacher family knows the other names.
    """

    values: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor by its name."""
        return self.values[name]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Conditioning":
        """Return a copy on another device, with floats in another dtype."""
        return self._each(lambda value: value.to(device, dtype if value.is_floating_point() else None))

    def expand(self, size: int) -> "Conditioning":
        """Repeat one sample's conditioning for a batch of `size`, without a copy."""
        return self._each(lambda value: value.expand(size, *value.shape[1:]))

    def cat(self, other: "Conditioning") -> "Conditioning":
        """Concatenate both along the batch."""
        return Conditioning({k: torch.cat([v, other[k].to(v.dtype)]) for k, v in self.values.items()})

    def __or__(self, other: "Conditioning") -> "Conditioning":
        """Merge two conditionings of the same samples."""
        return Conditioning({**self.values, **other.values})

    def with_prompt(self, prompt: "Conditioning") -> "Conditioning":
        """Replace the prompt of all samples; what the prompt does not determine (such as sizes) stays.

        Args:
            prompt: The new prompt, B = 1.
        """
        replaced = {k: prompt[k].to(v.dtype).expand_as(v) for k, v in self.values.items() if k in prompt.values}
        return Conditioning({**self.values, **replaced})

    def replace_where(self, mask: Tensor, prompt: "Conditioning") -> "Conditioning":
        """Apply `with_prompt` where mask is true. mask: (B,) bool."""
        other = self.with_prompt(prompt)
        return Conditioning(
            {k: torch.where(mask.view(-1, *[1] * (v.ndim - 1)), other[k], v) for k, v in self.values.items()}
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        return Conditioning({name: change(value) for name, value in self.values.items()})


@dataclass(frozen=True)
class Batch:
    """Clean latents, (B, C, h, w) fp32, and their conditioning.

    trajectory: the teacher's trajectories that end at the latents, where the data hold them.
    """

    latents: Tensor
    cond: Conditioning
    trajectory: Trajectory | None = None


# (z, t, c, w) -> (x0, eps); w is None for a network without an omega input.
Network = Callable[[Tensor, Tensor, Conditioning, Tensor | None], X0Eps]

RawNetwork = Callable[[Tensor, Tensor, Conditioning, Tensor | None], Tensor]


@dataclass(frozen=True)
class TeacherNetwork:
    """The frozen teacher as objectives see it.

    Attributes:
        network: The teacher's network.
        null: The empty prompt, with B = 1.
        applies_cfg: Whether guidance is classifier-free. If not, it is an input that the network is given already, and the
            empty prompt is not evaluated.
    """

    network: Network
    null: Conditioning
    applies_cfg: bool = True

    def denoiser(self, cond: Conditioning, w: Tensor | None) -> Denoiser:
        """Return the teacher as a function of (z, t) alone, under classifier-free guidance unless `w` is None.

        Both prompts go through the network in one forward. Guidance acts on (x0, eps) at every evaluation. For DDIM and
        Euler this equals guiding the solver's increment (Luo et al. 2023, Eq. 14). A solver with two evaluations calls the
        second one where the guided first one led: it follows the guided model's own PF-ODE to its order.

        Args:
            cond: The samples' conditioning.
            w: Omega per sample, (B,) fp32; None for the unguided teacher.
        """

        def denoise(z: Tensor, t: Tensor) -> X0Eps:
            if w is None or not self.applies_cfg:
                return self.network(z, t, cond, None)
            return guided(*self.with_and_without_prompt(z, t, cond), w)

        return denoise

    def with_and_without_prompt(self, z: Tensor, t: Tensor, cond: Conditioning) -> tuple[X0Eps, X0Eps]:
        """Return the predictions with the prompt and with the empty one, from one forward.

        Without classifier-free guidance both are the prediction with the prompt: their difference, which guidance scales, is 0.
        """
        if not self.applies_cfg:
            return (prediction := self.network(z, t, cond, None)), prediction
        both = cond.cat(cond.with_prompt(self.null))
        x0, eps = self.network(torch.cat([z, z]), torch.cat([t, t]), both, None)
        (x0_cond, x0_null), (eps_cond, eps_null) = x0.chunk(2), eps.chunk(2)
        return X0Eps(x0_cond, eps_cond), X0Eps(x0_null, eps_null)


def x0_eps_network(raw: RawNetwork, schedule: NoiseSchedule, prediction_type: str) -> Network:
    """Return a network that predicts (x0, eps) instead of its own prediction type."""

    def network(z: Tensor, t: Tensor, c: Conditioning, w: Tensor | None) -> X0Eps:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return to_x0_eps(raw(*network_input(z, t, sigma, prediction_type), c, w), z, alpha, sigma, prediction_type)

    return network
