"""Train the tiny teacher's U-Net and text encoder on the autoencoder's latents, and write the pipeline."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
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
from data import Entry, load_entries, load_pixels, prompts_to_check
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from export import write_pipeline
from text import build_text_encoder, build_tokenizer, tokenize
from torch import Tensor
from train_vae import load_vae
from transformers import CLIPTextModel

TRAIN_STEPS = 1000
SAMPLING_WEIGHTS = {"base": 1.0, "tone": 0.3, "flag": 0.5}
CHECK = (
    "grinning face", "smiling face with heart-eyes", "angry face", "red heart", "purple heart", "red apple, food",
    "pizza, food", "grapes, food", "dog face, animal", "panda, animal", "pig face, animal", "tropical fish, animal",
    "automobile, vehicle", "rocket, vehicle", "sunflower, plant", "evergreen tree, plant", "house, place",
    "soccer ball, sport", "guitar, music", "waving hand, medium skin tone", "woman teacher, dark skin tone",
    "man firefighter, person", "flag of france", "flag of japan", "ten o'clock, clock", "blue circle, shape",
    "crescent moon, weather", "camera, object", "couple with heart, people", "person surfing, light skin tone",
    "ship, vehicle", "wrapped gift, object",
)  # fmt: skip


# Attention at 8x8 and 4x4 only: at 16x16 it would take half of the time.
CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 96, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "norm_num_groups": 32,
}


def build_unet() -> UNet2DConditionModel:
    """A new UNet2DConditionModel."""
    return UNet2DConditionModel(**CONFIG)


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.5."""
    return DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


