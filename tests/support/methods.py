"""Helpers that several tests share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MethodRunner = Callable[..., Path]


def index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pipeline" / "model_index.json").read_text())
