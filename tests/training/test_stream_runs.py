"""Runs without a cache: resumed bit for bit, planned, and described."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lcmdistill.data.latent_cache import cache_root
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.training.cost_disk import disk_items
from lcmdistill.training.cost_time import Rates, phases, samples_of
from lcmdistill.training.memory.estimate import step_memory
from lcmdistill.training.run_data import sources_of
from lcmdistill.utils.errors import UsageError
from tests.support.methods import MethodRunner
from tests.support.runs import resolve
from tests.support.training import assert_same, losses


def test_a_run_resumes_bit_for_bit(method_run: MethodRunner, tmp_path: Path) -> None:
    own = {"data__cache": "off", "data__cache_dir": str(tmp_path / "cache")}
    whole = method_run("lcm", "whole", **own)
    method_run("lcm", "parts", optim__max_train_steps=2, **own)
    parts = method_run("lcm", "parts", **own)
    assert losses(parts) == losses(whole)
    assert_same(parts, whole)
    with pytest.raises(UsageError, match=r"contains a run with data\.cache = 'off' \(this command: 'on'\)"):
        method_run("lcm", "parts", **{**own, "data__cache": "on"})
    log = (parts / "log.txt").read_text()
    assert "data.cache is off: samples are encoded while the run trains, and none are held out" in log
    assert " kept, 0 dropped (of those looked at)" in log
    assert not list((tmp_path / "cache").rglob("latents/*/*.safetensors"))


def test_the_plan_counts_the_encoders_and_no_cache(small_teacher: Path, image_folder: Path, tmp_path: Path) -> None:
    teacher = load_teacher(str(small_teacher))
    settings: dict[str, Any] = {"teacher.model": str(small_teacher), "data.sources": (str(image_folder),)}
    settings |= {"data.resolution": 16, "run.validate_every": 0, "run.output": str(tmp_path / "run")}
    found: dict[str, Any] = {}
    for cache in ("on", "off"):
        config = resolve({}, {**settings, "data.cache": cache, "data.cache_dir": str(tmp_path / "cache")})
        memory = step_memory(config, teacher, torch.float32)
        samples = samples_of(sources_of(config, teacher), config, teacher)
        rates = Rates(forward=1, backward=2, update=0, encode=3, decode=4, caption=5)
        seconds = {each.name: each.seconds for each in phases(config, teacher, samples, rates, written=0)}
        items = [
            item.name for item in disk_items(config, teacher, memory, samples) if item.folder == cache_root(config.data)
        ]
        found[cache] = memory, seconds, items, sum(each.total for each in samples)
    encoders = sum(p.numel() * p.element_size() for part in teacher.encoders for p in part.parameters())
    assert found["off"][0].encoders == encoders > 0
    assert found["off"][0].total - found["on"][0].total == encoders
    optim = config.optim
    visited = optim.max_train_steps * optim.batch_size * optim.gradient_accumulation_steps
    assert found["off"][1]["training"] - found["on"][1]["training"] == pytest.approx(visited * 8)
    assert "encoding latents" in found["on"][1]
    assert "encoding latents" not in found["off"][1]
    assert (found["on"][2], found["off"][2]) == (["cached latents"], [])
    assert found["on"][3] == found["off"][3] == 12
