"""Which data a run was started with, recorded by content: on resume the same data may be spelled otherwise, or have moved."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lcmdistill.config.schema import RunConfig
from lcmdistill.data.latent_cache import cache_folder
from lcmdistill.data.sources.base import Source
from lcmdistill.data.sources.registry import make_source, make_sources
from lcmdistill.data.trajectories import TrajectoryPlan
from lcmdistill.teachers.base import Teacher
from lcmdistill.utils.atomic import write_text
from lcmdistill.utils.checksums import digest
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json
from lcmdistill.utils.redact import redact_word

logger = logging.getLogger(__name__)

FILE = ".data.json"
"the record's name in a run folder"


@dataclass(frozen=True)
class RecordedSource:
    """One source of a run.

    Attributes:
        word: How it was spelled.
        content: A hash of what it holds, whatever its spelling.
        latents: A hash of the content, the teacher and every setting that shapes the latents.
    """

    word: str
    content: str
    latents: str


def sources_of(config: RunConfig, teacher: Teacher | None = None) -> tuple[Source, ...]:
    """Return the sources of a run as its method uses them. teacher: for its own default prompts, once it is loaded."""
    own = teacher.own_prompts if teacher is not None else ()
    only = config.objective.info.prompts_only
    plan = TrajectoryPlan.of(config)
    return make_sources(config.data, own_prompts=own, seed=config.run.seed, prompts_only=only, trajectory=plan)


def record_of(sources: Sequence[Source], config: RunConfig, teacher: Teacher) -> tuple[RecordedSource, ...]:
    """Return the record of a run's sources."""
    return tuple(
        RecordedSource(each.word, _content(each), cache_folder(each, config.data, teacher, config.run.seed).name)
        for each in sources
    )


def write_record(folder: Path, record: Sequence[RecordedSource]) -> None:
    """Write the record to a run's folder."""
    sources = [asdict(each) for each in record]
    write_text(folder / FILE, json.dumps({"digest": digest(sources), "sources": sources}, indent=2) + "\n")


def read_record(folder: Path) -> tuple[RecordedSource, ...] | None:
    """Return the record in a run's folder; None if it is missing or damaged."""
    try:
        loaded = parse_json((folder / FILE).read_text(encoding="utf-8"))
        if loaded["digest"] == digest(loaded["sources"]):
            return tuple(RecordedSource(**each) for each in loaded["sources"])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def is_same_data(config: RunConfig, before: RunConfig, folder: Path) -> bool:
    """Return whether two configurations name the same data, in the same order.

    Words that are equal count as the same: `check_record` compares what they hold, once the teacher is loaded.

    Args:
        config: The configuration of this command.
        before: The configuration of the run that it resumes.
        folder: The run's folder.
    """
    now, record = config.data, read_record(folder)
    if (now.sources, now.prompts) == (before.data.sources, before.data.prompts):
        return True
    if record is None or len(record) != len(now.sources) or record_words(record) != before.data.sources:
        return False
    for word, recorded in zip(now.sources, record, strict=True):
        source = make_source(
            word, prompts=now.prompts, seed=config.run.seed, prompts_only=config.objective.info.prompts_only
        )
        is_respelled = word != recorded.word or (source.is_generated and now.prompts != before.data.prompts)
        if is_respelled and _content(source) != recorded.content:
            return False
    return True


def record_words(record: Sequence[RecordedSource]) -> tuple[str, ...]:
    """Return the words of recorded sources."""
    return tuple(each.word for each in record)


def check_record(folder: Path, record: Sequence[RecordedSource], model: str) -> None:
    """Compare a run's data with what it was started with. A damaged record is logged, and nothing is compared.

    Args:
        folder: The folder of the run that is resumed.
        record: What the sources hold now.
        model: The teacher, for messages.

    Raises:
        UsageError: If the data or the teacher's weights have changed.
    """
    before = read_record(folder)
    if before is None:
        if (folder / FILE).exists():
            logger.warning(
                f"{folder / FILE} is damaged: whether the data have changed since the run started cannot be checked"
            )
        return
    for was, now in zip(before, record, strict=False):
        if was.content != now.content:
            raise UsageError(
                f"--data {redact_word(now.word)} changed (names, sizes, dates) since the run in {folder} started; restore it "
                "to resume, or use another --output"
            )
        if was.latents != now.latents:
            raise UsageError(
                f"the weights of the teacher {model} changed since the run in {folder} started; restore them to resume, or use "
                "another --output"
            )


def _content(source: Source) -> str:
    return digest([source.kind, source.fingerprint()])
