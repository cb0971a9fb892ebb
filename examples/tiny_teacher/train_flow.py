"""Fine-tune the tiny teacher into a flow-matching teacher: rectified flow, predicting the velocity.

python examples/tiny_teacher/train_flow.py --output flow-teacher [--minutes N]

It starts from the bundled teacher and trains its U-Net on the bundled images. The network is given t = 1000 sigma and
predicts v = eps - x0 at x = (1 - sigma) x0 + sigma eps. VAE and text encoder stay as they are.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    Budget,
    WeightAverage,
    decode,
    encode,
    learning_rate,
    load_if_there,
    save_aside,
    save_grid,
    scaling_factor,
    to_uint8,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from text import tokenize
from torch import Tensor, nn

ASSETS = Path(str(files("lcmdistill") / "assets"))
TRAIN_STEPS = 1000
EMPTY = 0.1  # the share of captions that are dropped, for guidance
CHECK = (
    "grinning face", "red heart", "purple heart", "panda, animal", "pig face, animal", "automobile, vehicle",
    "rocket, vehicle", "sunflower, plant", "evergreen tree, plant", "waving hand, medium skin tone",
    "woman teacher, dark skin tone", "man firefighter, person", "blue circle, shape", "camera, object",
    "couple with heart, people", "notebook with decorative cover, object",
)  # fmt: skip


def bundled_images() -> tuple[Tensor, list[str]]:
    """Return the bundled images, (count, 3, 64, 64) uint8, and their captions."""
    images, captions = [], []
    for path in sorted((ASSETS / "tiny-data").glob("*.tar.gz")):
        with tarfile.open(path) as tar:
            parts = {m.name: tar.extractfile(m).read() for m in tar}  # pyright: ignore[reportOptionalMemberAccess]
        for name in sorted(key for key in parts if key.endswith(".webp")):
            images.append(np.asarray(Image.open(io.BytesIO(parts[name])).convert("RGB")))
            captions.append(parts[name.removesuffix("webp") + "txt"].decode())
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), captions


@torch.no_grad()
def sample(unet: nn.Module, cond: Tensor, null: Tensor, guidance: float, steps: int) -> Tensor:
    """Generate latents with Euler's method on evenly spaced sigmas, with guidance."""
    z = torch.randn(len(cond), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sigmas = torch.linspace(1, 0, steps + 1)
    states = torch.cat([null.expand_as(cond), cond])
    for sigma, following in pairwise(sigmas):
        v = unet(torch.cat([z, z]), sigma * TRAIN_STEPS, states, return_dict=False)[0].float()
        plain, prompted = v.chunk(2)
        z = z + (following - sigma) * (plain + guidance * (prompted - plain))
    return z


class FlowTraining:
    """The fine-tuning, with checkpoints and previews."""

    def __init__(self, work: Path, minutes: float, batch: int, peak: float) -> None:
        self.pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "tiny").to(torch.float32)
        self.unet, self.vae = self.pipeline.unet, self.pipeline.vae
        self.unet.set_attn_processor(AttnProcessor())  # plain products: faster than fused attention at these sizes
        self.batch, self.peak, self.checkpoint = batch, peak, work / "flow.pt"
        pixels, captions = bundled_images()
        with torch.no_grad():
            moments = [encode(self.vae, part.float() / 127.5 - 1) for part in pixels.split(64)]
            scale = scaling_factor(self.vae)
            self.means, self.stds = (torch.cat([getattr(m, n) for m in moments]) * scale for n in ("mean", "std"))
            self.states = torch.cat([self.embed(list(part)) for part in _batches(captions, 256)])
            self.null, self.check = self.embed([""]), self.embed(list(CHECK))
        self.unet.train().requires_grad_(True)
        self.parameters = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = WeightAverage({"unet": self.unet}, 0.999)
        self.step, spent = 0, 0.0
        if state := load_if_there(self.checkpoint):
            self.unet.load_state_dict(state["unet"])
            self.optimizer.load_state_dict(state["optimizer"])
            for key, value in state["average"].items():
                self.average.weights[key].copy_(value)
            self.step, spent = state["step"], state["spent"]
        torch.manual_seed(self.step)
        self.budget = Budget(minutes, spent)

    def embed(self, captions: list[str]) -> Tensor:
        """Return the text encoder's states of captions."""
        return self.pipeline.text_encoder(tokenize(self.pipeline.tokenizer, captions))[0]

    def train_step(self) -> float:
        """Take one step: drop captions, mix with noise, and fit the velocity."""
        chosen = torch.randint(len(self.means), (self.batch,))
        x0 = self.means[chosen] + self.stds[chosen] * torch.randn(self.batch, 4, 16, 16)
        states = torch.where(torch.rand(self.batch, 1, 1) < EMPTY, self.null, self.states[chosen])
        # One sigma from each of `batch` equal slices: the same distribution, less variance.
        sigma = ((torch.arange(self.batch) + torch.rand(self.batch)) / self.batch).view(-1, 1, 1, 1)
        eps = torch.randn_like(x0)
        with torch.autocast("cpu", torch.bfloat16):
            times = sigma.flatten() * TRAIN_STEPS
            v = self.unet((1 - sigma) * x0 + sigma * eps, times, states, return_dict=False)[0]
        loss = F.mse_loss(v.float(), eps - x0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.peak, self.budget.progress)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        self.average.update(self.step)
        return loss.item()

    def save(self, output: Path) -> None:
        """Write the checkpoint, a preview and the pipeline folder with the averaged weights."""
        save_aside(
            {"unet": self.unet.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average.weights}
            | {"step": self.step, "spent": self.budget.spent, "batch": self.batch},
            self.checkpoint,
        )
        live = {key: value.clone() for key, value in self.unet.state_dict().items()}
        self.unet.load_state_dict(self.average.of("unet"))
        latents = sample(self.unet, self.check, self.null, 4.5, 50)
        with torch.no_grad():
            save_grid(
                to_uint8(decode(self.vae, latents / scaling_factor(self.vae))), 8, output.with_name("preview.png")
            )
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, shift=1.0)
        self.pipeline.register_modules(scheduler=scheduler)
        self.pipeline.save_pretrained(output)
        index = json.loads((output / "unet" / "config.json").read_text())
        index.pop("_name_or_path", None)
        (output / "unet" / "config.json").write_text(json.dumps(index, indent=2) + "\n")
        self.unet.load_state_dict(live)

    def run(self, output: Path, every_minutes: float) -> None:
        """Train to the end of the budget."""
        total, count, due = 0.0, 0, self.budget.spent / 60 + every_minutes
        while self.budget.progress < 1:
            total, count = total + self.train_step(), count + 1
            if self.step % 200 == 0:
                line = f"step {self.step} samples {self.step * self.batch} minutes {self.budget.spent / 60:.1f}"
                print(f"{line} loss {total / count:.4f}", flush=True)
                total, count = 0.0, 0
            if self.budget.spent / 60 >= due:
                due += every_minutes
                self.save(output)
        self.save(output)


def _batches(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def main() -> None:
    """Fine-tune the bundled teacher, and write the pipeline folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the pipeline folder")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--every", type=float, default=10, help="minutes between checkpoints and previews")
    a = parser.parse_args()
    FlowTraining(a.work, a.minutes, a.batch, a.learning_rate).run(a.output, a.every)


if __name__ == "__main__":
    main()
