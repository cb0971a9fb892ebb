"""What loading a teacher will download from the hub, known from the hub's metadata before it is paid."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcmdistill.teachers.hub_session import limited_waiting
from lcmdistill.teachers.naming import is_local, resolve_alias
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json
from lcmdistill.utils.run_dir import free_space
from lcmdistill.utils.units import size_text

WEIGHTS = r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?{variant}(?:-\d+-of-\d+)?\.safetensors"
"the weight files that diffusers loads; a variant is in front of the ending or of the number"

SMALL = ("*.json", "*.txt", "*.model")
"other files of a component"


@dataclass(frozen=True)
class Download:
    """A model that is not in the local cache. size: its bytes; None if the hub does not answer."""

    model: str
    size: int | None

    def __str__(self) -> str:
        return (
            f"{self.model} ({'size unknown: the hub does not answer' if self.size is None else size_text(self.size)})"
        )


def pending_downloads(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    drop: Sequence[str] | None = None,
    others: Sequence[str | None] = (),
) -> list[Download]:
    """Return the models that loading a teacher downloads.

    Args:
        model: An alias, a path or a hub id.
        revision: A revision of the hub id.
        variant: The variant of the weight files.
        drop: Components that are left out.
        others: Replacements of its parts, by path or hub id.
    """
    found = []
    for name, options in (
        (model, (revision, variant, drop or ())),
        *((each, (None, None, ())) for each in others if each),
    ):
        repository = resolve_alias(name)
        if is_local(repository) or _is_cached(repository, options[0]):
            continue
        found.append(Download(repository, _size_on_the_hub(repository, *options)))
    return found


def check_downloads(downloads: Sequence[Download]) -> str:
    """Return what is downloaded, as a line; "" if nothing is.

    Raises:
        UsageError: The disk of the hub's cache cannot hold it.
    """
    if not downloads:
        return ""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    free, needed = free_space(cache)[1], sum(each.size or 0 for each in downloads)
    if needed > free:
        raise UsageError(
            f"downloading {', '.join(map(str, downloads))} needs {size_text(needed)} in {cache}, which has {size_text(free)} "
            "free; free some space, or set HF_HOME to another disk"
        )
    return f"download: {', '.join(map(str, downloads))} into {cache}, which has {size_text(free)} free"


def _is_cached(repository: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("model_index.json", "config.json")
    return any(isinstance(try_to_load_from_cache(repository, name, revision=revision), str) for name in names)


def _size_on_the_hub(repository: str, revision: str | None, variant: str | None, drop: Sequence[str]) -> int | None:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        with limited_waiting():
            files: Any = HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or ()
            sizes = {each.rfilename: each.size or 0 for each in files}
            components = None
            if "model_index.json" in sizes:
                index = parse_json(
                    Path(hf_hub_download(repository, "model_index.json", revision=revision)).read_text("utf-8")
                )
                components = {name for name in index if not name.startswith("_")} - set(drop)
    except Exception:  # not reachable, gated, or missing: loading reports which
        return None
    return sum(size for name, size in sizes.items() if _is_loaded(name, components, variant))


def _is_loaded(name: str, components: set[str] | None, variant: str | None) -> bool:
    """Return whether diffusers downloads a file. components: the folders of a pipeline; None for a single model."""
    folder, _, file = name.rpartition("/")
    if components is not None and folder and folder not in components:
        return False
    weights = WEIGHTS.format(variant=re.escape(f".{variant}") if variant else "")
    is_small = any(fnmatch.fnmatch(file, pattern) for pattern in SMALL)
    return is_small or (bool(folder or components is None) and re.fullmatch(weights, file) is not None)
