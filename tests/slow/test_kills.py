"""Runs and evaluations are killed right before each rename: resumed, they end as ever, with nothing left over."""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lcmdistill.cli.evaluate import evaluate_and_report
from lcmdistill.data.latent_cache import cache_root
from lcmdistill.evaluation.options import EvaluationOptions
from lcmdistill.objectives.recorded import require_run_config
from tests.support.runs import distill, resolve
from tests.support.teachers import SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is a fork of this one"),
]

# What a run says about its own time and place: everything else must be equal.
_OF_THIS_RUN = {"log.txt", "report.html", "card.json", ".checksums.json"}

_TIMES = ("seconds_per_image", "seconds", "checksum")


def in_a_fork(work: Callable[[], Any], kill_at: int) -> tuple[bool, int]:
    """Do some work in a fork of this process that is killed before its rename number `kill_at`.

    Returns:
        Whether it was killed, and how many renames it counted otherwise.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            count = 0

            def counted(real: Callable[..., None]) -> Callable[..., None]:
                def rename(*arguments: Any, **options: Any) -> None:
                    nonlocal count
                    count += 1
                    if count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    real(*arguments, **options)

                return rename

            os.replace, os.rename = counted(os.replace), counted(os.rename)
            work()
            os.write(writer, str(count).encode())
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    count = int(os.read(reader, 20) or b"0")
    os.close(reader)
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0
    return killed, count


def contents(folder: Path, without: Collection[str] = _OF_THIS_RUN) -> dict[str, str]:
    """Every file of a run, by its name: a hash, or for the numbers of a run those that do not depend on time."""
    found = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[name] = str([(line["step"], line.get("loss"), line.get("val/ssim_4")) for line in lines])
        elif path.name in ("numbers.json", "sweep.json"):  # which have times, and a checksum of them
            values = json.loads(path.read_text(encoding="utf-8"))
            found[name] = str({key: value for key, value in values.items() if key not in _TIMES})
        elif (
            path.parent.name in ("lora", "latents") and path.suffix == ".safetensors"
        ):  # whose header has a date, or a time
            tensors = sorted(load_file(path).items())
            found[name] = hashlib.sha256(b"".join(v.numpy().tobytes() for _, v in tensors)).hexdigest()
        else:
            found[name] = "" if path.name in without else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_kill_before_any_rename_changes_nothing(
    kind: str, small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    folder, cache = tmp_path / "run", tmp_path / "its-cache"
    settings: dict[str, Any] = {**SMALL, "student.kind": kind, "teacher.model": str(small_teacher)}
    settings |= {"data.sources": (str(image_folder),), "run.output": str(folder), "data.cache_dir": str(cache)}
    settings |= {"run.validate_every": 2, "run.keep_checkpoints": 1, "run.validation_prompts": ("red heart",)}
    settings |= {"student.rank": 4} if kind == "lora" else {}

    def work() -> None:
        distill(resolve({}, settings))

    killed, renames = in_a_fork(work, 0)
    assert not killed
    expected, expected_cache = contents(folder), contents(cache)
    assert renames > 15
    for kill_at in range(1, renames + 1):
        shutil.rmtree(folder)
        shutil.rmtree(cache)
        assert in_a_fork(work, kill_at)[0], f"rename {kill_at} of {renames} was not reached"
        assert not in_a_fork(work, 0)[0]
        assert contents(folder) == expected, f"after a kill before rename {kill_at} of {renames}"
        assert set(contents(cache)) == set(expected_cache), f"after a kill before rename {kill_at} of {renames}"


def test_a_kill_before_any_rename_of_an_evaluation_changes_nothing(small_run: Path, tmp_path: Path) -> None:
    """A sweep of runs has no other renames than its runs, their evaluation and the page that compares them."""
    run, page = tmp_path / "run", tmp_path / "page" / "comparison.html"
    cache = cache_root(require_run_config(small_run).data) / "evaluation"
    options = EvaluationOptions(steps=(1,), guidance_scales=(4.0,), num_images=2, device="cpu")

    def work() -> None:
        evaluate_and_report([run], options, page)

    def start() -> None:
        for folder in (cache, page.parent, run):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(small_run, run)

    start()
    killed, renames = in_a_fork(work, 0)
    assert not killed
    timed = {*_OF_THIS_RUN, "README.md"}  # the card states the time per image
    expected, expected_cache = contents(run, timed), set(contents(cache))
    assert renames > 10
    for kill_at in range(1, renames + 1):
        start()
        assert in_a_fork(work, kill_at)[0], f"rename {kill_at} of {renames} was not reached"
        assert not in_a_fork(work, 0)[0]
        assert contents(run, timed) == expected, f"after a kill before rename {kill_at} of {renames}"
        assert set(contents(cache)) == expected_cache
        assert [path.name for path in page.parent.iterdir()] == [page.name]
