"""The best of a run's validations: which it was, its weights kept beside the last ones, and a word when quality falls.

All of it follows from the lines of metrics.jsonl, so that a resumed run knows what the run before it knew.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lcmdistill.utils.checkpoint import BEST, save_checkpoint
from lcmdistill.utils.metrics_log import read_metrics

PATIENCE = 3
"validations without a better one after which quality counts as standing still"

STILL, FALLEN = 0.005, 0.05
"by what part a validation must be better to count, and worse twice in a row to count as a fall"

Values = Sequence[tuple[int, float]]


def history(run: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every validation of a run."""
    key = f"val/{metric}"
    return [(line["step"], line[key]) for line in read_metrics(run) if key in line]


def cost(metric: str, value: float) -> float:
    """A validation's value as something to make small: SSIM counts as its distance from 1."""
    return 1.0 - value if metric.startswith("ssim") else value


def best_of(metric: str, values: Values) -> tuple[int, float]:
    """(step, value) of the best validation, the first of equals. values: not empty."""
    return min(values, key=lambda each: cost(metric, each[1]))


def quality_warning(metric: str, values: Values) -> str | None:
    """A sentence if quality falls or has stopped rising; None if all is well, or too little is known."""
    costs = [cost(metric, value) for _, value in values]
    step, value = best_of(metric, values)
    place = [s for s, _ in values].index(step)
    after = costs[place + 1 :]
    was = f"{metric} was best at step {step} ({value:.3g}) and is {values[-1][1]:.3g} at step {values[-1][0]}"
    if len(after) >= 2 and min(after[-2:]) > costs[place] * (1 + FALLEN):
        return f"quality falls: {was}; lower the learning rate, or stop at the best"
    if len(costs) > PATIENCE and min(costs[-PATIENCE:]) > min(costs[:-PATIENCE]) * (1 - STILL):
        return f"quality has stopped rising: {was}; more steps of the same are of little use"
    return None


def keep_best(run: Path, metric: str, step: int, weights: Mapping[str, Tensor]) -> str | None:
    """After a validation: keep its weights if none was better; a sentence if there is a new reason for concern.

    weights: of what draws. Before any training there is nothing to keep.
    """
    values = history(run, metric)
    if not values or values[-1][0] != step:
        return None
    if step and best_of(metric, values)[0] == step:
        state = {"metric": metric, "value": values[-1][1]}
        save_checkpoint(run / "checkpoints", step, {"weights": weights}, state, name=BEST)
    said, before = quality_warning(metric, values), quality_warning(metric, values[:-1]) if len(values) > 1 else None
    return said if said and (before is None or before.split(":")[0] != said.split(":")[0]) else None


def best_checkpoint_advice(run: Path, metric: str) -> str | None:
    """What to say at a run's end, if an earlier validation was better than the last."""
    values = history(run, metric)
    if not values:
        return None
    (step, value), (last, ended) = best_of(metric, values), values[-1]
    if not step or cost(metric, ended) <= cost(metric, value) * (1 + STILL):
        return None
    return (
        f"the best validation was at step {step} ({metric} {value:.3g}, and {ended:.3g} at step {last}); its weights "
        f"are kept in {run / 'checkpoints' / BEST}"
    )
