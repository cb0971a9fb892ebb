"""The best validation of a run: its weights are kept in addition to the last ones, and falling quality is reported.

Everything follows from the lines of metrics.jsonl, so a resumed run continues with the same state.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lcmdistill.utils.checkpoint import BEST, load_best, save_checkpoint
from lcmdistill.utils.errors import RunError
from lcmdistill.utils.metrics_log import read_metrics

PATIENCE = 3
"validations without an improvement after which quality counts as plateaued"

PLATEAU, DROP = 0.005, 0.05
"relative improvement that counts, and relative decline, twice in a row, that counts as a drop"

LEAST_DIVERSITY, LEAST_SATURATION, MOST_SATURATION = 0.6, 0.5, 1.6
"relative to the teacher's images: outside of these a student is taken to collapse"

Values = Sequence[tuple[int, float]]


def history(run: Path, metric: str) -> list[tuple[int, float]]:
    """Return (step, value) of every validation of a run."""
    key = f"val/{metric}"
    return [(line["step"], line[key]) for line in read_metrics(run) if key in line]


def cost(metric: str, value: float) -> float:
    """Return a value to minimize: SSIM counts as its distance from 1."""
    return 1.0 - value if metric.startswith("ssim") else value


def best_of(metric: str, values: Values) -> tuple[int, float]:
    """Return (step, value) of the best validation, the first of equals. values: not empty."""
    return min(values, key=lambda each: cost(metric, each[1]))


def quality_warning(metric: str, values: Values) -> str | None:
    """Return a sentence if quality drops or has plateaued; None otherwise, or after too few validations."""
    costs = [cost(metric, value) for _, value in values]
    step, value = best_of(metric, values)
    index = [s for s, _ in values].index(step)
    after = costs[index + 1 :]
    change = f"{metric} was best at step {step} ({value:.3g}) and is {values[-1][1]:.3g} at step {values[-1][0]}"
    if len(after) >= 2 and min(after[-2:]) > costs[index] * (1 + DROP):
        return f"quality is dropping: {change}; lower the learning rate, or use the best checkpoint (--weights best)"
    if len(costs) > PATIENCE and min(costs[-PATIENCE:]) > min(costs[:-PATIENCE]) * (1 - PLATEAU):
        return f"quality has plateaued: {change}; further training is unlikely to help"
    return None


def collapse_warning(values: Mapping[str, float], steps: int) -> str | None:
    """Return a sentence if the images of a validation show that a student collapses; None otherwise.

    Args:
        values: The numbers of the validation, such as {"val/diversity_4": ...}; both are relative to the teacher's images.
        steps: The number of sampling steps that the student is made for.
    """
    diversity, saturation = (values.get(f"val/{name}_{steps}") for name in ("diversity", "saturation"))
    remedy = "lower --learning-rate, or raise objective.critic_steps"
    if diversity is not None and diversity < LEAST_DIVERSITY:
        return (
            f"the student may be collapsing: its images are {diversity:.2g} times as diverse as the teacher's; {remedy}"
        )
    if saturation is not None and not LEAST_SATURATION <= saturation <= MOST_SATURATION:
        return f"the student may be collapsing: its images are {saturation:.2g} times as saturated as the teacher's; {remedy}"
    return None


def keep_best(run: Path, metric: str, step: int, weights: Mapping[str, Tensor]) -> str | None:
    """Save the weights of the newest validation if it is the best, and return a warning that is new.

    Args:
        run: The run folder.
        metric: The metric that decides.
        step: The training step that was validated; the weights of step 0 are not saved.
        weights: The weights that generated the images.
    """
    values = history(run, metric)
    if not values or values[-1][0] != step:
        return None
    if step and best_of(metric, values)[0] == step:
        _save_best(run, metric, step, values[-1][1], weights)
    warning = quality_warning(metric, values)
    previous = quality_warning(metric, values[:-1]) if len(values) > 1 else None
    is_new = warning and (previous is None or previous.split(":")[0] != warning.split(":")[0])
    return warning if is_new else None


def compared_with_untrained(metric: str, values: Values) -> str | None:
    """Return whether the newest validation is better than that of step 0, and since when; None without both."""
    if len(values) < 2 or values[0][0] != 0:
        return None
    start, better_since = cost(metric, values[0][1]), None
    for step, value in values[1:]:
        is_better = cost(metric, value) < start
        better_since = (better_since or step) if is_better else None
    if better_since is not None:
        return f"better than untrained since step {better_since}"
    return f"not better than untrained ({metric} {values[0][1]:.3g} at step 0, and {values[-1][1]:.3g} now)"


def restore_best(run: Path, metric: str, step: int, weights: Mapping[str, Tensor]) -> None:
    """Save the weights of a resumed step if it is the best and a kill kept `keep_best` from saving them.

    Args:
        run: The run folder.
        metric: The metric that decides.
        step: The step that the run resumes from.
        weights: The weights at that step.
    """
    values = history(run, metric)
    if not step or not values or best_of(metric, values)[0] != step:
        return
    try:
        saved = load_best(run)
    except RunError:  # damaged
        saved = None
    if saved is None or saved[0] != step:
        _save_best(run, metric, step, best_of(metric, values)[1], weights)


def _save_best(run: Path, metric: str, step: int, value: float, weights: Mapping[str, Tensor]) -> None:
    state = {"metric": metric, "value": value}
    save_checkpoint(run / "checkpoints", step, {"weights": weights}, state, name=BEST)


def best_checkpoint_advice(run: Path, metric: str) -> str | None:
    """Return a sentence for the end of a run if an earlier validation was better than the last."""
    values = history(run, metric)
    if len(values) < 2:
        return None
    (step, value), (last_step, last_value) = best_of(metric, values), values[-1]
    if cost(metric, last_value) <= cost(metric, value) * (1 + PLATEAU):
        return None
    if step == 0:
        return (
            f"no validation was better than that of the untrained student ({metric} {value:.3g}, and {last_value:.3g} at step "
            f"{last_step}); train longer, or use a lower learning rate"
        )
    return (
        f"the best validation was at step {step} ({metric} {value:.3g}, and {last_value:.3g} at step {last_step}); export its "
        f"weights with --weights best"
    )
