"""Shards that are not files: what is fetched whole is read, and what is not ends in one sentence and leaves no cache."""

import base64
import functools
import os
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from lcmdistill.config.schema import DataConfig
from lcmdistill.data import latent_cache as cache
from lcmdistill.data.sources import remote
from lcmdistill.data.sources.registry import make_source
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.data import cache_of, captions, config_for, contents, good, prepared, reasons, surveyed, write_tar

PASSWORD = 'p@ss word/"'


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A loopback web server on tmp_path; it forbids GET /forbidden.tar, and breaks off half way through /cut.tar.

    It serves /private/ to the user `me` with the password `p@ss word/"` only.
    """
    if shutil.which("curl") is None:
        pytest.skip("http is read through curl, which is not here")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            if self.refuses():
                self.send_error(404)
            else:
                super().do_HEAD()

        def refuses(self) -> bool:
            login = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
            return self.path.startswith("/private/") and self.headers["Authorization"] != f"Basic {login}"

        def do_GET(self) -> None:
            if self.refuses():
                self.send_error(401)
            elif self.path == "/forbidden.tar":
                self.send_error(403)
            elif self.path == "/cut.tar":
                whole = (tmp_path / "cut.tar").read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(whole)))
                self.end_headers()
                self.wfile.write(whole[: len(whole) // 1024 * 512])
            else:
                super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


def test_shards_are_read_over_http(tmp_path: Path, server: str) -> None:
    for i, name in enumerate(["00.tar", "01.tar"]):
        write_tar(tmp_path / name, good([2 * i, 2 * i + 1]))
    assert captions(f"{server}/{{00..01}}.tar") == [f"picture {i}" for i in range(4)]


def test_what_the_web_does_not_have_ends_in_one_sentence_within_seconds(server: str) -> None:
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"there is no shard .*/absent\.tar: the server responds 404 File not found"):
        surveyed(DataConfig(sources=(f"{server}/absent.tar",)), seconds=30)
    with pytest.raises(RunError, match=r"--data http://127\.0\.0\.1:9/a\.tar cannot be reached: .*refused"):
        surveyed(DataConfig(sources=("http://127.0.0.1:9/a.tar",)), seconds=30)
    assert time.monotonic() - began < 10


def test_a_shard_that_is_missing_among_many_is_found_before_anything_is_read(tmp_path: Path, server: str) -> None:
    for i in (0, 1, 3):
        write_tar(tmp_path / f"{i}.tar", good([i]))
    with pytest.raises(UsageError, match=r"there is no shard .*/2\.tar: the server responds 404"):
        surveyed(DataConfig(sources=(f"{server}/{{0..3}}.tar",), resolution=16), seconds=30, first_only=True)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("{server}/{{a,absent}}.tar", r"/absent\.tar cannot be read: curl: \(22\) .* 404"),
        ("{server}/{{a,forbidden}}.tar", r"/forbidden\.tar cannot be read: curl: \(22\) .* 403"),
        ("{server}/{{a,cut}}.tar", r"/cut\.tar cannot be read: curl: \(18\)"),
        (
            "{server}/{{a,page}}.tar",
            r"/page\.tar cannot be read: what it sends is not a complete tar archive \(ReadError\)",
        ),
        (
            "{server}/{{a,short}}.tar",
            r"/short\.tar cannot be read: what it sends is not a complete tar archive \(shard ends early",
        ),
        ("http://127.0.0.1:9/a.tar", r"http://127\.0\.0\.1:9/a\.tar cannot be read: curl: \(7\)"),
        ("pipe:cat {tmp}/absent.tar", r"--data pipe:\.\.\. cannot be read: cat: .*absent\.tar: No such file"),
        ("pipe:head -c 6000 {tmp}/a.tar; exit 3", "cannot be read: exit code 3"),
        ("pipe:cat {tmp}/a.tar; exit 3", "cannot be read: exit code 3"),
        ("pipe:true", r"not a complete tar archive \(ReadError\)"),
    ],
)
def test_a_failed_transfer_leaves_no_cache_that_looks_complete(
    tmp_path: Path, server: str, small_teacher: Path, monkeypatch: pytest.MonkeyPatch, spec: str, reason: str
) -> None:
    monkeypatch.setattr(cache, "CHUNK", 4)
    whole = write_tar(tmp_path / "a.tar", good(range(6))).read_bytes()
    write_tar(tmp_path / "cut.tar", good(range(6, 12)))
    (tmp_path / "page.tar").write_text("<html>Please log in</html>" * 100)
    (tmp_path / "short.tar").write_bytes(whole[:2000])
    spec = spec.format(server=server, tmp=tmp_path)
    config, teacher = config_for(spec, tmp_path / "cache"), load_teacher(str(small_teacher))
    for _ in range(2):  # the second time it is no better
        with pytest.raises(RunError, match=reason):
            prepared(spec, config, teacher, 0)
    written = contents(cache_of(spec, config, teacher, 0))
    full = {"00000000-00000004.safetensors", "00000004-00000008.safetensors"}
    assert set(written) <= full, "a chunk that the failure cut was written"


def test_a_file_named_twice_in_a_remote_tar_is_counted_and_not_taken_for_a_broken_transport(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*good([0]), good([0])[1], *good([1])])
    assert reasons(f"pipe:cat {path}") == {"kept": 2, "file named twice in a shard": 1}


def test_of_many_shards_some_are_tried_the_first_and_the_last_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(remote, "_reach", tried.append)
    make_source("http://127.0.0.1:9/{00000..99999}.tar").check_reachable()
    numbers = sorted(int(url[-9:-4]) for url in tried)
    assert (len(set(numbers)), numbers[0], numbers[-1]) == (64, 0, 99999)
    tried.clear()
    make_source("http://127.0.0.1:9/{00..63}.tar").check_reachable()
    assert len(set(tried)) == 64


def test_shards_behind_a_password_are_read_and_the_password_is_not_shown(tmp_path: Path, server: str) -> None:
    (tmp_path / "private").mkdir()
    write_tar(tmp_path / "private" / "0.tar", good([0]))
    write_tar(tmp_path / "private" / "1.tar", good([1]))
    for login in (f"me:{quote(PASSWORD, safe='')}", f"me:{PASSWORD.replace('/', '%2F')}"):
        address = f"{server.replace('//', f'//{login}@')}/private/{{0..1}}.tar"
        source = make_source(address)
        source.check_reachable()
        assert [member.caption for member in source.members()] == ["picture 0", "picture 1"]
        assert source.fingerprint() == make_source(f"{server}/private/{{0..1}}.tar").fingerprint()
        command, _ = remote._command(address)
        assert "p@ss" not in " ".join(command)
    for word in (
        f"{server.replace('//', '//me:wrong-secret@')}/private/0.tar?key=secret",
        "http://me:a/secret@127.0.0.1:9/0.tar",
    ):
        source = make_source(word)
        with pytest.raises((UsageError, RunError)) as error:
            source.check_reachable()
        assert "secret" not in str(error.value)
        with pytest.raises(RunError, match=r"^--data http://[^ ]*/0\.tar cannot be read: ") as read:
            list(source.members())
        assert "secret" not in str(read.value)


def test_a_stalled_transport_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SILENCE", 0.5)
    began = time.monotonic()
    for command in ("sleep 60", "sleep 60; true", "exec >&-; sleep 60"):
        with pytest.raises(RunError, match=r"timed out reading --data pipe:.* \(no data for 0\.5 s\)"):
            surveyed(DataConfig(sources=(f"pipe:{command}",)), seconds=60)
    assert time.monotonic() - began < 10


def test_google_s_shards_are_read_through_its_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", good(range(2)))
    tool = tmp_path / "bin" / "gsutil"
    monkeypatch.setenv("PATH", str(tool.parent))
    with pytest.raises(
        RunError, match=r"gs://bucket/a\.tar needs gsutil to be read, which is not installed; install the Google"
    ):
        captions("gs://bucket/a.tar")
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n[ $1 = cat ] && exec {shutil.which('cat', path=os.defpath)} {tmp_path}/${{2##*/}}\n")
    tool.chmod(0o755)
    assert captions("gs://bucket/a.tar") == ["picture 0", "picture 1"]
    with pytest.raises(RunError, match=r"gs://bucket/b\.tar cannot be read: .*No such file"):
        captions("gs://bucket/b.tar")


def test_the_hub_s_shards_are_read_with_the_user_s_token(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    write_tar(tmp_path / "a.tar", good(range(2)))
    with pytest.raises(RunError, match=r"--data hf://datasets/a/b/a\.tar cannot be reached: .*offline"):
        captions("hf://datasets/a/b/a.tar")
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "url", lambda self, path: f"{server}/a.tar")
    for token, header in (("secret", b'header = "Authorization: Bearer secret"\n'), (None, b"")):
        monkeypatch.setattr(huggingface_hub, "get_token", lambda token=token: token)
        command, given = remote._command("hf://datasets/a/b/a.tar")
        assert given == f'url = "{server}/a.tar"\n'.encode() + header
        assert "secret" not in " ".join(command)
        assert captions("hf://datasets/a/b/a.tar") == ["picture 0", "picture 1"]
