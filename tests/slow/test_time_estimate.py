"""The time that a dry run states is that of the run. A minute of computing: `make test-slow`."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training import ROOT

# In seconds of the processor, so that other programs on the machine do not count.
COMMAND = """
import sys, time
from lcmdistill.utils import runtime
runtime.clock = time.process_time
from lcmdistill.__main__ import main
main()
"""


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "phases"),
    [
        ("distill --data tiny", {"starting", "encoding latents", "reference images", "validation"}),
        ("distill-lora --data teacher --set data.teacher_steps=8", {"generating latents", "validation"}),
        ("distill --set data.teacher_cache_samples=1 --set run.validate_every=0", {"caching teacher outputs"}),
    ],
)
def test_the_stated_time_is_that_of_the_run(words: str, phases: set[str], tmp_path: Path) -> None:
    options = (
        "--teacher tiny --max-train-steps 30 --batch-size 8 --set data.max_samples=128 --set run.validate_every=15"
    )
    name, *own = words.split()
    own = [
        name,
        *options.split(),
        "--output",
        str(tmp_path / "run"),
        f"--set=data.cache_dir={tmp_path / 'cache'}",
        *own,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> str:
        command = [sys.executable, "-c", COMMAND, *own, *more]
        return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout

    output = run("--dry-run")
    lines = re.findall(r"^  ([a-z ]+?)  +(?:(\d+) min )?([\d.]+) s  ", output, flags=re.MULTILINE)
    estimated = {name: int(minutes or 0) * 60 + float(seconds) for name, minutes, seconds in lines}
    assert phases | {"starting", "training", "writing the result"} <= estimated.keys()
    before = processor_seconds()
    run()
    took = processor_seconds() - before
    print(f"{words}: {sum(estimated.values()):.1f} s estimated, {took:.1f} s taken")
    assert sum(estimated.values()) == pytest.approx(took, rel=0.25), estimated
