"""Helpers that several tests share."""

import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.latent_cache import cache_folder, prepare
from lcmdistill.data.sources.base import Member
from lcmdistill.data.sources.registry import make_source, make_sources
from lcmdistill.data.survey import SourceReport, survey
from lcmdistill.data.transforms import Sample, check_sample
from lcmdistill.teachers.base import Teacher


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int = 0, size: tuple[int, int] = (20, 20)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def good(keys: Sequence[int]) -> list[tuple[str, bytes]]:
    """Sound members: a picture and a caption each."""
    pairs = [[(f"{i:04d}.png", encoded(picture(i))), (f"{i:04d}.txt", f"picture {i}".encode())] for i in keys]
    return [file for pair in pairs for file in pair]


def captions(spec: str | Path) -> list[str | None]:
    return [member.caption for member in make_source(str(spec)).members()]


def prepared(word: str, config: DataConfig, teacher: Teacher, seed: int, **options: Any) -> Path:
    """Prepare the source of a --data word, as a run does."""
    (source,) = make_sources(replace(config, sources=(word,)), own_prompts=teacher.own_prompts, seed=seed)
    return prepare(source, config, teacher, seed, **options)


def cache_of(word: str, config: DataConfig, teacher: Teacher, seed: int) -> Path:
    """Return the folder that `prepared` writes to."""
    (source,) = make_sources(replace(config, sources=(word,)), own_prompts=teacher.own_prompts, seed=seed)
    return cache_folder(source, config, teacher, seed)


def surveyed(config: DataConfig, **options: Any) -> list[SourceReport]:
    """Inspect the sources of a config, as a dry run does."""
    teacher = options.get("teacher")
    sources = make_sources(config, own_prompts=teacher.own_prompts if teacher else (), seed=0)
    return survey(sources, config, 0, **options)


def reasons(spec: str | Path, config: DataConfig | None = None) -> Counter[str]:
    """How many members are kept, and why the others are not."""
    config = config or DataConfig(resolution=16)
    outcomes = [check_sample(member, config, 0, i) for i, member in enumerate(make_source(str(spec)).members())]
    return Counter("kept" if isinstance(o, Sample) else o.reason for o in outcomes)


def pixels(image: Image.Image | bytes, **options: Any) -> Tensor:
    place = options.pop("place", 0)
    config = DataConfig(**{"resolution": 16, **options})
    raw = image if isinstance(image, bytes) else encoded(image)
    outcome = check_sample(Member("a", raw, "a caption"), config, 0, place)
    assert isinstance(outcome, Sample), outcome
    assert outcome.pixels is not None
    return outcome.pixels


def config_for(spec: str, cache_dir: Path, **options: Any) -> DataConfig:
    return DataConfig(sources=(spec,), resolution=16, cache_dir=str(cache_dir), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
