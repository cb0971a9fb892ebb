"""The baseline: latent consistency distillation in one plain loop, like the public example scripts, with the same mathematics.

At every step, images go through the VAE and captions through the text encoder, the teacher runs twice, the EMA takes two
kernel launches per parameter, and the loss is fetched. Frozen weights stay in fp32. The teacher of a LoRA is a second U-Net.
It uses nothing of lcmdistill's schedules, solvers, objectives and steps. Shared are only the way that a family's U-Net is
called (`call`), and the random draws, so that the losses can be compared.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from lcmdistill.config.schema import LORA_MODULES

Clock = Callable[[str], Any]
"a context that times a part by its name"


@dataclass(frozen=True)
class Draws:
    """The samples and draws of a step: pixels and captions, noise of the posterior and of diffusion, times, omega.

    latents: the latents to use instead of the output of a VAE with random weights.
    """

    pixels: Tensor
    captions: list[str]
    posterior: Tensor
    noise: Tensor
    t: Tensor
    s: Tensor
    omega: Tensor
    latents: Tensor | None = None


def naive_steps(
    teacher: Any,
    vae: Any,
    call: Callable[..., Tensor],
    encode: Callable[[list[str]], dict[str, Tensor]],
    alphas_cumprod: Tensor,
    batches: Iterator[Draws],
    *,
    lora: int | None,
    learning_rate: float,
    mu: float,
    dtype: torch.dtype,
    clock: Clock,
) -> Iterator[float]:
    """Train, and yield the loss of each step. lora: the rank; None for a full student with an EMA target."""
    device = teacher.device
    config = {k: v for k, v in teacher.config.items() if k != "_use_default_values"}
    with device:  # where weights are initialized fastest
        student = type(teacher).from_config(config if lora else {**config, "time_cond_proj_dim": 256})
    student.load_state_dict(teacher.state_dict(), strict=False)
    if lora:
        student.requires_grad_(False)
        student.add_adapter(LoraConfig(r=lora, lora_alpha=lora, target_modules=list(LORA_MODULES)))
        target = student
    else:
        torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
        target = copy.deepcopy(student).requires_grad_(False)
    student.train()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    alphas, sigmas = alphas_cumprod.sqrt().to(device), (1 - alphas_cumprod).sqrt().to(device)
    scale = vae.config.scaling_factor
    vae.to(dtype)
    null = encode([""])

    def at(table: Tensor, t: Tensor) -> Tensor:
        return table[t][:, None, None, None].float()

    def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (t.float() * 10.0)[:, None, None, None]
        return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5

    def run(network: Any, z: Tensor, t: Tensor, c: dict[str, Tensor], w: Tensor | None) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return call(network, z, t, c, w).float()

    for draws in batches:
        with clock("VAE and text encoder"), torch.no_grad():
            posterior = vae.encode(draws.pixels.to(device, dtype)).latent_dist
            latents = (posterior.mean + posterior.std * draws.posterior.to(device)).float() * scale
            latents = latents if draws.latents is None else draws.latents.to(device)
            c = encode(draws.captions)
            empty = {name: value.expand(len(latents), *value.shape[1:]) for name, value in null.items()}
        t, s, w = draws.t.to(device), draws.s.to(device), draws.omega.to(device)
        w_input = None if lora else w
        noisy = at(alphas, t) * latents + at(sigmas, t) * draws.noise.to(device)
        c_skip, c_out = boundary(t)
        with clock("student, forward and backward"):
            eps = run(student, noisy, t, c, w_input)
            x0 = (noisy - at(sigmas, t) * eps) / at(alphas, t)
            prediction = c_skip * noisy + c_out * x0
        with clock("teacher"), torch.no_grad():
            outputs = []
            for prompt in (c, empty):
                eps = run(teacher, noisy, t, prompt, None)
                outputs.append(((noisy - at(sigmas, t) * eps) / at(alphas, t), eps))
            (x0_cond, eps_cond), (x0_null, eps_null) = outputs
            omega = w[:, None, None, None]
            x0 = x0_cond + omega * (x0_cond - x0_null)
            eps = eps_cond + omega * (eps_cond - eps_null)
            earlier = at(alphas, s) * x0 + at(sigmas, s) * eps
        with clock("target"), torch.no_grad():
            eps = run(target, earlier, s, c, w_input)
            c_skip, c_out = boundary(s)
            goal = c_skip * earlier + c_out * (earlier - at(sigmas, s) * eps) / at(alphas, s)
        with clock("student, forward and backward"):
            loss = (((prediction - goal) ** 2 + 0.001**2).sqrt() - 0.001).mean()
            loss.backward()
        with clock("clip, AdamW, EMA"):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if not lora:
                with torch.no_grad():
                    for old, new in zip(target.parameters(), student.parameters(), strict=True):
                        old.mul_(mu).add_(new, alpha=1 - mu)
        yield loss.item()


@contextmanager
def untimed(part: str) -> Iterator[None]:
    """Time nothing."""
    yield
