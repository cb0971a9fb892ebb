"""Prepared chunks as one random-access data set."""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lcmdistill.data.chunks import OMEGA, PROMPT, SAMPLE, TRAJECTORY, read_metadata
from lcmdistill.data.latent_cache import chunk_paths
from lcmdistill.data.sampler import Shape
from lcmdistill.data.survey import SourceReport
from lcmdistill.diffusion.trajectory import Trajectory
from lcmdistill.diffusion.types import Conditioning
from lcmdistill.utils.units import counted

logger = logging.getLogger(__name__)


class Read(NamedTuple):
    """Samples as they are stored.

    Attributes:
        mean: The mean of each latent's posterior, (B, C, h, w).
        std: Its standard deviation.
        cond: The network's inputs.
        trajectory: The teacher's trajectories to the latents, where the samples have them.
    """

    mean: Tensor
    std: Tensor
    cond: Conditioning
    trajectory: Trajectory | None = None


class LatentDataset:
    """Prepared chunks as one random-access data set, memory-mapped."""

    def __init__(self, folders: Sequence[Path], counts: Sequence[int | None]) -> None:
        """Open the chunks.

        Args:
            folders: A folder of chunks per source.
            counts: The most members to use of each, None for all; further chunks belong to other runs.
        """
        self.folders = tuple(folders)
        self._chunks: list[Any] = []
        self._blank: list[Tensor | None] = []
        "per chunk: the latents of a sample without an image, zeros of their shape"
        self._places: list[tuple[int, str, int]] = []
        self.shapes: list[Shape] = []
        "height and width of each sample's latents"
        self.reports: list[SourceReport] = []
        self.left_out: list[int] = []
        "the original indices of the samples that were removed"
        self._sources: list[int] = []
        "per chunk: the index of its source"
        for source, (folder, count) in enumerate(zip(folders, counts, strict=True)):
            num_kept, rejected, cut, tokens, buckets = 0, Counter(), 0, 0, Counter()
            for path in chunk_paths(folder, count):
                chunk = safe_open(path, framework="pt")
                report = read_metadata(chunk)
                n, sizes = report["kept"], report.get("buckets", {})
                blank = torch.zeros(report["latents"]) if "latents" in report else None
                for group, many in {f"{size}/": many for size, many in sizes.items()}.items() or [("", n)]:
                    self._places += [(len(self._chunks), group, i) for i in range(many)]
                    if many:
                        shape = chunk.get_slice(f"{group}mean").get_shape()[1:] if blank is None else blank.shape
                        self.shapes += [tuple(shape[1:])] * many
                self._chunks.append(chunk)
                self._sources.append(source)
                self._blank.append(blank)
                num_kept, rejected, buckets = (
                    num_kept + n,
                    rejected + Counter(report["rejected"]),
                    buckets + Counter(sizes),
                )
                cut, tokens = cut + report.get("cut", 0), report.get("tokens", tokens)
            sizes = tuple(sorted(buckets.items()))
            self.reports.append(SourceReport(num_kept, tuple(rejected.most_common()), True, cut, tokens, sizes))

    def __len__(self) -> int:
        return len(self._places)

    def captions(self, wanted: Sequence[bool]) -> list[str | None]:
        """Return the caption of each sample; None for other sources, and for chunks of earlier versions, which lack captions.

        Args:
            wanted: Per source, whether its captions are wanted.
        """
        rows: dict[tuple[int, str], list[str | None]] = {}
        lacking: set[int] = set()
        for number, group in {(number, group): None for number, group, _ in self._places}:
            chunk, texts = self._chunks[number], None
            if wanted[self._sources[number]]:
                texts = read_metadata(chunk).get("captions")
            of_samples = chunk.get_slice(f"{group}row")[:].tolist()
            lacking |= {number} if wanted[self._sources[number]] and not texts else set()
            rows[number, group] = [texts[row] if texts else None for row in of_samples]
        if lacking:
            logger.warning(
                f"{counted(len(lacking), 'file')} of cached latents, by an earlier version, have no captions: their samples "
                "are all trained on; to hold some out, remove them with lcmdistill cache clear and start another run"
            )
        return [rows[number, group][i] for number, group, i in self._places]

    def leave_out(self, indices: Collection[int]) -> None:
        """Remove samples. Those that follow take their indices."""
        left_out = set(indices)
        self._places = [place for i, place in enumerate(self._places) if i not in left_out]
        self.shapes = [shape for i, shape in enumerate(self.shapes) if i not in left_out]
        self.left_out = sorted(left_out)

    def read(self, indices: Sequence[int]) -> Read:
        """Return samples of one shape, in fp32."""
        mean, std, conditions, states, omega = [], [], [], [], []
        for index in indices:
            number, group, i = self._places[index]
            chunk = self._chunks[number]
            blank = self._blank[number]
            mean.append(chunk.get_slice(f"{group}mean")[i] if blank is None else blank)
            std.append(chunk.get_slice(f"{group}std")[i] if blank is None else blank)
            row, keys = int(chunk.get_slice(f"{group}row")[i]), chunk.keys()
            at = {key: row if key.startswith(PROMPT) else i for key in keys if key.startswith((PROMPT, group + SAMPLE))}
            states += [chunk.get_slice(f"{group}{TRAJECTORY}")[i]] if f"{group}{TRAJECTORY}" in keys else []
            omega += [chunk.get_slice(f"{group}{OMEGA}")[i]] if f"{group}{OMEGA}" in keys else []
            conditions.append({key.partition(".")[2]: chunk.get_slice(key)[place] for key, place in at.items()})
        cond = {name: torch.stack([c[name] for c in conditions]) for name in conditions[0]}
        return Read(
            torch.stack(mean).float(),
            torch.stack(std).float(),
            Conditioning(cond).to("cpu", torch.float32),
            Trajectory(torch.stack(states).float(), torch.stack(omega) if omega else None) if states else None,
        )
