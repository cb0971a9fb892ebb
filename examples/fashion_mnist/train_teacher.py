"""Train a small EDM teacher (Karras et al. 2022) on Fashion-MNIST, and write it as a diffusers pipeline.

python train_teacher.py --output DIR [--work DIR] [--steps N]

Run the same command again to go on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from data import LABELS, load
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from PIL import Image
from torch import Tensor

from lcmdistill.data.sampler import SampleOrder
from lcmdistill.diffusion.ema import ema_update
from lcmdistill.diffusion.parameterization import EDM
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import SIGMA_DATA, KarrasSchedule
from lcmdistill.diffusion.solvers import solve
from lcmdistill.diffusion.types import Conditioning, Network, x0_eps_network
from lcmdistill.sampling.png import grid
from lcmdistill.teachers.pixel import TIMESTEP_SCALE, call_unet_2d
from lcmdistill.training.checkpoint import optimizer_tensors, restore_optimizer
from lcmdistill.utils.atomic import atomic_dir
from lcmdistill.utils.checkpoint import load_checkpoint, prune, save_checkpoint
from lcmdistill.utils.run_dir import checkpoints

P_MEAN, P_STD = -1.2, 1.2
"of ln(sigma) in training (Karras et al. 2022, Table 1)"
NO_LABEL = len(LABELS)
"the class of an image whose label was dropped"
SCHEDULE = KarrasSchedule()


def build() -> UNet2DModel:
    """The teacher's network: 1.04M parameters, attention at 4 x 4 alone; an 11th class means none in particular."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=len(LABELS) + 1,
    )


def denoiser(unet: UNet2DModel) -> Network:
    """The network under EDM's preconditioning."""

    return x0_eps_network(lambda z, t, c, w: call_unet_2d(unet, z, t, c.values, w), SCHEDULE, EDM)


def loss(network: Network, images: Tensor, labels: Tensor, rng: Rng) -> Tensor:
    """EDM's weighted denoising loss (Karras et al. 2022, Eq. 2 and Table 1), with one label in ten dropped."""
    sigma = (P_MEAN + P_STD * rng.normal("sigma", (1,)).squeeze(1)).exp()
    labels = torch.where(rng.uniform("drop") < 0.1, NO_LABEL, labels)
    z = SCHEDULE.diffuse(images, rng.normal("noise", images.shape[1:]), sigma)
    x0 = network(z, sigma, Conditioning({"class_labels": labels}), None).x0
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return (weight * (x0 - images).square().flatten(1).mean(1)).mean()


@torch.no_grad()
def draw(network: Network, labels: Tensor, steps: int = 18, seed: int = 0) -> Tensor:
    """Images (N, 1, 32, 32) by EDM's deterministic sampler."""
    noise = Rng(seed, 0, range(len(labels))).normal("start", (1, 32, 32))
    return solve(lambda z, t: network(z, t, Conditioning({"class_labels": labels}), None), SCHEDULE, noise, steps)


class Training:
    """The network, its average and its optimiser, in checkpoints under ``work``."""

    def __init__(self, work: Path, a: argparse.Namespace) -> None:
        images, labels = load(a.work, package=a.package)
        self.images, self.labels = torch.from_numpy(images)[:, None], torch.from_numpy(labels)
        self.folder, self.a = work / "teacher-checkpoints", a
        self.order = SampleOrder(len(images), 0, a.batch)
        self.unet, self.average = build(), build().eval()
        self.unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.weights = dict(self.unet.named_parameters())
        self.averaged = dict(self.average.named_parameters())
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
        self.step = 0
        if done := checkpoints(self.folder):
            groups, state = load_checkpoint(done[-1])
            for mine, saved in ((self.weights, "unet"), (self.averaged, "average")):
                for name, value in mine.items():
                    value.data.copy_(groups[saved][name])
            restore_optimizer(self.optimizer, groups["optimizer"])
            self.step = state["step"]

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        done = self.step / self.a.steps
        return self.a.learning_rate * min(1.0, (self.step + 1) / 100) * (0.505 + 0.495 * math.cos(math.pi * done))

    def train_step(self) -> float:
        """One step; returns its loss."""
        rng = Rng(0, self.step, range(self.a.batch))
        chosen = self.order.indices(self.step, rng.places)
        mean = loss(denoiser(self.unet), self.images[chosen].float() / 127.5 - 1.0, self.labels[chosen], rng)
        mean.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(self.a.average, (1 + self.step) / (10 + self.step))
        ema_update(self.averaged.values(), self.weights.values(), decay)
        return float(mean.detach())

    def run(self) -> None:
        """Train to the end, telling how it goes; save, and draw a preview, every so often."""
        losses, since = [], time.monotonic()
        while self.step < self.a.steps:
            losses.append(self.train_step())
            if self.step % 50 == 0:
                mean, speed = sum(losses) / len(losses), len(losses) * self.a.batch / (time.monotonic() - since)
                print(f"step {self.step}/{self.a.steps}  loss {mean:.4f}  {speed:.1f} images/s", flush=True)
                losses, since = [], time.monotonic()
            if self.step % self.a.every == 0 or self.step == self.a.steps:
                self.save()
                self.preview()

    def save(self) -> None:
        """A checkpoint, and the pipeline with the averaged weights."""
        groups = {"unet": self.weights, "average": self.averaged, "optimizer": optimizer_tensors(self.optimizer)}
        save_checkpoint(self.folder, self.step, groups, {})
        prune(self.folder, 2)
        write_pipeline(self.average, self.a.output)

    def preview(self) -> None:
        """Write a picture of samples, one column per class, next to the checkpoints."""
        pixels = draw(denoiser(self.average), torch.arange(len(LABELS)).repeat(4))
        rows = [[_image(pixels[len(LABELS) * i + j]) for j in range(len(LABELS))] for i in range(4)]
        grid(rows, columns=LABELS).save(self.folder / f"preview-{self.step:06d}.png")


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(((pixels[0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy())


def write_pipeline(unet: UNet2DModel, folder: Path) -> None:
    """A folder that lcmdistill reads as a teacher: the scheduler says that the network is EDM's, and its scale of time."""
    unet.register_to_config(_labels=list(LABELS))
    scheduler = EDMEulerScheduler(sigma_min=SCHEDULE.sigma_min, sigma_max=SCHEDULE.sigma_max, sigma_data=SIGMA_DATA)
    scheduler.register_to_config(_timestep_scale=TIMESTEP_SCALE)
    with atomic_dir(folder) as aside:
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(aside)  # pyright: ignore[reportArgumentType]


def main() -> None:
    """Train, or go on training, the teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the teacher's folder")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--package", type=Path, help="the npm package's .tgz or folder, where you have it")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--average", type=float, default=0.998, help="decay of the weight average")
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints and previews")
    a = parser.parse_args()
    Training(a.work, a).run()


if __name__ == "__main__":
    main()
