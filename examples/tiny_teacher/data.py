"""Images and captions for the tiny teacher: fetch, caption, split, and write as webdataset shards.

The images are the 64-pixel Noto emoji of the npm package ``emoji-datasource-google``; the plain names come from the
npm package ``cldr-annotations-full``. Both are fetched with ``npm pack``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PACKAGES = ("emoji-datasource-google@16.0.0", "cldr-annotations-full@48.2.0")
SIZE = 64
HELD_OUT_SHARE = 0.0425
SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
# The word that follows a name, by the start of the subcategory (the first match wins); the rest are "object".
WORDS = {
    "cat-face": "animal", "monkey-face": "animal", "animal": "animal", "plant": "plant", "food": "food",
    "drink": "drink", "face": "face", "family": "people", "person": "person", "hand": "hand", "body": "body",
    "transport-sign": "sign", "transport": "vehicle", "place": "place", "sky": "weather", "heart": "heart",
    "emotion": "symbol", "sport": "sport", "clothing": "clothing", "music": "music", "time": "clock",
    "geometric": "shape", "zodiac": "symbol", "religion": "symbol", "av-symbol": "symbol", "alphanum": "symbol",
    "arrow": "arrow", "keycap": "symbol", "punctuation": "symbol", "math": "symbol", "currency": "symbol",
    "gender": "symbol", "warning": "sign", "other-symbol": "symbol", "skin-tone": "shape", "flag": "flag",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One image of the set: its key, file, caption, and where it belongs."""

    key: str
    path: Path
    caption: str
    category: str
    kind: str  # "base", "tone" (a skin-tone variant) or "flag" (of a country)
    held_out: bool = False


def fetch(work: Path) -> Path:
    """Fetch and unpack both packages into ``work`` (skipping what is there) and return the unpacked folder."""
    archives, unpacked = work / "npm", work / "unpacked"
    archives.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        name, _, version = package.partition("@")
        done = unpacked / name / "package.json"
        if done.exists():
            continue
        archive = archives / f"{name}-{version}.tgz"
        if not archive.exists():
            subprocess.run(["npm", "pack", "--silent", package], cwd=archives, check=True)
        with tarfile.open(archive) as tar:
            wanted = re.compile(r"package/(emoji\.json|img/google/64/.*|LICENSE|annotations/en/.*)$")
            members = [member for member in tar if wanted.match(member.name)]
            for member in members:
                member.name = member.name.removeprefix("package/")
            tar.extractall(unpacked / name, members, filter="data")
        done.write_text(json.dumps({"name": name, "version": version}))
    return unpacked


def load_entries(work: Path) -> list[Entry]:
    """Every image with its caption, in a fixed order, with the held-out ones marked.

    They are the emoji, unless ``work`` has an ``entries.jsonl`` that lists other images of the same size.
    """
    listed = work / "entries.jsonl"
    if listed.exists():
        lines = [json.loads(line) for line in listed.read_text().splitlines()]
        paths = [Path(line["path"]) for line in lines]
        return [
            Entry(path.stem, path, line["caption"], "", "base", held_out=line["held_out"])
            for path, line in zip(paths, lines, strict=True)
        ]
    unpacked = fetch(work)
    images = unpacked / "emoji-datasource-google"
    records: list[dict[str, Any]] = json.loads((images / "emoji.json").read_text())
    annotations = json.loads((unpacked / "cldr-annotations-full/annotations/en/annotations.json").read_text())
    names = {text: note["tts"][0] for text, note in annotations["annotations"]["annotations"].items() if "tts" in note}

    entries: dict[str, Entry] = {}
    for record in sorted(records, key=lambda record: record["sort_order"]):
        subcategory = record["subcategory"]
        name = _plain_name(record, names)
        kind = "flag" if subcategory == "country-flag" else "base"
        variants = [(record["image"], kind, _caption(name, subcategory))]
        for tones, variant in record.get("skin_variations", {}).items():
            variants.append((variant["image"], "tone", f"{name}, {_tone(tones)}"))
        for image, image_kind, caption in variants:
            if caption in entries:
                caption = f"{caption}, {record['name'].lower()}"
            path = images / "img/google/64" / image
            if path.exists():
                entries[caption] = Entry(path.stem, path, caption, record["category"], image_kind)
    return _split(list(entries.values()))


def prompts_to_check(entries: list[Entry], wanted: tuple[str, ...]) -> list[str]:
    """The wanted captions where the images have any of them, and else the first held-out captions, as many."""
    captions = {entry.caption for entry in entries}
    if captions.isdisjoint(wanted):
        return [entry.caption for entry in entries if entry.held_out][: len(wanted)]
    return list(wanted)


