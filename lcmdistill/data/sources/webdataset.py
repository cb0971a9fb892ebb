"""Webdataset shards as a source."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcmdistill.data.sources.base import IMAGE_SUFFIXES, TAR_SUFFIXES, Member
from lcmdistill.data.sources.remote import REMOTE, open_remote
from lcmdistill.utils.errors import RunError, UsageError


def shards(spec: str, prompts: str | None, seed: int | None) -> Iterator[Member]:
    """Webdataset shards: a folder of tars, a file, a URL (http, https, gs, hf, pipe:), each with brace expansion."""
    for url in shard_urls(spec):
        yield from _shard(url)


def shard_urls(spec: str) -> list[str]:
    """The shards that a --data argument names, in order. Raises UsageError for one that cannot be."""
    from webdataset.shardlists import expand_urls

    folder = Path(spec).expanduser()
    if folder.is_dir():
        return sorted(str(path) for path in folder.iterdir() if path.name.endswith(TAR_SUFFIXES))
    if spec.startswith("pipe:"):
        return [spec]
    urls = [url if url.startswith(REMOTE) else str(Path(url).expanduser()) for url in expand_urls(spec)]
    for url in urls:
        # A command is run only where it can be seen to be one.
        if url.startswith("pipe:") or (not url.startswith(REMOTE) and not Path(url).is_file()):
            raise UsageError(f"--data {spec}: there is no shard {url}")
    return urls


def _shard(url: str) -> Iterator[Member]:
    """One shard's members. What cannot be read of a file is told as a member; of anything else it is a RunError."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    remote, problems = url.startswith(REMOTE), []

    def count_and_go_on(error: Exception) -> bool:
        problems.append(f"unreadable part of a shard ({type(error).__name__})")
        return True

    def give_up(error: Exception) -> bool:
        if isinstance(error, RunError):
            raise RunError(error.args[0])  # without what the reader has added to it
        raise RunError(f"--data {url} cannot be read: what it sends is no whole tar ({type(error).__name__})")

    with open_remote(url) if remote else Path(url).open("rb") as stream:
        files = tar_file_expander([{"url": url, "stream": stream}], handler=give_up if remote else count_and_go_on)
        for sample in group_by_keys(files, handler=count_and_go_on):
            yield from _drain(problems)
            yield _shard_member(sample)
        yield from _drain(problems)
        while remote and stream.read(1 << 20):  # to its end, where a transport tells whether all went well
            pass


def _drain(problems: list[str]) -> Iterator[Member]:
    while problems:
        yield Member("", None, None, problem=problems.pop(0))


def _shard_member(sample: dict[str, Any]) -> Member:
    suffix = next((s for s in IMAGE_SUFFIXES if s[1:] in sample), None)
    meta: dict[str, Any] = {}
    if "json" in sample:
        try:
            loaded = json.loads(sample["json"])
            meta = loaded if isinstance(loaded, dict) else {}
        except ValueError:
            meta = {}
    text = sample["txt"].decode("utf-8", "replace") if "txt" in sample else meta.get("caption", meta.get("text"))
    image = sample[suffix[1:]] if suffix else None
    return Member(
        sample["__key__"], image, text if isinstance(text, str) else None, meta, None if suffix else "no image"
    )
