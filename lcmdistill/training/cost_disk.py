"""What a run writes to disks, and whether there is room for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lcmdistill.config.schema import RunConfig
from lcmdistill.data.buckets import largest
from lcmdistill.data.latent_cache import cache_root
from lcmdistill.evaluation.latents import TEACHER_STEPS
from lcmdistill.sampling.prompts import STEPS
from lcmdistill.teachers.base import Teacher
from lcmdistill.training.cost_time import SourceSamples, validations_left
from lcmdistill.training.memory.estimate import Breakdown
from lcmdistill.training.validation import validation_prompts
from lcmdistill.utils.checkpoint import BEST
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.run_dir import checkpoints, free_space
from lcmdistill.utils.units import size_text

PICTURE_BYTES = 1.6
"bytes per pixel of a PNG of an image"


@dataclass(frozen=True)
class DiskItem:
    """One thing that a run writes.

    Attributes:
        name: What it is.
        folder: Where it is written.
        size: Its bytes at the end of the run.
        extra: Further bytes while a replacement is written.
        present: Bytes of it that are on the disk already.
        note: Of what it consists.
    """

    name: str
    folder: Path
    size: float
    extra: float = 0.0
    present: float = 0.0
    note: str = ""

    @property
    def needed(self) -> float:
        """The most bytes that it still takes."""
        return max(0.0, self.size + self.extra - self.present)


def checkpoint_bytes(needed: Breakdown) -> int:
    """Return the bytes of a checkpoint: what is trained, the student's average and the optimizers' moments in fp32."""
    average = 4 * needed.trainable if needed.target else 0
    return 4 * needed.trainable + average + (needed.critic + needed.optimizer) * needed.shards


def result_bytes(config: RunConfig, teacher: Teacher, needed: Breakdown) -> int:
    """Return the bytes of the trained student: a pipeline in the precision that its parts have, or a LoRA file in fp16."""
    if config.student.kind == "lora":
        return (2 if teacher.family.run_lora_format == "kohya" else 4) * needed.trainable
    parts = {k: m for k, m in teacher.pipeline.components.items() if isinstance(m, torch.nn.Module)}
    others = [m for m in parts.values() if m is not teacher.network]
    return 4 * needed.trainable + sum(p.numel() * p.element_size() for m in others for p in m.parameters())


def sample_bytes(config: RunConfig, teacher: Teacher) -> int:
    """Return the bytes of one cached sample with a caption of its own, in fp16."""
    z, _, c = teacher.example(1, largest(config.data, teacher.multiple), "cpu")
    latents = 0 if config.objective.info.prompts_only else 2 * (2 + config.data.trajectory) * z.numel()
    return latents + 2 * sum(value[:1].numel() for value in c.values.values())


def disk_items(
    config: RunConfig, teacher: Teacher, needed: Breakdown, samples: Sequence[SourceSamples]
) -> list[DiskItem]:
    """Return what a run writes.

    Args:
        config: The resolved configuration.
        teacher: The teacher.
        needed: The memory of a step, which counts what is trained.
        samples: The samples of each source.
    """
    run, optim, folder, cache = config.run, config.optim, Path(config.run.output or ""), cache_root(config.data)
    each = sample_bytes(config, teacher)
    missing, total = sum(s.missing for s in samples), sum(s.total for s in samples)
    note = f"{missing:,} samples of {size_text(each)}" + (f", {total - missing:,} are ready" if missing < total else "")
    items = [DiskItem(_cached_name(config), cache, missing * each, note=note)] if config.data.cache == "on" else []
    z = teacher.example(1, largest(config.data, teacher.multiple), "cpu")[0]
    if draws := config.data.teacher_cache_samples:
        outputs = draws * config.objective.num_forwards["teacher"] * total
        items.append(
            DiskItem(
                "cached teacher outputs", cache, outputs * 2 * z.numel(), note=f"{outputs:,}, unless they are ready"
            )
        )
    prompts = len(validation_prompts(config, teacher))
    count = validations_left(config, 0)
    if count:
        references = prompts * z.numel() * 4 * (1 + len(STEPS))
        items.append(
            DiskItem(
                "cached reference images", cache, references, note=f"{prompts} of {TEACHER_STEPS} steps, and step 0"
            )
        )
    one, saves = checkpoint_bytes(needed), -(-optim.max_train_steps // run.checkpoint_every)
    kept = min(run.keep_checkpoints, saves)
    has_best = bool(count) and run.best_metric != "none"
    best = 4 * needed.trainable if has_best else 0
    note = f"{kept} of {size_text(one)}" + (", one more while it is written" if saves > kept else "")
    items.append(
        DiskItem(
            "checkpoints",
            folder,
            kept * one + best,
            extra=one if saves > kept else 0,
            present=_size(folder / "checkpoints"),
            note=note + (f"; best {size_text(best)}" if has_best else ""),
        )
    )
    name = "lora" if config.student.kind == "lora" else "pipeline"
    result = result_bytes(config, teacher, needed)
    items.append(DiskItem(name, folder, result, present=_size(folder / name)))
    pixels = config.data.resolution**2
    grids = count * prompts * len(STEPS) * pixels * PICTURE_BYTES
    items.append(DiskItem("validation grids, report", folder, grids + 3e5, note=f"{count} grids"))
    return items


def _cached_name(config: RunConfig) -> str:
    """Return what the samples in the cache are."""
    if config.objective.info.prompts_only:
        return "cached prompts"
    return "cached trajectories" if config.data.trajectory else "cached latents"


def _size(folder: Path) -> int:
    if folder.name != "checkpoints":
        files = folder.rglob("*") if folder.is_dir() else ()
        return sum(path.stat().st_size for path in files if path.is_file())
    saved = [*checkpoints(folder), folder / BEST]
    return sum(path.stat().st_size for each in saved if each.is_dir() for path in each.iterdir())


def check_space(items: Sequence[DiskItem]) -> None:
    """Raise UsageError if a disk cannot hold what is written to it."""
    disks: dict[int, list[DiskItem]] = {}
    for item in items:
        disks.setdefault(free_space(item.folder)[0], []).append(item)
    for written in disks.values():
        needed, free = sum(item.needed for item in written), free_space(written[0].folder)[1]
        if needed > free:
            largest_first = sorted(written, key=lambda item: -item.needed)[:3]
            parts = ", ".join(f"{item.name} {size_text(item.needed)}" for item in largest_first if item.needed)
            place = " and ".join(dict.fromkeys(str(item.folder) for item in largest_first))
            raise UsageError(
                f"the run writes {size_text(needed)} to the disk of {place} ({parts}), which has {size_text(free)} free; free "
                "some space, lower run.keep_checkpoints or data.max_samples, or choose another --output or data.cache_dir"
            )
