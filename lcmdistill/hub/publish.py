"""What goes to the hub: a run's product, or one export, where its users look for it, under a card that says how it is used."""

import logging
import shlex
from pathlib import Path

from lcmdistill.hub import client as hub
from lcmdistill.hub.model_card import export_card, pictures_of
from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.utils.run_dir import lora_file

logger = logging.getLogger(__name__)


def publish_run(run: Path, repo: str) -> None:
    """Upload what a finished run was for, its card and the card's picture; the pipeline or LoRA lies at the root.

    Raises RunError naming the command that uploads again.
    """
    is_lora = require_run_config(run).student.kind == "lora"
    folder = run / ("lora" if is_lora else "pipeline")
    file = lora_file(run).name if is_lora else ""
    command = "distill-lora" if is_lora else "distill"
    again = ["lcmdistill", command, "--config", str(run / "config.toml"), "--push-to-hub", repo]
    name = "peft" if (folder / "adapter_config.json").is_file() else "kohya" if is_lora else "pipeline"
    card = export_card(run, name, repo, file)
    _push(repo, {**_files(folder), **pictures_of(card, run)}, card, run.name, again)


def publish_export(run: Path, name: str, output: Path, repo: str) -> None:
    """Upload an export of a run with its card. Raises RunError naming the command that uploads again."""
    files = _files(output) if output.is_dir() else {output.name: output}
    card = export_card(run, name, repo, output.name)
    _push(repo, {**files, **pictures_of(card, run)}, card, output.name, ["hf", "upload", repo, str(output)])


def _push(repo: str, files: dict[str, Path | bytes], card: str, title: str, again: list[str]) -> None:
    files["README.md"] = card.encode()
    logger.info(f"uploading {len(files)} files to {repo}")
    logger.info(f"uploaded: {hub.push(repo, files, f'Upload {title} with lcmdistill', shlex.join(again))}")


def _files(folder: Path) -> dict[str, Path | bytes]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
