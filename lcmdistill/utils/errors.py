"""Failures that a user meets: one sentence each, and the exit code that goes with it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """The request is wrong; the user can correct it on the command line or in the configuration. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """The request is right but could not be carried out here. Exit code 1."""

    exit_code = 1


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after everything was saved. Exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


DISK_ERRORS = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than this file system or the limit on file sizes (ulimit -f) allows",
}
"errors of a disk that is full in one way or another, by number"


_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout")
"what gloo reports when a process that it communicates with is gone"


def disk_error(error: BaseException) -> str | None:
    """Return what is wrong with the disk if that is what an error reports, otherwise None.

    Libraries written in other languages report the operating system's error in their text only.
    """
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return DISK_ERRORS[error.errno]
    text = str(error)
    return next((reason for number, reason in DISK_ERRORS.items() if os.strerror(number) in text), None)


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise the operating system's error, such as that of a full disk, where torch.save raises one of its own after it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def explain(error: BaseException) -> tuple[str, int]:
    """Return the sentence and the exit code for any exception that reaches the command line."""
    if isinstance(error, UsageError | RunError | Interrupted):
        return str(error), error.exit_code
    if isinstance(error, SystemExit):  # raised by `exit_on_sigterm`
        return "stopped; saved files are intact", int(error.code or 0)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; saved files are intact", 130
    if reason := disk_error(error):
        return f"{reason}; free some space or choose another --output (checkpoints already written are intact)", 1
    if isinstance(error, PermissionError):
        return f"{error.filename or 'a file'} cannot be written or read: permission denied; choose another --output", 1
    if isinstance(error, IsADirectoryError):
        return f"{error.filename or 'a name'} is a folder where a file is expected; move or rename that folder", 1
    if isinstance(error, FileNotFoundError) and error.filename is None and not _has_working_directory():
        return "the current folder no longer exists; change to another one and run again", 1
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"a path or name is too long: {_shortened(str(error.filename))}; choose a shorter one", 1
    if isinstance(error, UnicodeEncodeError):
        part = error.object[max(error.start - 30, 0) : error.end + 30]
        return f"a name or text is not UTF-8: {part!a}; rename or re-encode it", 1
    text = str(error).strip().split("\n")[0] or "no message"
    if isinstance(error, ImportError):
        return f"a package is missing: {text}; install it, or use a model that needs none", 1
    if isinstance(error, RuntimeError) and "home directory" in text:  # pathlib's
        return "your home folder is unknown; set HOME, or LCMDISTILL_CACHE to a folder for caches", 1
    if type(error).__name__ in ("DistBackendError", "DistNetworkError") or any(words in text for words in _PEER_LOST):
        return (
            "another process of this run ended, for a reason that it, or the launcher, reports; re-run the same command to "
            "resume from the last checkpoint",
            1,
        )
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or any(words in str(error) for words in ("can't allocate memory", "not enough memory")):
        return (
            "out of memory; lower --batch-size and raise --gradient-accumulation-steps by the same factor, "
            "or lower --resolution",
            1,
        )
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)", 1


def is_utf8(text: str) -> bool:
    """Return whether a text can be written as UTF-8: arguments and file names of another encoding cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
