"""Runs of several processes on the CPU, and, as a script, one of their processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.training import ROOT

HELD = "held-{}.json"
"the file that each process writes: the bytes of each group of tensors that it holds"


def launch_command(count: int, config: Path, output: Path, *options: str) -> list[str]:
    """The command that runs a config.toml in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launcher, "-m", "tests.support.processes"] if count > 1 else [sys.executable, "-m", "lcmdistill"]
    kind = "distill-lora" if 'kind = "lora"' in config.read_text() else "distill"
    return [*command, kind, "--config", str(config), "--output", str(output), "--device", "cpu", *options]


def launch(count: int, config: Path, output: Path, *options: str) -> str:
    """Run a config.toml in several processes, and return what they print."""
    command = launch_command(count, config, output, *options)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def held_bytes(output: Path, rank: int) -> dict[str, int]:
    """The bytes of each group of tensors that a process held at the end of a run."""
    return json.loads((output / HELD.format(rank)).read_text())


def bytes_of(groups: Any) -> dict[str, int]:
    """The bytes of each group of tensors in this process."""
    local = {
        group: [getattr(v, "to_local", lambda v=v: v)() for v in named.values()] for group, named in groups.items()
    }
    return {group: sum(value.nbytes for value in values) for group, values in local.items()}


def main() -> None:
    """Run the command line, and write what this process held."""
    from lcmdistill import cli
    from lcmdistill.training.trainer import Trainer

    fit = Trainer.fit

    def fit_and_write(self: Trainer, *args: Any) -> None:
        fit(self, *args)
        path = self.folder / HELD.format(self.accelerator.process_index)
        path.write_text(json.dumps(bytes_of(self.train_step.groups())))

    setattr(Trainer, "fit", fit_and_write)  # noqa: B010
    cli.main()


if __name__ == "__main__":
    main()
