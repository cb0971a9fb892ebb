"""Default prompts and step counts for validation and sampling."""

from pathlib import Path
from typing import Any

from lcmdistill.data.sources.teacher import read_prompts
from lcmdistill.teachers.pixel import class_names

STEPS = (1, 2, 4, 8)

SHOWN = 4
"the steps of the newest pictures that the model card shows one by one"

PROMPTS = (
    "portrait of an old fisherman, soft window light",
    "a red bicycle leaning on a white wall",
    "watercolour of a harbour at dawn",
    "a bowl of ramen, top view, food photography",
)

UNTOLD = ("image 1", "image 2", "image 3", "image 4")
"rows of a network that takes no prompt; each has noise of its own"


def default_prompts(model: str | None, network: Any = None) -> tuple[str, ...]:
    """The prompts of a validation grid that nobody chose: the tiny teacher speaks of other things than its elders.

    network: what draws; a class-conditional one has a name for each of its classes.
    """
    from lcmdistill.teachers.naming import resolve_alias

    if type(network).__name__ == "UNet2DModel":
        return class_names(network) or UNTOLD
    own = Path(resolve_alias(model or "")) / "prompts-validation.txt"
    return tuple(read_prompts(str(own))) if own.is_file() else PROMPTS
