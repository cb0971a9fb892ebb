"""Process-wide switches: what is set, what is left alone, and that the log file says so."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcmdistill.utils import runtime
from lcmdistill.utils.logging import log_file
from tests.support.training import ROOT


@pytest.mark.parametrize(
    ("environment", "count"),
    [({}, runtime.SPIN_COUNT), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_the_environment_s_own_choice_of_waiting_is_kept(environment: dict[str, str], count: str | None) -> None:
    assert runtime.thread_environment(environment).get("GOMP_SPINCOUNT") == count


def test_a_process_is_configured_without_torch_and_keeps_what_is_set() -> None:
    code = (
        "import gc, os, sys; from lcmdistill.utils.runtime import configure_process; configure_process(); "
        "print(os.environ['DIFFUSERS_VERBOSITY'], os.environ['TRANSFORMERS_VERBOSITY'], gc.get_threshold()[0], "
        "'torch' in sys.modules)"
    )
    environment = {"DIFFUSERS_VERBOSITY": "info", "PATH": "/usr/bin"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("info error 100000 False\n", "")


@pytest.mark.parametrize(("device", "layout"), [("cpu", torch.contiguous_format), ("cuda", torch.channels_last)])
def test_training_switches_depend_on_the_device_and_are_logged(
    device: str, layout: torch.memory_format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(runtime, "_settings", {"GOMP_SPINCOUNT": "3000"})
    monkeypatch.setattr(runtime, "_keep_freed_memory", lambda: kept.append(True) or True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    network = torch.nn.Conv2d(4, 4, 3)
    with log_file(tmp_path):
        runtime.configure_training(torch.device(device), network)
    assert network.weight.is_contiguous(memory_format=layout)
    assert torch.backends.cudnn.benchmark == (device == "cuda")
    assert kept == [True] * (device == "cpu")
    line = (tmp_path / "log.txt").read_text()
    special = {
        "cpu": "malloc keeps freed memory = True",
        "cuda": "memory format = channels_last, cudnn.benchmark = True",
    }
    assert line.endswith(f"runtime: GOMP_SPINCOUNT = 3000, {special[device]}, threads = {torch.get_num_threads()}\n")


def test_glibc_keeps_freed_memory() -> None:
    assert runtime._keep_freed_memory() == (sys.platform == "linux")
