"""The data of a run, made ready by all of its processes together."""

import time
from pathlib import Path

from lcmdistill.data.cache import mark_whole, prepare
from lcmdistill.device import compute_dtype
from lcmdistill.interrupt import Stop
from lcmdistill.processes import Accelerator
from lcmdistill.settings import RunConfig
from lcmdistill.teachers.base import Teacher
from lcmdistill.tracking import progress, say


def prepare_all(config: RunConfig, teacher: Teacher, accelerator: Accelerator, stop: Stop) -> list[Path]:
    """The folders of every source's chunks, once all of them are there."""
    world, rank, folders = accelerator.num_processes, accelerator.process_index, []
    dtype = compute_dtype(config.run.precision, accelerator.device)
    for spec in config.data.sources:
        with progress(f"preparing {spec}", config.data.count, enabled=rank == 0) as bar:
            last = [time.monotonic()]

            def tell(done: int, bar=bar, last=last, spec=spec) -> None:
                stop.check("stopped while preparing the data; what is prepared is kept, and the same command goes on")
                bar.update(done)
                if rank == 0 and not bar.visible and time.monotonic() - last[0] > 10:
                    say(f"preparing {spec}: {done} samples")
                    last[0] = time.monotonic()

            seed = config.run.seed
            folders.append(
                prepare(spec, config.data, teacher, seed, dtype=dtype, rank=rank, world=world, on_progress=tell)
            )
    accelerator.wait_for_everyone()
    if rank == 0:
        for folder in folders:
            mark_whole(folder, config.data.count)
    return folders
