"""What goes to the hub: a run's product, or one export, where its users look for it, under a card that says how it is used."""

import re
import shlex
from pathlib import Path

from lcmdistill import hub
from lcmdistill.export import export_card
from lcmdistill.rundir import recorded
from lcmdistill.tracking import say


def publish_run(run: Path, repo: str) -> None:
    """Upload what a finished run was for, its card and the card's picture; the pipeline or LoRA lies at the root.

    Raises RunError naming the command that uploads again.
    """
    is_lora = recorded(run).get("student.kind") == "lora"
    folder = run / ("lora" if is_lora else "pipeline")
    file = next((path.name for path in sorted(folder.glob("*.safetensors"))), "")
    command = "distill-lora" if is_lora else "distill"
    again = ["lcmdistill", command, "--config", str(run / "config.toml"), "--push-to-hub", repo]
    card = export_card(run, "kohya" if is_lora else "pipeline", repo, file)
    _push(repo, {**_files(folder), **_pictures(run, card)}, card, run.name, again)


def publish_export(run: Path, name: str, output: Path, repo: str) -> None:
    """Upload an export of a run with its card. Raises RunError naming the command that uploads again."""
    files = _files(output) if output.is_dir() else {output.name: output}
    card = export_card(run, name, repo, output.name)
    _push(repo, {**files, **_pictures(run, card)}, card, output.name, ["hf", "upload", repo, str(output)])


def _push(repo: str, files: dict[str, Path | bytes], card: str, title: str, again: list[str]) -> None:
    files["README.md"] = card.encode()
    say(f"uploading {len(files)} files to {repo}")
    say(f"uploaded: {hub.push(repo, files, f'Upload {title} with lcmdistill', shlex.join(again))}")


def _files(folder: Path) -> dict[str, Path | bytes]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def _pictures(run: Path, card: str) -> dict[str, Path | bytes]:
    """The pictures that a card shows from the run's own folder."""
    shown = re.findall(r"!\[[^\]]*\]\((samples/[^)/]+)\)", card)
    return {path: run / path for path in shown if (run / path).is_file()}
