"""The small network on top of features that ImageReward and LAION's second aesthetic predictor share.

It has five linear layers without activations between them, with dropout in training.
"""

from collections.abc import Mapping

from torch import Tensor, nn

LAYERS = (0, 2, 4, 6, 7)
"the indices of the linear layers in the published files; between them are dropout layers"


def head_of(state: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]] | None:
    """Return the network that weights belong to, not loaded yet, and its weights; None for weights of another kind.

    Args:
        state: `layers.INDEX.weight` and `.bias` of five layers, or `weight` and `bias` of a single one.
    """
    if set(state) == {"weight", "bias"}:
        return _linear(state["weight"]), dict(state)
    if set(state) != {f"layers.{i}.{kind}" for i in LAYERS for kind in ("weight", "bias")}:
        return None
    modules: list[nn.Module] = [nn.Identity() for _ in range(max(LAYERS) + 1)]
    for i in LAYERS:
        modules[i] = _linear(state[f"layers.{i}.weight"])
    return nn.Sequential(*modules), {key.removeprefix("layers."): value for key, value in state.items()}


def _linear(weight: Tensor) -> nn.Linear:
    out, inputs = weight.shape
    return nn.Linear(inputs, out)
