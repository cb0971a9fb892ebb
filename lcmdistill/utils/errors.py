"""Failures that a user meets: one sentence each, and the exit code that goes with it."""

import errno


class UsageError(Exception):
    """What was asked for is wrong; the user can mend it on the command line or in the config. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """What was asked for is fine but could not be done here. Exit code 1."""

    exit_code = 1


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after everything was saved. Exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def explain(error: BaseException) -> tuple[str, int]:
    """The sentence and the exit code for any exception that reaches the command line."""
    if isinstance(error, UsageError | RunError | Interrupted):
        return str(error), error.exit_code
    if isinstance(error, SystemExit):  # of `exit_on_sigterm`
        return "stopped; what was saved before is intact", int(error.code or 0)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was saved before is intact", 130
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in str(error):
        return (
            "no space is left on the disk; free some or choose another --output (checkpoints already written are intact)",
            1,
        )
    if isinstance(error, PermissionError):
        return f"{error.filename or 'a file'} cannot be written or read: permission denied; choose another --output", 1
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or any(words in str(error) for words in ("can't allocate memory", "not enough memory")):
        return (
            "out of memory; lower --batch-size and raise --gradient-accumulation-steps by the same factor, "
            "or lower --resolution",
            1,
        )
    text = str(error).strip().split("\n")[0] or "no message"
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)", 1
