"""Runs without a cache on many small shards, from a server that fails now and then, on one and on several processes."""

import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.data import good, write_tar
from tests.support.processes import launch
from tests.support.runs import distill, resolve
from tests.support.teachers import SMALL
from tests.support.training import losses

pytestmark = pytest.mark.slow

SHARDS, FAILING = 2000, 0.02
"shards of two samples each, and the share of the requests that break off"


class Requests(Counter[str]):
    """How often each shard was sent whole, and how many requests failed."""

    failed = 0


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, Requests]]:
    """Serve a folder on the loopback; some requests get an error, others half of the file."""
    requests, draw, lock = Requests(), random.Random(0), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            content = (folder / self.path.lstrip("/")).read_bytes()
            with lock:
                fault = draw.choice(("error", "half")) if draw.random() < FAILING else ""
                requests.failed += bool(fault)
                requests[self.path] += not fault
            if fault == "error":
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault else content)

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

    ThreadingHTTPServer.request_queue_size = 256
    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{serving.server_port}", requests
    finally:
        serving.shutdown()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for i in range(SHARDS):
        write_tar(folder / f"{i:04d}.tar", good(range(2 * i, 2 * i + 2)))
    return folder


def settings_of(teacher: Path, word: str, output: Path, **more: Any) -> dict[str, Any]:
    settings = {**SMALL, "teacher.model": str(teacher), "data.sources": (word,), "run.output": str(output)}
    return {**settings, "data.cache": "off", "run.checkpoint_every": 100, "run.log_every": 10, **more}


def test_thousands_of_shards_are_divided_between_processes(shards: Path, small_teacher: Path, tmp_path: Path) -> None:
    """200 steps of 8 samples, on two processes: about 800 shards, each read by one of them, however often it breaks off."""
    with server(shards) as (address, requests):
        word = f"{address}/{{0000..{SHARDS - 1:04d}}}.tar"
        more = {"optim.batch_size": 4, "optim.max_train_steps": 2, "run.checkpoint_every": 2}
        one = distill(resolve({}, settings_of(small_teacher, word, tmp_path / "one", **more)))
        requests.clear()
        options = ("--max-train-steps", "200", "--set", "run.checkpoint_every=100")
        launch(2, one / "config.toml", tmp_path / "two", *options)
    assert requests.failed > 4
    assert max(requests.values()) == 1 + (requests.most_common(1)[0][0].endswith("/0000.tar"))
    assert 800 <= len(requests) < 850  # and a few that were read ahead, and by the check before the run
    log = (tmp_path / "two" / "log.txt").read_text()
    assert " 0 dropped (of those looked at)" in log


@pytest.mark.parametrize(("method", "kind"), [("lcm", "lora"), ("pcm", "full"), ("tdm", "lora")])
def test_runs_resume_bit_for_bit(method: str, kind: str, shards: Path, small_teacher: Path, tmp_path: Path) -> None:
    more = {"objective.name": method, "student.kind": kind, "student.rank": 4, "optim.max_train_steps": 6}
    more |= {"run.checkpoint_every": 3, "run.log_every": 1}
    whole = distill(resolve({}, settings_of(small_teacher, str(shards), tmp_path / "whole", **more)))
    parts = settings_of(small_teacher, str(shards), tmp_path / "parts", **more)
    distill(resolve({}, {**parts, "optim.max_train_steps": 3}))
    assert losses(distill(resolve({}, parts))) == losses(whole)


def test_two_processes_resume_bit_for_bit_and_three_go_on(shards: Path, small_teacher: Path, tmp_path: Path) -> None:
    more = {"optim.batch_size": 1, "optim.gradient_accumulation_steps": 6, "optim.max_train_steps": 1}
    more |= {"run.log_every": 1, "run.checkpoint_every": 3}
    one = distill(resolve({}, settings_of(small_teacher, str(shards), tmp_path / "one", **more)))
    for name, steps in (("whole", (6,)), ("parts", (3, 6))):
        for count in steps:
            options = ("--gradient-accumulation-steps", "3", "--max-train-steps", str(count))
            launch(2, one / "config.toml", tmp_path / name, *options)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    three = shutil.copytree(tmp_path / "parts", tmp_path / "three")
    options = ("--gradient-accumulation-steps", "2", "--max-train-steps", "8")
    launch(3, one / "config.toml", three, *options)
    assert len(losses(three)) == 8
    assert "the run was saved by 2 processes, and is read on by 3" in (three / "log.txt").read_text()
