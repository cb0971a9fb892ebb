"""The registry of teacher families, and the ways to find a family. Nothing here imports torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcmdistill.teachers.family import SingleFileLayout, TeacherFamily
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json
from lcmdistill.utils.registry import LazyRegistry

FAMILIES = LazyRegistry(
    {
        "sd": "lcmdistill.teachers.sd:STABLE_DIFFUSION",
        "sdxl": "lcmdistill.teachers.sdxl:STABLE_DIFFUSION_XL",
        "pixel": "lcmdistill.teachers.pixel:PIXEL_SPACE",
        "sd-inpaint": "lcmdistill.teachers.inpaint:STABLE_DIFFUSION_INPAINT",
        "sdxl-inpaint": "lcmdistill.teachers.inpaint:STABLE_DIFFUSION_XL_INPAINT",
        "sd3": "lcmdistill.teachers.sd3:STABLE_DIFFUSION_3",
        "sana": "lcmdistill.teachers.sana:SANA",
        "flux": "lcmdistill.teachers.flux:FLUX_1",
        "pixart": "lcmdistill.teachers.pixart:PIXART_ALPHA",
    }
)


def supported_classes() -> tuple[str, ...]:
    """Return the pipeline classes that can be distilled, in the order in which messages list them."""
    return tuple(name for family in FAMILIES.values() for name in family.pipeline_classes)


def family_of_class(name: str) -> TeacherFamily | None:
    """Return the family of a diffusers pipeline class; None if it has none."""
    return next((family for family in FAMILIES.values() if name in family.pipeline_classes), None)


def family_of(pipeline: Any) -> TeacherFamily:
    """Return the family of a loaded pipeline.

    Raises:
        UsageError: The pipeline's class belongs to no family.
    """
    name = type(pipeline).__name__
    family = family_of_class(name)
    if family is None:
        raise UsageError(f"a {name} is not supported; supported are {', '.join(supported_classes())}")
    return family


def family_of_folder(folder: Path) -> TeacherFamily | None:
    """Return the family that a diffusers folder's `model_index.json` names; None if there is none."""
    try:
        index = parse_json((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return family_of_class(str(index.get("_class_name"))) if isinstance(index, dict) else None


def family_of_lora_header(metadata: dict[str, str]) -> TeacherFamily:
    """Return the family of the base that a LoRA's header names; Stable Diffusion if it names none.

    Args:
        metadata: The header's strings. Of families that share a base version, the plain one precedes inpainting.
    """
    version = metadata.get("ss_base_model_version")
    for family, layout in single_file_layouts():
        if version in layout.base_versions.values():
            return family
    return FAMILIES["sd"]


def single_file_layouts() -> Iterator[tuple[TeacherFamily, SingleFileLayout]]:
    """Yield each family with each of its single-file layouts."""
    for family in FAMILIES.values():
        for layout in family.layouts:
            yield family, layout
