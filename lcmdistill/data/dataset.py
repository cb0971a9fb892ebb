"""Prepared chunks as one random-access data set."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lcmdistill.data.chunks import PROMPT, SAMPLE, read_metadata
from lcmdistill.data.latent_cache import chunk_paths
from lcmdistill.data.sampler import Shape
from lcmdistill.data.survey import SourceReport
from lcmdistill.diffusion.types import Conditioning


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
        for folder, count in zip(folders, counts, strict=True):
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

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Conditioning]:
        """Return mean, std and conditioning of samples of one shape: (B, C, h, w) twice, then the network's inputs, in fp32."""
        mean, std, conditions = [], [], []
        for index in indices:
            number, group, i = self._places[index]
            chunk = self._chunks[number]
            blank = self._blank[number]
            mean.append(chunk.get_slice(f"{group}mean")[i] if blank is None else blank)
            std.append(chunk.get_slice(f"{group}std")[i] if blank is None else blank)
            row, keys = int(chunk.get_slice(f"{group}row")[i]), chunk.keys()
            at = {key: row if key.startswith(PROMPT) else i for key in keys if key.startswith((PROMPT, group + SAMPLE))}
            conditions.append({key.partition(".")[2]: chunk.get_slice(key)[place] for key, place in at.items()})
        cond = {name: torch.stack([c[name] for c in conditions]) for name in conditions[0]}
        return torch.stack(mean).float(), torch.stack(std).float(), Conditioning(cond).to("cpu", torch.float32)
