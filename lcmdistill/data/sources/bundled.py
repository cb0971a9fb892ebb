"""The bundled emoji as a source."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Self

from lcmdistill.data.sources.base import SourceOptions, file_stamp
from lcmdistill.data.sources.shard_folders import shards_in
from lcmdistill.data.sources.webdataset import Shards

COUNT = 3625
"the emoji in the shards"


@dataclass(frozen=True)
class BundledShards(Shards):
    """The emoji that the tiny teacher was trained on, as shards inside the package."""

    kind: ClassVar[str] = "tiny"

    @classmethod
    def parse(cls, word: str, options: SourceOptions) -> Self | None:
        """See `Source.parse`."""
        if word != cls.kind:
            return None
        return cls(word, shards_in(Path(str(files("lcmdistill") / "assets" / "tiny-data"))))

    def count(self) -> int:
        """See `Source.count`."""
        return COUNT

    def fingerprint(self) -> dict[str, Any]:
        """Return names and sizes only: the files' times are those of the installation."""
        return {"files": [(Path(url).name, *file_stamp(Path(url), with_time=False)) for url in self.urls]}
