"""What leaves a run holds no secret of its settings: the report, the card, exports, what a tracker gets, and its log."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from lcmdistill.config.toml import flatten, to_toml
from lcmdistill.hub.model_card import export_card, update_run_card
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.report.info import describe
from lcmdistill.report.page import write_report
from lcmdistill.teachers.naming import redact_paths
from lcmdistill.utils.metrics_log import Metrics
from lcmdistill.utils.run_dir import LOCK

SECRETS = ("hunter2", "s3cr3t-token", "hidden-command", "private-folder")

SOURCES = (
    "https://me:hunter2@h/{0..9}.tar?sig=s3cr3t-token#hunter2",
    "https://me:hunter2@h/a.tar::/home/private-folder/b.tar",
    "pipe:hidden-command | cat",
    "/home/private-folder/pictures",
    "~/private-folder/more",
    "../private-folder/relative",
)


def test_nothing_that_leaves_a_run_holds_a_secret(
    evaluated_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "private-folder" / "run"
    shutil.copytree(evaluated_run, run)
    config = require_run_config(run)
    folder = "/home/private-folder"
    teacher = replace(config.teacher, model=f"{folder}/small", vae=f"{folder}/vae", base="../private-folder/base")
    data = replace(config.data, sources=SOURCES, prompts=f"{folder}/prompts.txt", cache_dir="~/private-folder/cache")
    (run / "config.toml").write_text(to_toml(replace(config, teacher=teacher, data=data)))
    assert require_run_config(run).data.sources == SOURCES

    write_report(run)
    assert update_run_card(run)
    wandb = Mock(__spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Metrics(run, "wandb", redact_paths(flatten(require_run_config(run))), 100)
    texts = {
        "report": (run / "report.html").read_text(),
        "card": (run / "README.md").read_text(),
        "export's card": export_card(run, "single-file", "me/mine", "a.safetensors").text,
        "tracker": repr(wandb.init.call_args.kwargs["config"]),
        "info": repr(describe(str(run))).replace(str(run), ""),
    }
    assert "x_disable_meta=True" in repr(wandb.Settings.call_args), "otherwise wandb uploads the command line"
    for name, text in texts.items():
        hidden = SECRETS[:3] if name == "info" else SECRETS
        assert [secret for secret in hidden if secret in text] == [], name


def test_no_file_that_is_published_names_a_folder_of_this_machine(
    evaluated_run: Path, small_teacher: Path, image_folder: Path
) -> None:
    private = {str(folder.parent).encode() for folder in (evaluated_run, small_teacher, image_folder)}
    own = {"config.toml", "log.txt", ".data.json", LOCK}
    published = [path for path in evaluated_run.rglob("*") if path.is_file() and path.name not in own]
    assert {"report.html", "README.md", "metrics.jsonl", "sweep.json"} < {path.name for path in published}
    for path in published:
        content = path.read_bytes()
        assert not any(folder in content for folder in private), path
