"""The size of a download is known before it is paid."""

import json
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from lcmdistill.teachers.downloads import Download, check_downloads, pending_downloads
from lcmdistill.utils import run_dir
from lcmdistill.utils.errors import UsageError

FILES = {
    "model_index.json": 500,
    "README.md": 10_000,
    "v1-5-pruned.safetensors": 7_000_000_000,
    "unet/config.json": 700,
    "unet/diffusion_pytorch_model.safetensors": 3_440_000_000,
    "unet/diffusion_pytorch_model.fp16.safetensors": 1_720_000_000,
    "unet/diffusion_pytorch_model.bin": 3_440_000_000,
    "vae/diffusion_pytorch_model.safetensors": 334_000_000,
    "vae/diffusion_pytorch_model.fp16.safetensors": 167_000_000,
    "safety_checker/model.safetensors": 1_216_000_000,
    "vae_1_0/diffusion_pytorch_model.safetensors": 334_000_000,
}
Usage = namedtuple("Usage", ("total", "used", "free"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub with one model, and an empty local cache."""
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "X", "unet": [], "vae": [], "safety_checker": []}))
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in FILES.items()]
    info = SimpleNamespace(siblings=siblings)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: info))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(index))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 3_440_000_000 + 334_000_000 + 1_216_000_000),
        ({"variant": "fp16"}, 1_720_000_000 + 167_000_000),
        ({"drop": ("safety_checker",)}, 3_440_000_000 + 334_000_000),
    ],
)
def test_the_size_is_that_of_the_files_that_are_loaded(options: dict, size: int) -> None:
    (download,) = pending_downloads("owner/model", **options)
    assert download.size == size + 500 + 700
    assert str(download).startswith("owner/model (")


@pytest.mark.usefixtures("hub")
def test_parts_are_downloaded_too(tmp_path: Path) -> None:
    found = pending_downloads("owner/model", others=(None, "owner/vae", str(tmp_path)))
    assert [each.model for each in found] == ["owner/model", "owner/vae"]
    assert pending_downloads("tiny") == pending_downloads(str(tmp_path)) == []


def test_a_hub_that_does_not_answer_leaves_the_size_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "HfApi", fail)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    assert pending_downloads("owner/model") == [Download("owner/model", None)]
    assert "size unknown" in check_downloads([Download("owner/model", None)])


def test_what_does_not_fit_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir.shutil, "disk_usage", lambda path: Usage(10**12, 0, 2 * 10**9))
    assert check_downloads([]) == ""
    assert check_downloads([Download("a/b", 10**9)]).startswith("download: a/b (1.0 GB) into ")
    with pytest.raises(
        UsageError, match=r"downloading a/b \(3\.0 GB\) needs 3\.0 GB in .*2\.0 GB free; free some space"
    ):
        check_downloads([Download("a/b", 3 * 10**9)])


def test_a_model_in_the_cache_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/model_index.json")
    assert pending_downloads("owner/model") == []
