"""One chunk of a cache: what some members of a source become, and how it is stored in its file.

A safetensors file with named tensors: per sample mean, std, row (of its caption) and SAMPLE..., per caption PROMPT.... Samples
that are whole trajectories have the states TRAJECTORY and, under guidance, OMEGA, too. With
buckets the samples of each size have tensors of their own, prefixed by "HEIGHTxWIDTH/"; captions are shared.

Shapes: n samples of a chunk, u distinct captions of it, C h w latents, M points of a trajectory.
"""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.trajectories import TrajectoryPlan
from lcmdistill.data.transforms import Sample
from lcmdistill.diffusion.random import derive_seed
from lcmdistill.diffusion.types import Conditioning
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.family import SampleInfo
from lcmdistill.teachers.prompts import count_truncated, token_limit
from lcmdistill.teachers.schedulers import ends_in_noise
from lcmdistill.utils.atomic import atomic_file
from lcmdistill.utils.errors import Interrupted, RunError
from lcmdistill.utils.json_text import parse_json

logger = logging.getLogger(__name__)

CHUNK = 128
"members of a source per file"

PIXELS_PER_BATCH = 4 * 512 * 512
"pixels that are encoded or generated at once"

GENERATED_AT_ONCE = 16
"images that the teacher generates at once, at most: an interruption keeps what is finished"

PART = ".part"
"suffix of what an interrupted chunk keeps"

Part = dict[str, Tensor]
"named tensors with a row per sample of a batch"

TRAJECTORY, OMEGA = "trajectory", "omega"
"names of the states of the samples' trajectories, (n, M, C, h, w), and of the omega of each, (n,) fp32"

PROMPT, SAMPLE = "prompt.", "sample."
"prefixes of the names of tensors with a row per caption, and with a row per sample"

_METADATA = "lcmdistill"
"the one key of the safetensors metadata: with several, safetensors writes them in any order, and bytes would differ"


