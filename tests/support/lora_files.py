"""LoRA files of other programs with random tensors, and what a pipeline gives with them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lcmdistill.export.verify import network_inputs, network_output
from lcmdistill.teachers.registry import family_of
from tests.support.lycoris import normal
from tests.support.models import opened

ALPHA, RANK = 1.5, 2

ENCODERS = {"text_encoder": "lora_te", "text_encoder_2": "lora_te2"}

Key = Callable[[str, str, Tensor, Tensor], dict[str, Tensor]]


def kohya(part: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    stem = f"{'lora_unet' if part == 'unet' else ENCODERS[part]}_{path.replace('.', '_')}"
    return {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": torch.tensor(ALPHA),
    }


def uneven(part: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The same update in other words: another alpha, or another rank, in every other layer; one without alpha."""
    file = kohya(part, path, down, up)
    stem = next(iter(file)).removesuffix(".lora_down.weight")
    if path.endswith(("k", "k_proj")):
        file |= {f"{stem}.lora_up.weight": up / 4, f"{stem}.alpha": torch.tensor(4 * ALPHA)}
    if path.endswith(("v", "v_proj")):
        file |= {f"{stem}.lora_up.weight": torch.cat([up, up], 1), f"{stem}.lora_down.weight": torch.cat([down, down])}
    if path.endswith(("q", "q_proj")):
        file[f"{stem}.lora_up.weight"] = up * (ALPHA / RANK)
        del file[f"{stem}.alpha"]
    return file


def diffusers(part: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Without the metadata that a scale is read from: it is in the weights."""
    stem = f"{part}.{path}"
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up * (ALPHA / RANK)}


def diffusers_2023(part: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """As its scripts wrote LoRAs when peft was new."""
    stem = f"{part}.{path}.{'lora' if part == 'unet' else 'lora_linear_layer'}"
    return {f"{stem}.down.weight": down, f"{stem}.up.weight": up * (ALPHA / RANK)}


def diffusers_processors(part: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """As its scripts wrote LoRAs on attentions before that."""
    if part != "unet":
        return diffusers_2023(part, path, down, up)
    attention, _, name = path.replace(".to_out.0", ".to_out").rpartition(".")
    stem = f"unet.{attention}.processor.{name}_lora"
    return {f"{stem}.down.weight": down, f"{stem}.up.weight": up * (ALPHA / RANK)}


def onetrainer(part: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """kohya's ends behind diffusers' paths."""
    stem = f"{part}.{path}"
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(ALPHA)}


def linears(pipeline: Any, part: str) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that style LoRAs are trained on, under the names that every program gives them."""
    prefix = "" if part == "unet" or hasattr(getattr(pipeline, part), "text_model") else "text_model."
    for path, module in getattr(pipeline, part).named_modules():
        if isinstance(module, nn.Linear) and (part != "unet" or ".attn" in path) and "text_projection" not in path:
            yield prefix + path, module


@torch.no_grad()
def styled(pipeline: Any, parts: list[str], write: Key, seed: int = 0) -> dict[str, Tensor]:
    """A random LoRA's file on parts of a pipeline, which it is merged into here, by hand."""
    generator, file = torch.Generator().manual_seed(seed), {}
    for part in parts:
        for path, module in linears(pipeline, part):
            down = 0.3 * torch.randn(RANK, module.in_features, generator=generator)
            up = 0.3 * torch.randn(module.out_features, RANK, generator=generator)
            module.weight += (ALPHA / RANK) * up @ down
            file |= write(part, path, down, up)
    return file


@torch.no_grad()
def outputs(pipeline: Any) -> dict[str, list[Tensor]]:
    ids = torch.randint(188, (2, 77), generator=torch.Generator().manual_seed(3))
    family, unet = family_of(pipeline), pipeline.unet
    found = {"unet": [network_output(family, unet, network_inputs(family, unet, 1.0))]}
    for name in ENCODERS:
        if getattr(pipeline, name, None) is not None:
            found[name] = [getattr(pipeline, name)(ids).last_hidden_state]
    return found


def peft_folder(folder: Path, base: Any, **settings: Any) -> Any:
    """An adapter that peft itself made and saved; returns the network with it on."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        adapted: Any = get_peft_model(
            base.unet, LoraConfig(target_modules=["to_q", "to_k", "ff.net.2", "conv1"], **settings)
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    return adapted.get_base_model()


WRITERS = [kohya, uneven, diffusers, diffusers_2023, diffusers_processors, onetrainer]
"the layouts"


def locon(pipeline: Any, seed: int = 7) -> dict[str, Tensor]:
    """A LoCon: LoRA layers on the convolutions and the linear layers of residual blocks."""
    draw, file = normal(seed), {}
    for path, module in pipeline.unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "resnets" in path:
            stem, weight = f"lora_unet_{path.replace('.', '_')}", module.weight
            file[f"{stem}.lora_down.weight"] = draw(3, *weight.shape[1:])
            file[f"{stem}.lora_up.weight"] = draw(len(weight), 3, *[1] * (weight.ndim - 2))
            file[f"{stem}.alpha"] = torch.tensor(1.5)
    return file


def two_loras(base: Path, folder: Path) -> tuple[Path, Path]:
    """A LoCon, and a LoRA with layers of the text encoders, of a base."""
    plain = opened(base)
    encoders = [name for name in ENCODERS if getattr(plain, name, None) is not None]
    save_file(locon(plain), folder / "locon.safetensors")
    save_file(styled(opened(base), ["unet", *encoders], kohya), folder / "style.safetensors")
    return folder / "locon.safetensors", folder / "style.safetensors"
