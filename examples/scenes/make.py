"""Make the scenes teacher from nothing: render pictures, train autoencoder, U-Net and text encoder, write the pipeline.

python examples/scenes/make.py --output DIR [--work DIR] [--scenes N] [--vae-minutes N] [--unet-minutes N]

The networks and their trainings are those of examples/tiny_teacher. The work folder keeps pictures, checkpoints and
previews: the same command again continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image
from render import render, scene

TRAINING = Path(__file__).resolve().parent.parent / "tiny_teacher"
HELD_OUT = 200


def draw(number: int, folder: Path) -> str:
    """Write the picture of a scene and its caption, unless they are there, and return the caption."""
    path, caption = folder / f"{number:06d}.png", scene(number).caption
    if not path.exists():
        aside = path.with_suffix(".writing")
        Image.fromarray(render(number)).save(aside, "PNG")
        path.with_suffix(".txt").write_text(caption + "\n")
        os.replace(aside, path)
    return caption


def render_all(work: Path, count: int, processes: int) -> None:
    """Render the scenes, and list them as the trainings read them. The first ones are held out."""
    folders = [work / "held-out", work / "images"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [(number, folders[number >= HELD_OUT]) for number in range(HELD_OUT + count)]
    with multiprocessing.Pool(processes) as pool:
        captions = pool.starmap(draw, jobs, chunksize=64)
    lines = [
        json.dumps({"path": str(folder / f"{number:06d}.png"), "caption": caption, "held_out": number < HELD_OUT})
        for (number, folder), caption in zip(jobs, captions, strict=True)
    ]
    (work / "entries.jsonl").write_text("\n".join(lines) + "\n")


def train(script: str, *arguments: object) -> None:
    """Run one of the trainings in a process of its own."""
    subprocess.run([sys.executable, str(TRAINING / script), *map(str, arguments)], check=True)


def main() -> None:
    """Render, then train both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the pipeline folder")
    parser.add_argument("--work", type=Path, default=Path("work-scenes"), help="pictures, checkpoints, previews")
    parser.add_argument("--scenes", type=int, default=16000, help="pictures to train on")
    parser.add_argument("--vae-minutes", type=float, default=25)
    parser.add_argument("--unet-minutes", type=float, default=120)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    a = parser.parse_args()
    render_all(a.work, a.scenes, a.processes)
    work = ("--work", a.work)
    train("train_vae.py", *work, "--minutes", a.vae_minutes, "--preview", a.work / "vae.png")
    unet = ("--minutes", a.unet_minutes, "--processes", a.processes, "--previews", a.work)
    train("train_unet.py", *work, *unet, "--output", a.output)
    held_out = [json.loads(line) for line in (a.work / "entries.jsonl").read_text().splitlines()[:HELD_OUT]]
    (a.output / "prompts-heldout.txt").write_text("\n".join(entry["caption"] for entry in held_out) + "\n")


if __name__ == "__main__":
    main()
