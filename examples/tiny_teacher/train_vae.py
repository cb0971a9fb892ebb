"""Train the tiny teacher's autoencoder: 64x64 pixels to 16x16x4 latents and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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
from data import load_entries, load_pixels
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

CHECK = (
    "red heart", "purple heart", "pink heart", "grapes, food", "eggplant, food", "pig, animal", "hibiscus, plant",
    "flag of norway", "flag of brazil", "rainbow, weather", "woman mage, dark skin tone", "grinning face",
    "waving hand, medium skin tone", "automobile, vehicle", "ten o'clock, clock", "input latin letters, symbol",
)  # fmt: skip


# Factor 4, and few, wide norm groups: with one channel a group, normalizing would erase its color.
CONFIG: dict[str, Any] = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
    "mid_block_add_attention": False,
}


def build_vae() -> AutoencoderKL:
    """A new AutoencoderKL."""
    return AutoencoderKL(**CONFIG)


def augment(images: Tensor) -> Tensor:
    """Mirror half, shift most by a few pixels, and exchange the color channels of half, so every hue is seen."""
    count = len(images)
    flip = torch.rand(count, 1, 1, 1) < 0.5
    images = torch.where(flip, images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4), value=1.0)
    size = images.shape[-1]
    rows, columns = torch.randint(0, 9, (2, count)).tolist()
    images = torch.stack([padded[i, :, rows[i] : rows[i] + size, columns[i] : columns[i] + size] for i in range(count)])
    for index in torch.nonzero(torch.rand(count) < 0.5).flatten().tolist():
        images[index] = images[index][torch.randperm(3)]
    return images


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 of pixels, of neighbor differences (edges), and of 4x4 means (colors)."""
    loss = F.l1_loss(output, target)
    for axis in (2, 3):
        loss = loss + 0.5 * F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss + F.l1_loss(F.avg_pool2d(output, 4), F.avg_pool2d(target, 4))


def train(work: Path, minutes: float, batch: int, peak: float, kl_weight: float, preview: Path) -> None:
    """Train within the budget, going on from a checkpoint if there is one, and write the averaged model."""
    checkpoint = work / "vae.pt"
    entries = [entry for entry in load_entries(work) if not entry.held_out]
    pixels = torch.from_numpy(load_pixels(entries)).permute(0, 3, 1, 2)
    captions = [entry.caption for entry in entries]
    shown = [captions.index(caption) for caption in CHECK if caption in captions] or list(range(len(CHECK)))
    check = pixels[shown].float() / 127.5 - 1

    torch.manual_seed(0)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    average = WeightAverage({"vae": vae}, 0.999)
    step, spent = 0, 0.0
    if state := load_if_there(checkpoint):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        for key, value in state["average"].items():
            average.weights[key].copy_(value)
        step, spent = state["step"], state["spent"]
        torch.manual_seed(step)
    budget = Budget(minutes, spent)

    def save() -> None:
        save_aside(
            {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average.weights}
            | {"step": step, "spent": budget.spent, "batch": batch},
            checkpoint,
        )
        model = averaged_vae(average.of("vae"))
        with torch.no_grad():
            rebuilt = decode(model, encode(model, check).mean)
        save_grid([*to_uint8(check), *to_uint8(rebuilt)], len(check), preview)

    while budget.progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, budget.progress)
        images = augment(pixels[torch.randint(len(pixels), (batch,))].float() / 127.5 - 1)
        with torch.autocast("cpu", torch.bfloat16):
            moments = encode(vae, images)
            output = decode(vae, moments.sample()).float()
        mean, logvar = moments.mean.float(), moments.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(output, images)
        optimizer.zero_grad(set_to_none=True)
        (loss + kl_weight * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        average.update(step)
        if step % 200 == 0:
            line = f"step {step} samples {step * batch} minutes {budget.spent / 60:.1f} loss {loss:.4f}"
            print(f"{line} kl {divergence:.3f} std {mean.std():.3f}/{logvar.mul(0.5).exp().mean():.3f}", flush=True)
        if step % 1000 == 0:
            save()
    save()
    finished = finish(averaged_vae(average.of("vae")), pixels)
    scale = scaling_factor(finished)
    save_aside({"vae": finished.state_dict(), "scaling_factor": scale}, work / "vae-finished.pt")
    print(f"scaling factor {scale:.5f}", flush=True)


def averaged_vae(weights: dict[str, Tensor]) -> AutoencoderKL:
    """A VAE for inference with these weights."""
    vae = build_vae()
    vae.load_state_dict(weights)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def finish(vae: AutoencoderKL, pixels: Tensor) -> AutoencoderKL:
    """Give every latent channel mean 0 and the same spread, and set the scaling factor that makes the spread 1.

    Both are measured over the training images. The change of each channel is folded into the 1x1 convolutions on
    either side of the latents, so the reconstructions stay what they were.
    """
    moments = [encode(vae, part.float() / 127.5 - 1) for part in pixels.split(64)]
    means, variances = torch.cat([m.mean for m in moments]), torch.cat([m.var for m in moments])
    center = means.mean((0, 2, 3))
    spread = (means.var((0, 2, 3)) + variances.mean((0, 2, 3))).sqrt()
    overall = spread.square().mean().sqrt()
    gain = overall / spread

    before, after = vae.quant_conv, vae.post_quant_conv
    assert before is not None
    assert after is not None
    assert before.bias is not None
    assert after.bias is not None
    channels = len(center)
    after.bias += after.weight[:, :, 0, 0] @ center
    after.weight /= gain.view(1, -1, 1, 1)
    before.bias[:channels] -= center
    before.bias[:channels] *= gain
    before.weight[:channels] *= gain.view(-1, 1, 1, 1)
    before.bias[channels:] += 2 * gain.log()
    vae.register_to_config(scaling_factor=1 / overall.item())
    return vae


def load_vae(work: Path) -> AutoencoderKL:
    """The finished VAE."""
    state = load_if_there(work / "vae-finished.pt")
    if state is None:
        raise SystemExit(f"no vae-finished.pt in {work}: run train_vae.py first")
    vae = averaged_vae(state["vae"])
    vae.register_to_config(scaling_factor=state["scaling_factor"])
    return vae


def main() -> None:
    """Train the autoencoder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=5e-4)
    parser.add_argument("--preview", type=Path, default=Path("work/vae.png"))
    a = parser.parse_args()
    train(a.work, a.minutes, a.batch, a.learning_rate, a.kl_weight, a.preview)


if __name__ == "__main__":
    main()
