"""Default prompts and step counts for validation and sampling."""

from pathlib import Path
from typing import Any

from lcmdistill.data.sources.teacher import read_prompts
from lcmdistill.teachers.registry import family_of

STEPS = (1, 2, 4, 8)


def nearest_validated(steps: int) -> int:
    """Return the number of STEPS that is nearest to a number of sampling steps."""
    return min(STEPS, key=lambda each: abs(each - steps))


PREVIEW_STEPS = 4
"sampling steps of the validation images that the model card shows one by one"

PROMPTS = (
    "portrait of an old fisherman, soft window light",
    "a red bicycle leaning on a white wall",
    "watercolour of a harbour at dawn",
    "a bowl of ramen, top view, food photography",
)


def default_prompts(model: str | None, pipeline: Any = None) -> tuple[str, ...]:
    """Return the prompts to use when the user specified none.

    Args:
        model: The teacher's alias, path or hub id. The bundled teacher has its own validation prompts.
        pipeline: The pipeline to sample. A class-conditional network gets its class names.
    """
    from lcmdistill.teachers.naming import resolve_alias

    if pipeline is not None and (prompts := family_of(pipeline).default_prompts(pipeline)):
        return prompts
    bundled = Path(resolve_alias(model or "")) / "prompts-validation.txt"
    return tuple(read_prompts(str(bundled))) if bundled.is_file() else PROMPTS
