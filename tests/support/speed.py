"""Helpers that several tests share."""

from pathlib import Path
from typing import Any

from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.latent_cache import prepare
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.distributed import make_accelerator
from lcmdistill.training.run_data import sources_of
from lcmdistill.training.trainer import Trainer, make_trainer
from tests.support.runs import resolve

Settings = dict[str, Any]


def built(speed_settings: Settings, **changes: Any) -> Trainer:
    """A trainer at its first step."""
    config = resolve({}, {**speed_settings, **{key.replace("__", "."): value for key, value in changes.items()}})
    teacher = load_teacher(config.teacher.model)
    (source,) = sources_of(config, teacher)
    dataset = LatentDataset([prepare(source, config.data, teacher, config.run.seed)], [config.data.max_samples])
    return make_trainer(config, Path(config.run.output or ""), make_accelerator(config), teacher, dataset)
