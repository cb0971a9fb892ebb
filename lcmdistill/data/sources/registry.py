"""Which sources there are, and how a --data word becomes one of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcmdistill.config.schema import DataConfig
from lcmdistill.data.sources.base import Source, SourceOptions
from lcmdistill.data.sources.captions import Captions
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.redact import redact_word
from lcmdistill.utils.registry import LazyRegistry

if TYPE_CHECKING:
    from lcmdistill.data.trajectories import TrajectoryPlan

SOURCES = LazyRegistry(
    {
        "teacher": "lcmdistill.data.sources.teacher:TeacherSource",
        "tiny": "lcmdistill.data.sources.bundled:BundledShards",
        "remote": "lcmdistill.data.sources.remote:RemoteShards",
        "shards": "lcmdistill.data.sources.webdataset:Shards",
        "folder": "lcmdistill.data.sources.image_folder:ImageFolder",
    }
)
"the sources, in the order in which they try to parse a word"


def make_source(
    word: str,
    *,
    prompts: str | None = None,
    own_prompts: Sequence[str] = (),
    seed: int | None = None,
    prompts_only: bool = False,
    trajectory: "TrajectoryPlan | None" = None,
) -> Source:
    """Return the source that a --data word names. This is the only place where the word is parsed.

    Args:
        word: What the user wrote.
        prompts: File of prompts for the source `teacher`.
        own_prompts: The teacher's own default prompts.
        seed: Decides the order of an image folder; None keeps the order of the names.
        prompts_only: Whether only the captions are of use.
        trajectory: How the source `teacher` generates whole trajectories; None for finished latents only.

    Raises:
        UsageError: If the word names no source, or one that does not exist.
    """
    options = SourceOptions(prompts, tuple(own_prompts), seed, trajectory)
    for kind in SOURCES:
        source = SOURCES[kind].parse(word, options)
        if source is not None:
            return Captions.of(source) if prompts_only else source
    path, label = Path(word).expanduser(), redact_word(word)
    if path.exists():
        raise UsageError(f"--data {label} is neither a folder nor a .tar shard")
    if "*" in word:
        raise UsageError(
            f"--data {label}: wildcards are not expanded; name the folder, or use braces, such as shards/{{00..99}}.tar"
        )
    raise UsageError(
        f"--data {label} does not exist; pass a folder of images, .tar shards, tiny, or teacher to train without a data set"
    )


def make_sources(config: DataConfig, **options: Any) -> tuple[Source, ...]:
    """Return the sources of `data.sources`, in their order; the options are those of `make_source`."""
    return tuple(make_source(word, prompts=config.prompts, **options) for word in config.sources)


def is_generated(word: str) -> bool:
    """Return whether a --data word has the teacher generate the images. Nothing is opened for it."""
    kind = SOURCES["teacher"]
    return kind.parse(word, SourceOptions()) is not None