def generated_at_once(height: int, width: int) -> int:
    """Return how many images the teacher generates at once."""
    return min(GENERATED_AT_ONCE, max(1, PIXELS_PER_BATCH // (height * width)))


def size_of(sample: Sample) -> str:
    """Return HEIGHTxWIDTH of the cropped image, in pixels."""
    return "{}x{}".format(*sample.frame[4:])


def write_chunk(
    path: Path,
    samples: Sequence[tuple[int, Sample]],
    dropped: Counter[str],
    teacher: Teacher,
    config: DataConfig,
    seed: int,
    dtype: torch.dtype,
    on_progress: Callable[[float], None],
    *,
    bucketed: bool,
    prompts_only: bool = False,
    trajectory: TrajectoryPlan | None = None,
) -> None:
    """Encode samples and write them to a file, whole or not at all.

    Args:
        path: The chunk's file.
        samples: (index in the source, sample).
        dropped: Reasons of the members that could not be used, with their counts.
        teacher: Encodes images and captions, or generates the images.
        config: Resolution, and how the teacher generates.
        seed: The run's seed.
        dtype: Of the teacher's network where it generates.
        on_progress: Called with the index of the next sample.
        bucketed: Whether the samples have several sizes.
        prompts_only: Whether there are no images: no latents are written but their shape, as metadata.
        trajectory: How the teacher generates whole trajectories; None for latents only.

    Raises:
        RunError: If latents are not finite.
    """
    tensors: dict[str, Tensor] = {}
    report: dict[str, Any] = {"kept": len(samples), "rejected": dict(dropped)}
    if samples:
        captions = list(dict.fromkeys(sample.caption for _, sample in samples))
        encoded = [
            teacher.encode_prompts(captions[i : i + 64]).to("cpu", torch.float16) for i in range(0, len(captions), 64)
        ]
        tensors |= {f"{PROMPT}{name}": torch.cat([c[name] for c in encoded]) for name in encoded[0].values}
        report |= {"cut": count_truncated(teacher.pipeline, [s.caption for _, s in samples])}
        report |= {"tokens": token_limit(teacher.pipeline), "captions": captions}
        counts = Counter(size_of(sample) for _, sample in samples)
        report |= {"buckets": dict(sorted(counts.items()))} if bucketed else {}
        if prompts_only:
            tensors["row"] = torch.tensor([captions.index(sample.caption) for _, sample in samples])
            tensors |= {name: value.cpu() for name, value in conditions_of_prompts(samples, teacher).items()}
            report |= {"latents": latent_shape(teacher, config)}
        if trajectory is None:
            encode, steps = (
                partial(encode_latents, teacher=teacher, config=config, seed=seed, dtype=dtype),
                config.teacher_steps,
            )
        else:
            steps = trajectory.calls(teacher.schedule.num_steps)
            prompts = Conditioning({name: tensors[f"{PROMPT}{name}"] for name in encoded[0].values})
            encode = _trajectory_encoder(trajectory, prompts, captions, teacher, config, seed, dtype)
        for size in sorted(counts) if not prompts_only else ():
            some = [each for each in samples if size_of(each[1]) == size]
            encoded_samples = _encode(some, captions, encode, steps, on_progress, _part_file(path, size))
            tensors |= {f"{size}/{name}" if bucketed else name: value for name, value in encoded_samples.items()}
    write_tensors(path, tensors, report)
    for size in {size_of(sample) for _, sample in samples}:
        _part_file(path, size).unlink(missing_ok=True)


def _part_file(path: Path, size: str) -> Path:
    """Return the file that keeps the finished batches of one size of an interrupted chunk."""
    return path.with_suffix(f".{size}{PART}")


def _read_parts(path: Path) -> list[Part]:
    """Return the finished batches of an interrupted chunk as one; [] without any."""
    found = read_intact(path)
    return [] if found is None else [found[0]]


def joined(parts: Sequence[Part]) -> Part:
    """Return batches as one; {} of none."""
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


@contextmanager
def kept_if_interrupted(
    path: Path, tensors: Callable[[], Mapping[str, Tensor]], metadata: Callable[[], Mapping[str, Any]] = dict
) -> Iterator[None]:
    """Write what is finished to a file if the block is interrupted, for the next call to begin with.

    Args:
        path: The file.
        tensors: Returns what is finished; nothing is written for {}.
        metadata: Returns plain values, as for `write_tensors`.
    """
    try:
        yield
    except (Interrupted, KeyboardInterrupt, SystemExit):
        if finished := tensors():
            write_tensors(path, finished, metadata())
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a file of a cache, whole or not at all, even if another process writes the same one at the same time.

    metadata: plain values, which `read_metadata` returns.
    """
    values = dict(metadata or {})
    stored = {_METADATA: json.dumps({"digest": _digest(tensors.items(), values), **values})}
    with atomic_file(path, shared=True) as aside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside, metadata=stored)


def read_metadata(file: Any) -> dict[str, Any]:
    """Return the metadata of an open file of a cache."""
    return parse_json((file.metadata() or {})[_METADATA])


def is_ours(path: Path) -> bool:
    """Return whether a file was written by `write_tensors`, whole or damaged behind its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return _METADATA in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read_intact(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return what `write_tensors` wrote to a file, and its metadata; None if the file is missing or damaged.

    All of it is read and compared with its digest. A damaged file is logged, as it will be made again.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = read_metadata(file)
            expected = metadata.pop("digest")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _digest(tensors.items(), metadata) == expected:
                return tensors, metadata
    except FileNotFoundError:
        return None
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError):
        pass  # shorter than its header says, or a header that is damaged
    logger.warning(f"{path} is damaged; it will be made again")
    return None


def is_complete(path: Path) -> bool:
    """Return whether a file of a cache exists and holds what was written to it. All of it is read, so ask once per file."""
    return read_intact(path) is not None


def _digest(tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, Any]) -> str:
    """Return a hash of metadata, and of names, types, shapes and values of tensors in any order."""
    whole = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    parts = {}
    for name, tensor in tensors:
        part = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
        part.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        parts[name] = part.digest()
    for name in sorted(parts):
        whole.update(parts[name])
    return whole.hexdigest()


def _encode(
    samples: Sequence[tuple[int, Sample]],
    captions: Sequence[str],
    encode: Callable[[Sequence[tuple[int, Sample]], Callable[[], None]], Part],
    steps: int,
    on_progress: Callable[[float], None],
    part_file: Path,
) -> dict[str, Tensor]:
    """Return the tensors of samples of one size.

    captions: the distinct ones of their chunk. encode: (batch, on_step) -> its tensors. steps: how often it calls on_step, at
    most. part_file: holds the first batches after an interruption.
    """
    height, width = samples[0][1].frame[4:]
    is_generated = samples[0][1].pixels is None
    batch_size = generated_at_once(height, width) if is_generated else max(1, PIXELS_PER_BATCH // (height * width))
    parts = _read_parts(part_file)
    with kept_if_interrupted(part_file, lambda: joined(parts)):
        for i in range(sum(len(part["mean"]) for part in parts), len(samples), batch_size):
            on_progress(samples[i][0])  # a chunk that the teacher generates takes minutes
            batch = samples[i : i + batch_size]
            part = encode(batch, _steps_as_samples(batch, steps, on_progress))
            parts.append({name: value.cpu() for name, value in part.items()})
    tensors = joined(parts)
    tensors |= {name: tensors[name].half() for name in ("mean", "std", TRAJECTORY) if name in tensors}
    tensors["row"] = torch.tensor([captions.index(sample.caption) for _, sample in samples])
    if TRAJECTORY in tensors and not (tensors[TRAJECTORY].isfinite().all() and tensors["mean"].isfinite().all()):
        raise RunError("the teacher's trajectories have values that are not finite; use --precision fp32 or bf16")
    check_finite(tensors["mean"])
    return tensors


def check_finite(mean: Tensor) -> None:
    """Raise RunError for latents that are not finite in fp16, in which they are stored."""
    if not mean.isfinite().all():
        raise RunError("the teacher's VAE gave latents that are not finite; its weights may be broken or need fp32")


def conditions_of_prompts(samples: Sequence[tuple[int, Sample]], teacher: Teacher) -> Part:
    """Return the conditioning that depends on the samples, of samples without images, in fp32."""
    frames = torch.tensor([sample.frame for _, sample in samples], dtype=torch.float32)
    cond = teacher.condition(SampleInfo(frames=frames, pixels=_no_pixels, encode=lambda images: images, seeds=[]))
    return {f"{SAMPLE}{name}": value for name, value in cond.values.items()}


def _no_pixels() -> Tensor:
    raise RunError("this model's conditioning is made of images, and the method has prompts only")


def latent_shape(teacher: Teacher, config: DataConfig) -> tuple[int, int, int]:
    """Return the shape of a sample's latents at the resolution: (C, h, w)."""
    side = config.resolution // teacher.vae_factor
    return teacher.vae.config.latent_channels, side, side


def encode_latents(
    samples: Sequence[tuple[int, Sample]],
    on_step: Callable[[], None],
    *,
    teacher: Teacher,
    config: DataConfig,
    seed: int,
    dtype: torch.dtype,
) -> Part:
    """Return mean and std of the scaled latents, and the conditioning that depends on the samples, in fp32.

    The std of latents that the teacher generated is zero. on_step: called after each of the teacher's sampling steps.
    """
    pixels = [sample.pixels for _, sample in samples if sample.pixels is not None]
    if pixels:
        mean, std = teacher.encode_images(torch.stack(pixels))
    else:
        mean = _generate(samples, teacher, config, seed, dtype, on_step)
        std = torch.zeros_like(mean)
    info = SampleInfo(
        frames=torch.tensor([sample.frame for _, sample in samples], dtype=torch.float32),
        pixels=lambda: torch.stack(pixels) if pixels else teacher.decode(mean) * 2 - 1,
        encode=lambda images: teacher.encode_images(images)[0],
        seeds=[derive_seed(seed, "condition", place) for place, _ in samples],
    )
    cond = teacher.condition(info).values
    return {"mean": mean, "std": std, **{f"{SAMPLE}{name}": value for name, value in cond.items()}}


def _trajectory_encoder(
    plan: TrajectoryPlan,
    prompts: Conditioning,
    captions: Sequence[str],
    teacher: Teacher,
    config: DataConfig,
    seed: int,
    dtype: torch.dtype,
) -> Callable[[Sequence[tuple[int, Sample]], Callable[[], None]], Part]:
    """Return a function that returns what `encode_latents` returns, with the teacher's trajectories to the latents.

    prompts: the encoded captions, as they are stored. captions: the distinct ones of the chunk.
    """
    generate = plan.generator(teacher, dtype)

    def encode(samples: Sequence[tuple[int, Sample]], on_step: Callable[[], None]) -> Part:
        rows = torch.tensor([captions.index(sample.caption) for _, sample in samples])
        frames = torch.tensor([sample.frame for _, sample in samples], dtype=torch.float32)
        own = teacher.condition(SampleInfo(frames=frames, pixels=_no_pixels, encode=lambda images: images, seeds=[]))
        prompt = Conditioning({name: value[rows] for name, value in prompts.values.items()}).to("cpu", torch.float32)
        omega = None
        if plan.omega is not None:
            omega = torch.tensor([plan.sample_omega(seed, place) for place, _ in samples])
        states, mean = generate(_noise(samples, teacher, config, seed), omega, prompt | own.to("cpu"), on_step)
        part = {"mean": mean, "std": torch.zeros_like(mean), TRAJECTORY: states}
        part |= {} if omega is None else {OMEGA: omega}
        return part | {f"{SAMPLE}{name}": value for name, value in own.values.items()}

    return encode


def _noise(samples: Sequence[tuple[int, Sample]], teacher: Teacher, config: DataConfig, seed: int) -> Tensor:
    """Return the noise that the teacher starts from, (n, C, h, w): a function of the seed and each sample's place."""
    shape = latent_shape(teacher, config)
    generators = [torch.Generator().manual_seed(derive_seed(seed, "draw", place)) for place, _ in samples]
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def _steps_as_samples(
    batch: Sequence[tuple[int, Sample]], steps: int, on_progress: Callable[[float], None]
) -> Callable[[], None]:
    """Return a callback for each sampling step of a batch, which reports the share of its samples that is done."""
    done = itertools.count(1)
    return lambda: on_progress(batch[0][0] + len(batch) * min(1.0, next(done) / steps))


def _generate(
    samples: Sequence[tuple[int, Sample]],
    teacher: Teacher,
    config: DataConfig,
    seed: int,
    dtype: torch.dtype,
    on_step: Callable[[], None],
) -> Tensor:
    """Return latents that the teacher generates for the samples' captions."""
    return teacher.generate_latents(
        [sample.caption for _, sample in samples],
        _noise(samples, teacher, config, seed),
        steps=config.teacher_steps,
        guidance_scale=config.guidance_scale,
        scheduler=teacher.family.data_scheduler,
        dtype=dtype,
        on_step=on_step,
        **draw_spacing(teacher),
    )


def draw_spacing(teacher: Teacher) -> dict[str, str]:
    """Return the scheduler options with which the teacher generates images in place of its own, to start at pure noise.

    A zero-terminal-SNR teacher was trained on pure noise at its last time step. Started earlier, it would be given pure noise
    at a time step where it has only seen noisy images (Lin et al. 2023, sec. 3.3).
    """
    is_vp = not teacher.in_pixels and not teacher.is_flow
    return {"timestep_spacing": "trailing"} if is_vp and ends_in_noise(teacher.schedule) else {}
