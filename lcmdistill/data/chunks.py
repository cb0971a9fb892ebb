"""One chunk of a cache: what some members of a source become, and how it lies in its file.

Named tensors of safetensors: mean, std and row (of its caption) a sample, PROMPT... a caption, and SAMPLE... what else a sample
decides. With buckets the samples of a size have theirs for themselves, led by "HEIGHTxWIDTH/"; captions are shared.
Shapes: n samples of a chunk, u distinct captions of it, C h w latents.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.transforms import Sample
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.diffusion.types import Conditioning
from lcmdistill.teachers.base import SampleInfo, Teacher, ends_in_noise
from lcmdistill.teachers.prompts import count_truncated, token_limit
from lcmdistill.utils.atomic import atomic_file
from lcmdistill.utils.errors import RunError

_PIXELS_AT_ONCE = 4 * 512 * 512

PROMPT, SAMPLE = "prompt.", "sample."
"before the names of what is kept once a caption, and of what is kept once a sample"


def size_of(sample: Sample) -> str:
    """HEIGHTxWIDTH of what was kept of an image, in pixels."""
    return "{}x{}".format(*sample.frame[4:])


def write_chunk(
    path: Path,
    samples: Sequence[tuple[int, Sample]],
    dropped: Counter[str],
    teacher: Teacher,
    config: DataConfig,
    seed: int,
    dtype: torch.dtype,
    on_progress: Callable[[int], None],
    *,
    bucketed: bool,
) -> None:
    """Write samples, each with its place in its source, whole or not at all. dropped: members that could not be used, and why.

    dtype: of a teacher that draws. Raises RunError on latents that are not finite.
    """
    tensors: dict[str, Tensor] = {}
    report: dict[str, Any] = {"kept": len(samples), "rejected": dropped}
    if samples:
        captions = list(dict.fromkeys(sample.caption for _, sample in samples))
        told = [
            teacher.encode_prompts(captions[i : i + 64]).to("cpu", torch.float16) for i in range(0, len(captions), 64)
        ]
        tensors |= {f"{PROMPT}{name}": torch.cat([c[name] for c in told]) for name in told[0].values}
        report |= {"cut": count_truncated(teacher.pipeline, [s.caption for _, s in samples])}
        report |= {"tokens": token_limit(teacher.pipeline)}
        counts = Counter(size_of(sample) for _, sample in samples)
        report |= {"buckets": dict(sorted(counts.items()))} if bucketed else {}
        for size in sorted(counts):  # several are kept beside each other, their names led by their sizes
            some = [each for each in samples if size_of(each[1]) == size]
            kept = _kept(some, captions, teacher, config, seed, dtype, on_progress)
            tensors |= {f"{size}/{name}" if bucketed else name: value for name, value in kept.items()}
    # One key: safetensors writes several in any order, and the same members shall give the same bytes.
    write_tensors(path, tensors, {"report": json.dumps(report)})


def is_complete(path: Path) -> bool:
    """Whether a file of a cache is there, and no power cut has left it shorter than it says of itself."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A file of a cache, whole or not there, whoever else writes the same one at the same time."""
    with atomic_file(path, shared=True) as aside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside, metadata=metadata)


def _kept(
    samples: Sequence[tuple[int, Sample]],
    captions: Sequence[str],
    teacher: Teacher,
    config: DataConfig,
    seed: int,
    dtype: torch.dtype,
    on_progress: Callable[[int], None],
) -> dict[str, Tensor]:
    """What is kept of samples of one size. captions: the distinct ones of their chunk."""
    height, width = samples[0][1].frame[4:]
    at_once, parts = max(1, _PIXELS_AT_ONCE // (height * width)), []
    for i in range(0, len(samples), at_once):
        on_progress(samples[i][0])  # a chunk that the teacher draws takes minutes
        parts.append(_latents(samples[i : i + at_once], teacher, config, seed, dtype))
    means, stds, told = zip(*parts, strict=True)
    tensors = {"mean": torch.cat(means).half().cpu(), "std": torch.cat(stds).half().cpu()}
    tensors["row"] = torch.tensor([captions.index(sample.caption) for _, sample in samples])
    if not tensors["mean"].isfinite().all():
        raise RunError("the teacher's VAE gave latents that are not finite; its weights may be broken or need fp32")
    return tensors | {f"{SAMPLE}{name}": torch.cat([c[name] for c in told]).cpu() for name in told[0].values}


def _latents(
    samples: Sequence[tuple[int, Sample]], teacher: Teacher, config: DataConfig, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Conditioning]:
    """(mean, std) of the scaled latents, and what the samples decide of the conditioning, in fp32.

    What the teacher drew itself has no spread.
    """
    pixels = [sample.pixels for _, sample in samples if sample.pixels is not None]
    if pixels:
        mean, std = teacher.encode_images(torch.stack(pixels))
    else:
        mean = _drawn(samples, teacher, config, seed, dtype)
        std = torch.zeros_like(mean)
    shown = SampleInfo(
        frames=torch.tensor([sample.frame for _, sample in samples], dtype=torch.float32),
        pixels=lambda: torch.stack(pixels) if pixels else teacher.decode(mean) * 2 - 1,
        encode=lambda images: teacher.encode_images(images)[0],
        seeds=[derive_seed(seed, "condition", place) for place, _ in samples],
    )
    return mean, std, teacher.condition(shown)


def _drawn(
    samples: Sequence[tuple[int, Sample]], teacher: Teacher, config: DataConfig, seed: int, dtype: torch.dtype
) -> Tensor:
    """Latents that the teacher draws for the samples' captions."""
    side = config.resolution // teacher.vae_factor
    shape = (teacher.vae.config.latent_channels, side, side)
    generators = [torch.Generator().manual_seed(derive_seed(seed, "draw", place)) for place, _ in samples]
    return teacher.generate_latents(
        [sample.caption for _, sample in samples],
        torch.stack([torch.randn(*shape, generator=g) for g in generators]),
        steps=config.teacher_steps,
        guidance_scale=config.guidance_scale,
        scheduler="DPMSolverMultistepScheduler",
        dtype=dtype,
        **draw_spacing(teacher),
    )


def draw_spacing(teacher: Teacher) -> dict[str, str]:
    """What the scheduler that draws is told otherwise than the teacher's own: to start where its noise does.

    A zero-terminal-SNR teacher that is started earlier takes noise for what it never saw as such (Lin et al. 2023, sec. 3.3).
    """
    return {"timestep_spacing": "trailing"} if not teacher.in_pixels and ends_in_noise(teacher.schedule) else {}
