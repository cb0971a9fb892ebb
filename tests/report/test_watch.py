"""The page as it is served while a run goes on, and the numbers to download."""

import base64
import csv
import http.client
import io
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lcmdistill.evaluation.results import Results
from lcmdistill.report.downloads import downloads
from lcmdistill.report.page import write_report
from lcmdistill.report.watch import make_server
from lcmdistill.utils.errors import UsageError


@pytest.fixture
def served(small_run: Path, tmp_path: Path) -> Iterator[Any]:
    """The copy of a run, and a function that requests a path of its server."""
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    with make_server(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()

        def get(path: str, host: str = "127.0.0.1") -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
            connection.request("GET", path, headers={"Host": f"{host}:{server.server_address[1]}"})
            answer = connection.getresponse()
            text = answer.read().decode()
            connection.close()
            return answer.status, text

        yield run, get
        server.shutdown()
        thread.join()


def test_the_page_is_made_again_when_the_run_changes(served: Any) -> None:
    run, get = served
    status, page = get("/")
    first = get("/version")[1]
    assert status == 200
    assert f'<body data-version="{first}">' in page
    assert "connect-src 'self'" in page
    assert get("/version")[1] == first
    line = {"step": 99, "loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-3, "samples_per_s": 1.0}
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(line) + "\n")
    second = get("/version")[1]
    assert second != first
    assert "99 steps of 4 samples" in get("/")[1]
    assert f'data-version="{second}"' in get("/")[1]
    # The page in the run folder asks for nothing.
    alone = write_report(run).read_text()
    assert not re.search(r"fetch\(|connect-src|data-version", alone)


def test_only_this_machines_browser_reads_the_page(served: Any) -> None:
    _, get = served
    assert get("/", host="localhost")[0] == 200
    assert get("/", host="example.org")[0] == 403
    assert get("/version", host="example.org")[0] == 403
    assert get("/config.toml")[0] == 404
    assert get("/../config.toml")[0] == 404


def test_a_file_that_is_being_written_is_answered_with_a_sentence(served: Any) -> None:
    run, get = served
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "sweep.json").write_text('{"ce')
    status, text = get("/")
    assert (status, text.count("\n")) == (503, 1)
    (run / "evaluation" / "sweep.json").unlink()
    assert get("/")[0] == 200


def test_a_folder_or_port_that_cannot_be_served_is_refused(small_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run folder"):
        make_server(tmp_path, 0)
    with (
        make_server(small_run, 0) as server,
        pytest.raises(UsageError, match=r"--port \d+ cannot be used .*; choose another one"),
    ):
        make_server(small_run, server.server_address[1])


def test_the_numbers_can_be_downloaded() -> None:
    point = {"sampler": "student", "steps": 4, "guidance_scale": 2.0, "seconds_per_image": 0.5}
    numbers = {"numbers": {"kid_teacher": 0.1, "ssim": 0.7}, "standard_errors": {"kid_teacher": 0.02}}
    info = {"images": 50, "metrics": {"kid_teacher": {}, "ssim": {}}}
    results = Results(Path(), info, {"student-04-g2": {**point, **numbers}})
    table, tree = downloads({"a, b": results}, "a")
    assert (table.name, tree.name) == ("a-numbers.csv", "a-numbers.json")
    content = base64.b64decode(table.href.partition(",")[2]).decode()
    (row,) = csv.DictReader(io.StringIO(content))
    assert (row["run"], row["kid_teacher"], row["kid_teacher_standard_error"]) == ("a, b", "0.1", "0.02")
    assert (row["ssim"], row["seconds_per_image"], row["images"]) == ("0.7", "0.5", "50")
    loaded = json.loads(base64.b64decode(tree.href.partition(",")[2]))
    assert loaded["a, b"]["points"]["student-04-g2"]["numbers"] == numbers["numbers"]
