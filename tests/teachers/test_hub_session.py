"""A hub that accepts connections and never answers."""

import importlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from transformers import CLIPTextModel

from lcmdistill.data.sources.registry import make_source
from lcmdistill.hub.client import check_login
from lcmdistill.teachers import hub_session
from lcmdistill.teachers.loading import load_pipeline
from lcmdistill.teachers.overrides import replace_vae
from lcmdistill.teachers.text_encoders import _load
from lcmdistill.utils.errors import RunError
from tests.support.models import text_config


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a server that reads requests and is silent."""
    server, connections = socket.create_server(("127.0.0.1", 0)), []

    def accept() -> None:
        try:
            while True:
                connections.append(server.accept())
        except OSError:  # closed
            return

    threading.Thread(target=accept, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(importlib.import_module("huggingface_hub.hf_api").api, "endpoint", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub_session.limited_waiting.__wrapped__, "__defaults__", (0.3,))  # type: ignore[attr-defined]
    huggingface_hub.HfFileSystem.clear_instance_cache()  # those of earlier tests have the endpoint of their time
    if hasattr(huggingface_hub, "configure_http_backend"):  # before 1.0: sessions remember that they were offline
        importlib.import_module("huggingface_hub.utils._http").reset_sessions()
    yield endpoint
    server.close()


def test_a_hub_that_stalls_ends_in_a_sentence(stalled: str) -> None:
    began = time.monotonic()
    with pytest.raises(RunError, match=r"owner/name is not in the local cache .* and the hub cannot be reached"):
        load_pipeline("owner/name")
    vae = SimpleNamespace(components={"vae": type("AutoencoderKL", (), {})()})
    with pytest.raises(RunError, match=r"--vae owner/name is not in the local cache and the hub cannot be reached"):
        replace_vae(vae, "owner/name")
    with pytest.raises(
        RunError, match=r"--text-encoder owner/name is not in the local cache and the hub cannot be reached"
    ):
        _load("owner/name", "text_encoder", CLIPTextModel(text_config()), False)
    with pytest.raises(RunError, match=r"--data hf://datasets/owner/name/a.tar cannot be reached: .*0.3 s"):
        list(make_source("hf://datasets/owner/name/a.tar").members())
    with pytest.raises(RunError, match=rf"cannot check the login at {stalled}: .*did not answer within 0.3 s"):
        check_login("me/mine")
    assert time.monotonic() - began < 30
