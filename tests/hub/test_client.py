"""--push-to-hub against a hub on this machine: what arrives, what is refused before training, where the token goes."""

import base64
import importlib
import json
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from lcmdistill import cli
from lcmdistill.hub import client as hub
from lcmdistill.hub import publish
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.logging import configure_console

TOKEN = "hf_aTokenThatNobodyMaySee"


@dataclass
class Request:
    """What the hub was asked."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class StubHub:
    """The repositories of a hub, and the requests that it received."""

    role: str = "write"
    refuses_commits: bool = False
    endpoint: str = ""
    requests: list[Request] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)

    def answer(self, request: Request) -> tuple[int, Any]:
        """(status, JSON) for a request."""
        path, is_me = request.path.partition("?")[0], request.headers.get("authorization") == f"Bearer {TOKEN}"
        if request.method == "PUT" and path.startswith("/put/"):
            self.blobs[path.removeprefix("/put/")] = request.body
            return 200, {}
        if not is_me:
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {
                "type": "user",
                "name": "me",
                "orgs": [{"name": "us"}],
                "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": self.role}},
            }
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            values = json.loads(request.body)
            repo = f"{values.get('organization') or 'me'}/{values['name']}"
            status = 409 if repo in self.repos else 200
            if status == 200 and (values.get("private") or values.get("visibility") == "private"):
                self.private.add(repo)
            self.repos.setdefault(repo, {})
            return status, {"url": f"{self.endpoint}/{repo}", "name": repo, "id": "1"}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [each["path"] for each in json.loads(request.body)["files"]]
            large = (".safetensors", ".png")
            modes = [
                {"path": f, "uploadMode": "lfs" if f.endswith(large) else "regular", "shouldIgnore": False}
                for f in files
            ]
            return 200, {"files": modes}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/main)?", path):
            if found[1] not in self.repos:
                return 404, {"error": "Repository not found"}
            is_private = found[1] in self.private
            return 200, {"id": found[1], "sha": "0" * 40, "private": is_private, "tags": [], "siblings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.endpoint}/put/{each['oid']}"}}}
                for each in json.loads(request.body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            if self.refuses_commits:
                return 403, {"error": "the quota is used up"}
            for line in request.body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.repos[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.repos[found[1]][value["path"]] = self.blobs[value["oid"]]
            return 200, {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"{self.endpoint}/{found[1]}/commit/{'0' * 40}",
            }
        return 404, {"error": f"nothing at {path}"}


@pytest.fixture
def stub() -> Iterator[StubHub]:
    """A hub on loopback."""
    hub = StubHub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {key.lower(): value for key, value in self.headers.items()}
            hub.requests.append(Request(self.command, self.path, headers, body))
            status, content = hub.answer(hub.requests[-1])
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def online(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> StubHub:
    """huggingface_hub in this process, logged in to the stub."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    if hasattr(huggingface_hub, "configure_http_backend"):  # before 1.0: sessions remember that they were offline
        importlib.import_module("huggingface_hub.utils._http").reset_sessions()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return stub


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run lcmdistill in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["lcmdistill", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code if isinstance(left.value.code, int) else 0


def small(teacher: Path, images: Path, output: Path) -> list[str]:
    words = ["--teacher", str(teacher), "--data", str(images), "--resolution", "16", "--output", str(output)]
    words += ["--max-train-steps", "2", "--batch-size", "2", "--gradient-accumulation-steps", "1"]
    return [*words, "--set", "run.validate_every=0", "--set", "run.log_every=1"]


def assert_the_token_stayed_in_its_header(stub: StubHub) -> None:
    for request in stub.requests:
        others = {key: value for key, value in request.headers.items() if key != "authorization"}
        assert TOKEN not in f"{request.path} {others}"
        assert TOKEN.encode() not in request.body


def test_a_training_uploads_its_lora_and_card(
    online: StubHub,
    tmp_path: Path,
    small_teacher: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "runs" / "mine"
    words = ["distill-lora", *small(small_teacher, image_folder, run), "--rank", "4", "--push-to-hub", "me/my-lora"]
    assert command(monkeypatch, *words) == 0
    output, errors = capfd.readouterr()
    assert f"uploaded: {online.endpoint}/me/my-lora" in output

    (files,) = online.repos.values()
    assert sorted(files) == ["README.md", "mine.safetensors"]
    assert files["mine.safetensors"] == (run / "lora" / "mine.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\n")
    assert 'pipeline.load_lora_weights("me/my-lora", weight_name="mine.safetensors")' in card
    assert "## Configuration" in card
    assert str(run) not in card.partition("## Configuration")[0]

    assert 'push_to_hub = "me/my-lora"' in (run / "config.toml").read_text()
    paths = [request.path for request in online.requests if request.headers.get("authorization")]
    assert paths[:3] == ["/api/whoami-v2", "/api/models/me/my-lora", "/api/repos/create"]
    assert "to me/my-lora, a new public repository (--private makes it private)" in output
    assert_the_token_stayed_in_its_header(online)
    assert TOKEN not in output + errors
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []


def test_a_full_student_lies_at_the_repository_s_root(online: StubHub, small_run: Path) -> None:
    publish.publish_run(small_run, "us/full")
    files = online.repos["us/full"]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert files[weights] == (small_run / "pipeline" / weights).read_bytes()
    assert {"model_index.json", "scheduler/scheduler_config.json", "text_encoder/model.safetensors"} <= set(files)
    card = files["README.md"].decode()
    assert 'DiffusionPipeline.from_pretrained("us/full")' in card
    (picture,) = re.findall(r"\((samples/\S+\.png)\)", card)
    assert files[picture] == (small_run / picture).read_bytes()
    assert not [path for path in files if "checkpoint" in path or path.endswith((".pt", ".jsonl"))]
    assert_the_token_stayed_in_its_header(online)


def test_an_export_is_uploaded_with_its_card(
    online: StubHub, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "made.safetensors"
    words = ["export", str(small_run), "--format", "single-file", "--output", str(file), "--push-to-hub", "us/mine"]
    assert command(monkeypatch, *words) == 0
    files = online.repos["us/mine"]
    assert files["made.safetensors"] == file.read_bytes()
    assert 'from_single_file(hf_hub_download("us/mine", "made.safetensors"))' in files["README.md"].decode()


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("existing", ["none", "public", "private"])
def test_the_visibility_of_a_repository_is_logged(
    private: bool, existing: str, online: StubHub, capsys: pytest.CaptureFixture[str]
) -> None:
    if existing != "none":
        online.repos["me/mine"] = {}
        online.private |= {"me/mine"} if existing == "private" else set()
    configure_console()
    hub.push("me/mine", {"README.md": b"x"}, "message", "again", private=private)
    expected = {
        ("none", False): "a new public repository (--private makes it private)",
        ("none", True): "a new private repository",
        ("public", False): "an existing public repository",
        ("public", True): "an existing public repository; --private applies to new repositories only",
        ("private", False): "an existing private repository",
        ("private", True): "an existing private repository",
    }
    assert capsys.readouterr().out == f"uploading 1 files to me/mine, {expected[existing, private]}\n"
    assert ("me/mine" in online.private) == (existing == "private" or (existing == "none" and private))


def test_an_export_makes_a_private_repository(
    online: StubHub,
    small_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "export",
        str(small_run),
        "--format",
        "pipeline",
        "--no-verify",
        "--output",
        str(tmp_path / "out"),
        "--private",
    ]
    assert command(monkeypatch, *words) == 2
    assert "--private is for --push-to-hub" in capsys.readouterr().err
    assert command(monkeypatch, *words, "--push-to-hub", "me/mine") == 0
    assert online.private == {"me/mine"}


@pytest.mark.parametrize("repo", ["me/mine", "us/mine"])
def test_a_login_that_may_write_passes(repo: str, online: StubHub) -> None:
    hub.check_login(repo)
    assert [request.path for request in online.requests] == ["/api/whoami-v2"]


@pytest.mark.parametrize("repo", ["a/b/c", "mine", "me/", "me/ what", "-x", "me/a..b", ""])
def test_a_name_that_no_repository_can_have_is_refused(repo: str, online: StubHub) -> None:
    with pytest.raises(UsageError, match=r"is not a repository name; use OWNER/NAME, such as me/my-lcm"):
        hub.check_login(repo)
    assert online.requests == []


def test_somebody_else_s_namespace_is_refused(online: StubHub) -> None:
    with pytest.raises(UsageError, match="--push-to-hub you/mine: your login has write access to me, us, not to you"):
        hub.check_login("you/mine")


def test_a_token_that_may_only_read_is_refused(online: StubHub) -> None:
    online.role = "read"
    with pytest.raises(UsageError, match="the token has read access only"):
        hub.check_login("me/mine")


def test_a_token_that_the_hub_does_not_know_is_refused(online: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(UsageError, match="rejects the token; run `hf auth login") as caught:
        hub.check_login("me/mine")
    assert "hf_another" not in str(caught.value)


def test_an_unreachable_hub_is_one_sentence(online: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"^--push-to-hub: cannot check the login at http://127.0.0.1:9: [^\n]+$"):
        hub.check_login("me/mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE is set; unset it"):
        hub.check_login("me/mine")


def test_nothing_is_trained_without_a_login(
    online: StubHub,
    tmp_path: Path,
    small_teacher: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    words = ["distill", *small(small_teacher, image_folder, tmp_path / "run"), "--push-to-hub", "me/mine"]
    assert command(monkeypatch, *words) == 2
    assert capsys.readouterr().err == "Error: --push-to-hub needs a login: run `hf auth login`, or set HF_TOKEN\n"
    assert not (tmp_path / "run").exists()
    assert online.requests == []


def test_a_failed_upload_leaves_the_run_and_names_the_command_that_uploads_again(
    online: StubHub,
    tmp_path: Path,
    small_teacher: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    online.refuses_commits, run = True, tmp_path / "a run"
    words = ["distill", *small(small_teacher, image_folder, run), "--push-to-hub", "me/mine"]
    assert command(monkeypatch, *words) == 1
    error = capsys.readouterr().err
    found = re.search(
        r"the upload to me/mine failed: 403: the quota is used up; local files are intact, retry with: (.*)\n$",
        error,
    )
    assert found, error
    assert (run / "pipeline" / "model_index.json").is_file()
    assert (run / "README.md").is_file()
    assert online.repos["me/mine"] == {}

    online.refuses_commits = False
    before = (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    program, *again = shlex.split(found[1])
    assert program == "lcmdistill"
    assert command(monkeypatch, *again) == 0
    output = capsys.readouterr()
    assert "nothing to do" in output.out
    assert (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    assert {"README.md", "model_index.json"} <= set(online.repos["me/mine"])
    assert TOKEN not in error + output.out + output.err


def test_a_failed_upload_of_an_export_keeps_the_file(
    online: StubHub,
    small_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    online.refuses_commits, file = True, tmp_path / "made.safetensors"
    words = ["export", str(small_run), "--format", "single-file", "--output", str(file), "--push-to-hub", "me/mine"]
    assert command(monkeypatch, *words) == 1
    assert f"retry with: hf upload me/mine {file}" in capsys.readouterr().err
    assert file.is_file()


def test_a_library_that_quotes_the_token_is_not_repeated(online: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError(f"bad header: Bearer {TOKEN}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(RunError, match=r"bad header: Bearer \*\*\*;"):
        hub.push("me/mine", {"README.md": b"x"}, "message", "again")
