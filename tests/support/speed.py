"""Helpers that several tests share."""

from pathlib import Path
from typing import Any

from lcmdistill.data.dataset import LatentDataset
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.distributed import make_accelerator
from lcmdistill.training.trainer import Trainer, make_trainer
from tests.support.data import prepared
from tests.support.runs import resolve

Settings = dict[str, Any]


def built(speed_settings: Settings, **changes: Any) -> Trainer:
    """A trainer at its first step."""
    config = resolve({}, {**speed_settings, **{key.replace("__", "."): value for key, value in changes.items()}})
    teacher = load_teacher(config.teacher.model)
    (spec,) = config.data.sources
    dataset = LatentDataset([prepared(spec, config.data, teacher, config.run.seed)], [config.data.max_samples])
    return make_trainer(config, Path(config.run.output or ""), make_accelerator(config), teacher, dataset)
