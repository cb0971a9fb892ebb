"""Public information about a teacher: a name without local folders, its license, and the code that opens it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmdistill.teachers.registry import FAMILIES
from lcmdistill.teachers.single_file.inspect import read_header
from lcmdistill.utils.redact import public_word
from lcmdistill.utils.run_names import names_a_run, near_runs
from lcmdistill.utils.spelling import near_words, or_list

ALIASES = {alias: entry.model for family in FAMILIES.values() for alias, entry in family.aliases.items()}
"short name -> hub id or folder"

LICENSES = {
    alias: {"license": entry.license}
    for family in FAMILIES.values()
    for alias, entry in family.aliases.items()
    if entry.license
}
"alias -> the license on its hub card, which a downloaded pipeline's files lack"

PREDICTED = {"v_prediction": "v", "flow_prediction": "velocity"}
"prediction type -> what such a network predicts, where the word is another one"

_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")


def resolve_alias(model: str) -> str:
    """Return the hub id or folder that a name stands for, which is what other programs need."""
    return ALIASES.get(model, model)


def model_hint(model: str) -> str:
    """Return the part of a message that lists what an unknown model may mean: " (did you mean sd15?)"; "" if nothing is near.

    These are aliases, by their names and those of their models on the hub (some of which moved to another owner), and runs.
    """
    names = {alias: alias for alias in ALIASES} | {
        public_name(entry).rpartition("/")[2]: a for a, entry in ALIASES.items()
    }
    near = [names[each] for each in near_words(model.rstrip("/").rpartition("/")[2], names, 3)]
    words = list(dict.fromkeys([*near, *near_runs(model)]))
    return f" (did you mean {or_list(words)}?)" if words else ""


def public_name(model: str) -> str:
    """Return the name that others know a model by: a hub id, or the last part of a local path."""
    name = model if model == "tiny" else resolve_alias(model)
    if snapshot := _SNAPSHOT.search(name):
        return "/".join(snapshot.groups())
    return Path(name).expanduser().resolve().name if is_local(name) else name


def public_path(folder: Path) -> str:
    """Return a folder as it was specified, or its last part if the path would reveal other folders."""
    return folder.name if folder.is_absolute() or ".." in folder.parts else str(folder)


def is_local(model: str) -> bool:
    """Return whether a model's name is a local path, whether it exists or not."""
    is_path = model.count("/") != 1 or model.startswith((".", "/", "~")) or names_a_run(model)
    return is_path or Path(model).expanduser().exists()


def loading_code(model: str, kind: str, scheduler: str, options: str = "", absent: str = "") -> str:
    """Return Python code that opens a model with a student's scheduler; local paths appear by their last part only.

    Args:
        model: An alias, a hub id or a local path.
        kind: The pipeline class that opens a single file.
        scheduler: The scheduler class.
        options: Further arguments of the scheduler, after the teacher's config.
        absent: Further arguments that open the model, without the parts that are left out.
    """
    name, before = public_name(model), ""
    call = f'DiffusionPipeline.from_pretrained("{name}"{absent})'
    if name.endswith(".safetensors"):
        call = f'{kind}.from_single_file("{name}"{absent})'
    elif name == "tiny":
        before = "from importlib.resources import files\n\n"
        call = 'DiffusionPipeline.from_pretrained(str(files("lcmdistill") / "assets" / "tiny"))'
    names = ", ".join(sorted({call.partition(".")[0], scheduler}))
    return f"""{before}from diffusers import {names}

pipeline = {call}
pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config{options})
"""


def license_of(model: str) -> dict[str, str]:
    """Return `license`, and `license_name` and `license_link` for a license with a name of its own, in the hub's terms.

    It is read from the model card in the folder or in the hub's cache, or from a single file's header; {} if it is unknown.
    """
    name = resolve_alias(model)
    path = Path(name).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        return _on_the_hub(read_header(path).metadata.get("modelspec.license", ""))
    card = path / "README.md" if path.is_dir() else None if is_local(name) else _cached(name)
    front_matter = _front_matter(card) if card and card.is_file() else {}
    keys = ("license", "license_name", "license_link")
    entries = {key: str(front_matter[key]) for key in keys if isinstance(front_matter.get(key), str)}
    link = entries.get("license_link", "")
    if link and "://" not in link:  # a file next to the teacher's card
        del entries["license_link"]
        if not is_local(name):
            entries["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
    return entries if "license" in entries else LICENSES.get(model, {})


def license_name(entries: Mapping[str, str]) -> str | None:
    """Return what a license is called; None if it is unknown."""
    return entries.get("license_name") or entries.get("license")


def _on_the_hub(text: str) -> dict[str, str]:
    """Return a license in free text in the hub's terms: a short identifier, or "other" with a name."""
    if not text:
        return {}
    is_identifier = re.fullmatch(r"[a-z0-9.+-]+", text)
    return {"license": text} if is_identifier else {"license": "other", "license_name": text}


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "README.md")
    return Path(path) if isinstance(path, str) else None


def _front_matter(card: Path) -> Mapping[str, Any]:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(card) or {}
    except (ValueError, YAMLError):  # not YAML, or not a mapping
        return {}


def redact_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings, {"section.key": value}, in a form that is safe to publish.

    Of local paths only the last part remains, of shell commands only that they are commands, of URLs no credentials or query.
    """

    def redact(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [redact(key, each) for each in value]
        if key == "teacher.model":
            return model if (model := str(value)) in ALIASES else public_name(model)
        if not isinstance(value, str) or key == "run.validation_prompts":
            return value
        return public_word(value)

    return {key: redact(key, value) for key, value in settings.items()}
