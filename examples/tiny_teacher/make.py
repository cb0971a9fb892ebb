"""Make the tiny teacher from nothing: fetch the images, train both parts, and write the pipeline and the shards.

python make.py --output DIR [--work DIR] [--vae-minutes N] [--unet-minutes N]

The work folder keeps packages, checkpoints, and previews: the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# On a small machine: keep freed memory instead of giving it back after every step, and let waiting threads sleep
# instead of spin, so that other load slows a training down by its share, not tenfold.
FASTER = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
}


def run(script: str, *arguments: object) -> None:
    """Run one step in a separate process."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, env=FASTER | os.environ)


def main() -> None:
    """Run the three steps in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="gets tiny/ (the pipeline) and tiny-data/ (shards)")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--vae-minutes", type=float, default=25)
    parser.add_argument("--unet-minutes", type=float, default=70)
    a = parser.parse_args()
    teacher, work = a.output / "tiny", ("--work", a.work)
    run("data.py", *work, "--shards", a.output / "tiny-data", "--prompts", teacher / "prompts-heldout.txt")
    run("train_vae.py", *work, "--minutes", a.vae_minutes, "--preview", a.work / "vae.png")
    run("train_unet.py", *work, "--minutes", a.unet_minutes, "--output", teacher, "--previews", a.work)


if __name__ == "__main__":
    main()
