"""The data of a run, made ready by all of its processes together."""

import time
from collections.abc import Callable
from pathlib import Path

from lcmdistill.data.cache import mark_whole, prepare
from lcmdistill.device import compute_dtype
from lcmdistill.interrupt import Stop
from lcmdistill.processes import Accelerator
from lcmdistill.settings import RunConfig
from lcmdistill.teachers.base import Teacher
from lcmdistill.tracking import Progress, progress, say


def prepare_all(config: RunConfig, teacher: Teacher, accelerator: Accelerator, stop: Stop) -> list[Path]:
    """The folders of every source's chunks, once all of them are there."""
    world, rank, folders = accelerator.num_processes, accelerator.process_index, []
    dtype = compute_dtype(config.run.precision, accelerator.device)
    for spec in config.data.sources:
        with progress(f"preparing {spec}", config.data.count, enabled=rank == 0) as bar:
            tell, seed = telling(f"preparing {spec}", bar, stop, loud=rank == 0), config.run.seed
            folders.append(
                prepare(spec, config.data, teacher, seed, dtype=dtype, rank=rank, world=world, on_progress=tell)
            )
    accelerator.wait_for_everyone()
    if rank == 0:
        for folder in folders:
            mark_whole(folder, config.data.count)
    return folders


def telling(what: str, bar: Progress, stop: Stop, *, loud: bool) -> Callable[[int], None]:
    """To be told how far something is: shows it, in lines where there is no bar, and stops where an end was asked for."""
    last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        stop.check(f"stopped while {what}; what is done is kept, and the same command goes on")
        bar.update(done)
        if loud and not bar.visible and time.monotonic() - last > 10:
            say(f"{what}: {done} samples")
            last = time.monotonic()

    return tell
