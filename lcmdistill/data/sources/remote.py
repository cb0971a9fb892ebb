"""Shards that are not files: the output of the command that fetches them, read to its end or given up with a reason.

A broken connection must never pass for the end of the data: the samples that are missing would be missing from the cache for
good.
"""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from lcmdistill.utils.errors import RunError, UsageError

REMOTE = ("http://", "https://", "gs://", "hf://", "pipe:")

SILENCE = 45.0
"seconds without a byte after which a shard is given up"

_CURL = ["curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--connect-timeout", "30"]

_CURL += ["--retry", "3", "--retry-delay", "2", "--retry-max-time", "30"]


def open_remote(url: str) -> io.BufferedReader:
    """A shard as a stream of bytes; reading it raises RunError if the transport fails or falls silent."""
    command, given = _command(url)
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the stream)
    with tempfile.TemporaryFile() as stdin:
        stdin.write(given)
        stdin.seek(0)
        process = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            start_new_session=True,  # so that a shell's children can be ended with it
        )
    return io.BufferedReader(_Output(url, process, errors), 1 << 20)


def _command(url: str) -> tuple[list[str] | str, bytes]:
    """The command that writes a shard to its standard output, and what it is to read on its standard input."""
    if url.startswith("pipe:"):
        return url.removeprefix("pipe:"), b""
    program, package = ("gsutil", "the Google Cloud CLI") if url.startswith("gs://") else ("curl", "curl")
    if shutil.which(program) is None:
        raise RunError(f"--data {url} is read through {program}, which is not here; install {package}")
    if program == "gsutil":
        return ["gsutil", "cat", url], b""
    if not url.startswith("hf://"):
        return [*_CURL, url], b""
    from huggingface_hub import HfFileSystem, get_token

    try:
        address, token = HfFileSystem().url(url), get_token()
    except Exception as error:  # the hub's client lets its transport's own errors through
        raise RunError(f"--data {url} cannot be reached: {str(error).strip().splitlines()[0]}") from error
    if token:  # not as an argument, which every user of the computer can see
        return [*_CURL, "--header", "@-", address], f"Authorization: Bearer {token}".encode()
    return [*_CURL, address], b""


class _Output(io.RawIOBase):
    """What a process writes; an end that is not a success is an error."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._url, self._process, self._errors, self._silent = url, process, errors, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        output: Any = self._process.stdout
        watchdog = threading.Timer(SILENCE, self._fall_silent)
        watchdog.daemon = True
        watchdog.start()
        try:
            count = output.readinto(buffer)
            status = 0 if count else self._process.wait()
        finally:
            watchdog.cancel()
        if self._silent:
            raise RunError(f"--data {self._url} is given up: it has sent nothing for {SILENCE:g} seconds")
        if status:
            raise RunError(f"--data {self._url} cannot be read: {self._complaint() or f'exit code {status}'}")
        return count

    def close(self) -> None:
        if not self.closed:
            self._kill()
            self._process.wait()
            for file in (self._process.stdout, self._errors):
                if file is not None:
                    file.close()
        super().close()

    def _fall_silent(self) -> None:
        self._silent = True
        self._kill()

    def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                if os.name == "posix":
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()

    def _complaint(self) -> str:
        """The last line of what the process had to say."""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def check_reachable(urls: Sequence[str]) -> None:
    """Raise unless a server answers for each http(s) URL: the last shard of many may be misspelt as well as the first.

    Raises UsageError for what is not there, RunError for a server that does not answer.
    """
    pool = ThreadPoolExecutor(16)
    try:
        for _ in pool.map(_reach, [url for url in urls if url.startswith(("http://", "https://"))]):
            pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _reach(url: str) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):  # other codes may be meant for HEAD alone
            raise UsageError(f"there is no shard {url}: the server answers {error.code} {error.reason}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise RunError(f"--data {url} cannot be reached: {reason}") from error