@torch.no_grad()
def encode_all(vae: AutoencoderKL, entries: list[Entry]) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the scaled latents of every image."""
    pixels = torch.from_numpy(load_pixels(entries)).permute(0, 3, 1, 2)
    moments = [encode(vae, part.float() / 127.5 - 1) for part in pixels.split(64)]
    scale = scaling_factor(vae)
    return torch.cat([m.mean for m in moments]) * scale, torch.cat([m.std for m in moments]) * scale


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel, text: CLIPTextModel, vae: AutoencoderKL, ids: Tensor, empty: Tensor, guidance: float
) -> Tensor:
    """Fifty DDIM steps with guidance, for a preview."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(50)
    states = text(torch.cat([empty.expand_as(ids), ids]))[0]
    latents = torch.randn(len(ids), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for time in scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            noise = unet(torch.cat([latents, latents]), time, states, return_dict=False)[0].float()
        plain, prompted = noise.chunk(2)
        latents = scheduler.step(plain + guidance * (prompted - plain), int(time), latents, return_dict=False)[0]
    return decode(vae, latents / scaling_factor(vae))


class Trainer:
    """The joint training of U-Net and text encoder, with checkpoints, previews, and exports.

    It runs in one or more processes that sample their own parts of every batch and average their gradients: on few
    cores, processes of one thread each are faster than threads, which wait for each other after every operation.
    """

    def __init__(
        self, work: Path, minutes: float, batch: int, peak: float, decay: float, rank: int = 0, processes: int = 1
    ) -> None:
        self.checkpoint = work / "unet.pt"
        self.rank, self.processes = rank, processes
        self.total_batch, self.batch, self.peak = batch, batch // processes, peak
        everything = load_entries(work)
        entries = [entry for entry in everything if not entry.held_out]
        captions = [entry.caption for entry in entries]
        self.vae = load_vae(work)
        self.means, self.stds = encode_all(self.vae, entries)
        self.weights = torch.tensor([SAMPLING_WEIGHTS[entry.kind] for entry in entries])
        self.tokenizer = build_tokenizer(captions)
        self.ids = tokenize(self.tokenizer, captions)
        self.empty = tokenize(self.tokenizer, [""])
        self.check = tokenize(self.tokenizer, prompts_to_check(everything, CHECK))

        alphas = build_scheduler().alphas_cumprod
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()
        snr = alphas / (1 - alphas)
        self.loss_weights = snr.clamp(max=5.0) / snr  # min-SNR with gamma 5, for a prediction of the noise

        torch.manual_seed(0)
        self.unet, self.text = build_unet(), build_text_encoder(self.tokenizer)
        self.unet.set_attn_processor(AttnProcessor())  # plain products: faster than fused attention at these sizes
        modules = {"unet": self.unet, "text": self.text}
        self.parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = WeightAverage(modules, decay)
        self.step, spent = 0, 0.0
        if state := load_if_there(self.checkpoint):
            self.unet.load_state_dict(state["unet"])
            self.text.load_state_dict(state["text"])
            self.optimizer.load_state_dict(state["optimizer"])
            for key, value in state["average"].items():
                self.average.weights[key].copy_(value)
            self.step, spent = state["step"], state["spent"]
        torch.manual_seed(self.step * processes + rank)
        self.budget = Budget(minutes, spent)
        self.progress = self.budget.progress

    def train_step(self) -> float:
        """One step: caption dropping, noising, the weighted loss, and the update."""
        chosen = torch.multinomial(self.weights, self.batch, replacement=True)
        latents = self.means[chosen] + self.stds[chosen] * torch.randn(self.batch, 4, 16, 16)
        ids = torch.where(torch.rand(self.batch, 1) < 0.1, self.empty, self.ids[chosen])
        # One time from each of `batch` equal slices of the schedule: the same distribution, less variance.
        times = ((torch.arange(self.batch) + torch.rand(self.batch)) * TRAIN_STEPS / self.batch).long()
        times = times.clamp(max=TRAIN_STEPS - 1)
        noise = torch.randn_like(latents)
        noisy = self.signal[times].view(-1, 1, 1, 1) * latents + self.noise[times].view(-1, 1, 1, 1) * noise
        with torch.autocast("cpu", torch.bfloat16):
            states = self.text(ids)[0]
            predicted = self.unet(noisy, times, states, return_dict=False)[0]
        errors = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        loss = (errors * self.loss_weights[times]).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mean_loss = self._exchange(loss.item())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.peak, self.progress)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        self.average.update(self.step)
        return mean_loss

    def _exchange(self, loss: float) -> float:
        """Average gradients and loss over the processes, and take the progress from the first one's clock."""
        progress = self.budget.progress
        if self.processes > 1:
            gradients = [parameter.grad.flatten() for parameter in self.parameters if parameter.grad is not None]
            extra = torch.tensor([loss, progress * self.processes if self.rank == 0 else 0.0])
            flat = torch.cat([*gradients, extra])
            torch.distributed.all_reduce(flat)
            flat /= self.processes
            place = 0
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad = flat[place : place + parameter.numel()].view_as(parameter)
                    place += parameter.numel()
            loss, progress = flat[-2:].tolist()
        self.progress = min(progress, 1.0)
        return loss

    def averaged(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """U-Net and text encoder with the averaged weights, for inference."""
        unet, text = build_unet(), build_text_encoder(self.tokenizer)
        unet.load_state_dict(self.average.of("unet"))
        text.load_state_dict(self.average.of("text"))
        return unet.eval().requires_grad_(False), text.eval().requires_grad_(False)

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"unet": self.unet.state_dict(), "text": self.text.state_dict(), "average": self.average.weights}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step, "spent": self.budget.spent}
        save_aside(state | {"batch": self.total_batch}, self.checkpoint)

    def preview(self, path: Path, guidance: float = 4.5) -> None:
        """Draw the fixed prompts with the averaged weights."""
        unet, text = self.averaged()
        unet.set_attn_processor(AttnProcessor())
        images = sample(unet, text, self.vae, self.check, self.empty, guidance)
        save_grid(to_uint8(images), 8, path)

    def export(self, folder: Path) -> None:
        """Write the pipeline folder under a temporary name, then move its files; other files of the folder stay."""
        aside = folder.with_name(folder.name + ".writing")
        shutil.rmtree(aside, ignore_errors=True)
        unet, text = self.averaged()
        write_pipeline(aside, self.vae, text, self.tokenizer, unet, build_scheduler())
        folder.mkdir(parents=True, exist_ok=True)
        for part in aside.iterdir():
            target = folder / part.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(part, target)
        aside.rmdir()

    def run(self, every_minutes: float, after: Callable[[], None]) -> None:
        """Train to the end of the budget, and call ``after`` every few minutes and at the end."""
        total, count, due = 0.0, 0, self.budget.spent / 60 + every_minutes
        while self.progress < 1:
            total, count = total + self.train_step(), count + 1
            if self.rank > 0:
                continue
            if self.step % 200 == 0:
                samples, minutes = self.step * self.total_batch, self.budget.spent / 60
                print(f"step {self.step} samples {samples} minutes {minutes:.1f} loss {total / count:.4f}", flush=True)
                total, count = 0.0, 0
            if self.budget.spent / 60 >= due:
                due += every_minutes
                self.save()
                after()
        if self.rank == 0:
            self.save()
            after()


def train(rank: int, a: argparse.Namespace, rendezvous: str) -> None:
    """One process's part of the training."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // a.processes))
    if a.processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=a.processes
        )
    trainer = Trainer(a.work, a.minutes, a.batch, a.learning_rate, a.average, rank, a.processes)

    def after() -> None:
        trainer.preview(a.previews / f"preview-{trainer.budget.spent / 60:03.0f}.png")
        trainer.export(a.output)

    trainer.run(a.every, after)


def main() -> None:
    """Train the U-Net and the text encoder, and write the pipeline folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--output", type=Path, required=True, help="the pipeline folder")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=48, help="samples a step, over all processes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--average", type=float, default=0.999, help="decay of the weight average")
    parser.add_argument("--every", type=float, default=10, help="minutes between checkpoints, previews, and exports")
    parser.add_argument("--previews", type=Path, default=Path("work"))
    a = parser.parse_args()
    if a.processes == 1:
        return train(0, a, "")
    load_entries(a.work)  # fetch once, not once a process
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (a, str(Path(folder, "rendezvous"))), nprocs=a.processes)
    return None


if __name__ == "__main__":
    main()
