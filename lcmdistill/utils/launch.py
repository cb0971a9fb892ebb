"""Which process of a run this is, as the launcher states it in the environment."""

import os

from lcmdistill.utils.errors import UsageError


def process_index() -> int:
    """Return the index of this process; 0 where the launcher states none, or no number."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isascii() and text.isdigit() else 0


def num_processes() -> int:
    """Return the number of processes.

    Raises:
        UsageError: WORLD_SIZE is not a whole number from 1 on.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UsageError(
            f"WORLD_SIZE is {text!r}; torchrun sets it to a whole number from 1 on: unset it, or use torchrun"
        )
    return int(text)


def check_launched() -> None:
    """Raise UsageError if several processes are requested and no launcher has started them."""
    count = num_processes()
    if count > 1 and not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise UsageError(
            f"WORLD_SIZE is {count}, and no launcher has set RANK and MASTER_ADDR; start the command with torchrun "
            f"--nproc-per-node {count} -m lcmdistill, or unset WORLD_SIZE"
        )
