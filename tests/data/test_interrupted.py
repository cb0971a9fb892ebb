"""An interrupted preparation keeps what is done, image by image."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lcmdistill.config.schema import DataConfig
from lcmdistill.data import chunks
from lcmdistill.data.latent_cache import prepare
from lcmdistill.data.sources.registry import make_source
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.utils.errors import Interrupted


def test_an_interrupted_chunk_continues_with_the_images_that_are_done(
    small_teacher: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, source = load_teacher(str(small_teacher)), make_source(str(image_folder))
    monkeypatch.setattr(chunks, "PIXELS_PER_BATCH", 4 * 16 * 16)  # four images at once
    encoded: list[int] = []
    encode, stops = teacher.vae.encode, False

    def counted(pixels: Tensor, *args: Any, **options: Any) -> Any:
        if stops and len(encoded) == 2:
            raise Interrupted("stopped", 2)
        encoded.append(len(pixels))
        return encode(pixels, *args, **options)

    monkeypatch.setattr(teacher.vae, "encode", counted)
    config = {name: DataConfig(resolution=16, cache_dir=str(tmp_path / name)) for name in ("whole", "parts")}
    whole = prepare(source, config["whole"], teacher, 0)
    assert encoded == [4, 4, 4]
    encoded.clear()
    stops = True
    with pytest.raises(Interrupted):
        prepare(source, config["parts"], teacher, 0)
    assert len(list((tmp_path / "parts").rglob("*.part"))) == 1
    assert not list((tmp_path / "parts").rglob("*.safetensors"))
    stops = False
    parts = prepare(source, config["parts"], teacher, 0)
    assert encoded == [4, 4, 4]  # none twice
    assert not list((tmp_path / "parts").rglob("*.part"))
    one, other = (next(folder.glob("*.safetensors")).read_bytes() for folder in (whole, parts))
    assert one == other
