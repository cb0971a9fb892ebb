"""Helpers that several tests share."""

import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.sources.base import Member
from lcmdistill.data.sources.registry import open_source
from lcmdistill.data.transforms import Sample, check_sample


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int = 0, size: tuple[int, int] = (20, 20)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
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
    return [member.caption for member in open_source(str(spec), None)]


def reasons(spec: str | Path, config: DataConfig | None = None) -> Counter[str]:
    """How many members are kept, and why the others are not."""
    config = config or DataConfig(resolution=16)
    outcomes = [check_sample(member, config, 0, i) for i, member in enumerate(open_source(str(spec), None))]
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
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