def load_image(path: Path) -> Image.Image:
    """The image composed on white."""
    image = Image.open(path).convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB").resize((SIZE, SIZE)) if image.size != (SIZE, SIZE) else canvas.convert("RGB")


def load_pixels(entries: list[Entry]) -> np.ndarray:
    """All images as one uint8 array of shape (count, 64, 64, 3)."""
    return np.stack([np.asarray(load_image(entry.path)) for entry in entries])


def write_shards(entries: list[Entry], folder: Path, count: int = 2, quality: int = 94) -> list[Path]:
    """Write key.webp + key.txt pairs as ``count`` gzipped webdataset shards, byte for byte the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    shuffled = sorted(entries, key=lambda entry: _hash("shard", entry.caption))
    paths = []
    for index in range(count):
        path = folder / f"emoji-{index:06d}.tar.gz"
        with (
            path.open("wb") as raw,
            gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
            tarfile.open(mode="w", fileobj=packed, format=tarfile.USTAR_FORMAT) as tar,
        ):
            for entry in shuffled[index::count]:
                buffer = io.BytesIO()
                load_image(entry.path).save(buffer, "WEBP", quality=quality, method=6, use_sharp_yuv=True)
                for suffix, content in (("webp", buffer.getvalue()), ("txt", entry.caption.encode())):
                    member = tarfile.TarInfo(f"{entry.key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        paths.append(path)
    return paths


def _plain_name(record: dict[str, Any], names: dict[str, str]) -> str:
    """A short lower-case name, "red apple" or "flag of norway"."""
    text = "".join(chr(int(code, 16)) for code in record["unified"].split("-"))
    name = names.get(text) or names.get(text.replace("\ufe0f", "")) or record["name"]
    if record["subcategory"] in ("country-flag", "subdivision-flag"):
        name = "flag of " + record["name"].removesuffix(" Flag")
    name = name.lower().replace("\u2019", "'")
    name = re.sub(r"^(\w+): (\w+ hair|beard)$", r"\1 with \2", name)
    name = re.sub(r"^(\w+): bald$", r"bald \1", name)
    name = re.sub(r"^family: (.*)$", lambda match: "family of " + match[1].replace(", ", " and "), name)
    name = re.sub(r"^(couple with heart|kiss): (\w+), (\w+)$", r"\1 of \2 and \3", name)
    name = re.sub(r"[\u201c\u201d\"():,]", "", name)
    return re.sub(r"\s+", " ", name).strip()


def _caption(name: str, subcategory: str) -> str:
    word = next((word for start, word in WORDS.items() if subcategory.startswith(start)), "object")
    return name if word in name.split() or name.startswith("flag of") else f"{name}, {word}"


def _tone(codes: str) -> str:
    """The words for one skin tone, or for two people's."""
    first, *rest = [SKIN_TONES[code] for code in codes.split("-")]
    if rest and rest[0] != first:
        return f"{first} and {rest[0]} skin tones"
    return f"{first} skin tone"


def _split(entries: list[Entry]) -> list[Entry]:
    """Mark the same share of every category and kind as held out, chosen by a hash of the caption."""
    strata: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        strata[entry.category, entry.kind].append(entry)
    held_out: set[str] = set()
    for stratum in strata.values():
        ranked = sorted(stratum, key=lambda entry: _hash("held out", entry.caption))
        held_out.update(entry.caption for entry in ranked[: round(len(ranked) * HELD_OUT_SHARE)])
    return [Entry(e.key, e.path, e.caption, e.category, e.kind, held_out=e.caption in held_out) for e in entries]


def _hash(salt: str, text: str) -> str:
    return hashlib.sha256(f"{salt}:{text}".encode()).hexdigest()


def main() -> None:
    """Fetch the images and write the shards and the held-out captions."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for packages and checkpoints")
    parser.add_argument("--shards", type=Path, required=True, help="folder for the webdataset shards")
    parser.add_argument("--prompts", type=Path, required=True, help="file for the held-out captions")
    arguments = parser.parse_args()
    entries = load_entries(arguments.work)
    training = [entry for entry in entries if not entry.held_out]
    held_out = [entry.caption for entry in entries if entry.held_out]
    for path in write_shards(training, arguments.shards):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    arguments.prompts.parent.mkdir(parents=True, exist_ok=True)
    arguments.prompts.write_text("\n".join(held_out) + "\n")
    print(f"{len(training)} training images, {len(held_out)} held out")


if __name__ == "__main__":
    main()
