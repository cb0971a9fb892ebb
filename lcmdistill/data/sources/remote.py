"""Shards that are not files: the output of the command that fetches them, read to its end or given up with a reason.

A broken connection must never pass for the end of the data: the missing samples would be missing from the cache for good.
"""

import base64
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import IO, Any, ClassVar, Self

from lcmdistill.data.sources.base import Member, SourceOptions, file_stamp
from lcmdistill.data.sources.webdataset import (
    ShardEndError,
    Shards,
    check_file,
    expand,
    read_shard_file,
    read_shard_stream,
)
from lcmdistill.teachers.hub_session import limited_waiting
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.redact import COMMAND, redact_text, redact_word, split_credentials

_SCHEMES = ("http://", "https://", "gs://", "hf://")

SILENCE = 45.0
"seconds without a byte after which reading a shard fails"

MOST_REACHED = 64
"URLs that are tried before a run"

_CURL = ["curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--connect-timeout", "30"]

_CURL += ["--retry", "3", "--retry-delay", "2", "--retry-max-time", "30"]


@dataclass(frozen=True)
class RemoteShards(Shards):
    """Shards behind URLs (http, https, gs, hf), or the output of a shell command (pipe:)."""

    kind: ClassVar[str] = "remote"
    is_remote: ClassVar[bool] = True

    @classmethod
    def parse(cls, word: str, options: SourceOptions) -> Self | None:
        """See `Source.parse`."""
        if word.startswith(COMMAND):
            return cls(word, (word,))
        if "://" not in word or Path(word).expanduser().is_dir():
            return None
        if re.match(r"[a-z][a-z0-9+.-]*://", word) and not word.startswith(_SCHEMES):
            raise UsageError(
                f"--data {redact_word(word)}: unknown scheme; shards come from files, http(s)://, gs://, hf://, or from the "
                "output of a shell command as pipe:COMMAND, such as aws s3 cp s3://BUCKET/KEY.tar -"
            )
        urls = expand(word)
        for url in urls:
            if not url.startswith(_SCHEMES):
                check_file(word, url)
        return cls(word, urls)

    def fingerprint(self) -> dict[str, Any]:
        """Return the URLs: what they hold cannot be known before it is read, and is the same for every user."""
        remote = [url for url in self.urls if _is_fetched(url)]
        return {
            "urls": [url if url.startswith(COMMAND) else split_credentials(url)[1] for url in remote],
            "files": [(Path(url).name, *file_stamp(Path(url))) for url in self.urls if url not in remote],
        }

    def read_part(self, index: int) -> Iterator[Member]:
        """Yield the members of a shard."""
        url = self.urls[index]
        return _fetched_members(url) if _is_fetched(url) else read_shard_file(Path(url))

    def check_reachable(self) -> None:
        """Raise unless a server responds for the http(s) URLs: the last shard of many may be misspelled as well.

        Of more than MOST_REACHED, as many are tried, evenly spread.

        Raises:
            UsageError: If a shard does not exist.
            RunError: If a server does not respond.
        """
        urls = [url for url in self.urls if url.startswith(("http://", "https://"))]
        if len(urls) > MOST_REACHED:
            urls = [urls[i * (len(urls) - 1) // (MOST_REACHED - 1)] for i in range(MOST_REACHED)]
        pool = ThreadPoolExecutor(16)
        try:
            for _ in pool.map(_reach, urls):
                pass
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _is_fetched(url: str) -> bool:
    return url.startswith((*_SCHEMES, COMMAND))


def _fetched_members(url: str) -> Iterator[Member]:
    """Yield the members of one remote shard.

    Raises:
        RunError: If the transport fails, or what arrives is not a complete tar archive.
    """
    with _open_remote(url) as stream:
        try:
            yield from read_shard_stream(stream)
        except RunError:
            raise
        except Exception as error:
            _exhaust(stream)  # where the transport itself failed, its own error says more
            reason = str(error) if isinstance(error, ShardEndError) else type(error).__name__
            raise RunError(
                f"--data {redact_word(url)} cannot be read: what it sends is not a complete tar archive ({reason})"
            ) from error
        _exhaust(stream)


def _exhaust(stream: io.BufferedReader) -> None:
    """Read to the end, where a transport reports whether all went well."""
    while stream.read(1 << 20):
        pass


def _open_remote(url: str) -> io.BufferedReader:
    """Return a shard as a stream of bytes; reading it raises RunError if the transport fails or stalls."""
    command, standard_input = _command(url)
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the stream)
    with tempfile.TemporaryFile() as stdin:
        stdin.write(standard_input)
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
    """Return the command that writes a shard to its standard output, and the bytes for its standard input."""
    if url.startswith(COMMAND):
        return url.removeprefix(COMMAND), b""
    program, package = ("gsutil", "the Google Cloud CLI") if url.startswith("gs://") else ("curl", "curl")
    if shutil.which(program) is None:
        raise RunError(
            f"--data {redact_word(url)} needs {program} to be read, which is not installed; install {package}"
        )
    if program == "gsutil":
        return ["gsutil", "cat", url], b""
    if not url.startswith("hf://"):
        return _curl(url)
    from huggingface_hub import HfFileSystem, get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        with limited_waiting():
            address, token = HfFileSystem().url(url), get_token()
    except Exception as error:  # the Hub's client passes on the errors of its transport
        reason = redact_text(str(error).strip().splitlines()[0])
        if HF_HUB_OFFLINE and "offline" not in reason:
            reason = "offline mode (HF_HUB_OFFLINE is set)"
        raise RunError(f"--data {redact_word(url)} cannot be reached: {reason}") from error
    return _curl(address, *([f"Authorization: Bearer {token}"] if token else []))


def _curl(url: str, *headers: str) -> tuple[list[str], bytes]:
    """Return curl's command and its standard input, which has the secrets: every user of the computer can see arguments."""
    login, address = split_credentials(url)
    options = [("url", address), *([("user", login)] if login else []), *(("header", each) for each in headers)]
    lines = [f"{name} = {_curl_quoted(value)}\n" for name, value in options]
    return [*_CURL, "--config", "-"], "".join(lines).encode()


def _curl_quoted(value: str) -> str:
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}
    return f'"{value.translate(str.maketrans(escapes))}"'


class _Output(io.RawIOBase):
    """The standard output of a process; an end without success is an error."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._url, self._process, self._errors, self._has_stalled = url, process, errors, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        output: Any = self._process.stdout
        watchdog = threading.Timer(SILENCE, self._on_stall)
        watchdog.daemon = True
        watchdog.start()
        try:
            count = output.readinto(buffer)
            status = 0 if count else self._process.wait()
        finally:
            watchdog.cancel()
        if self._has_stalled:
            raise RunError(f"timed out reading --data {redact_word(self._url)} (no data for {SILENCE:g} s)")
        if status:
            reason = self._last_error_line() or f"exit code {status}"
            raise RunError(f"--data {redact_word(self._url)} cannot be read: {redact_text(reason)}")
        return count

    def close(self) -> None:
        if not self.closed:
            self._kill()
            self._process.wait()
            for file in (self._process.stdout, self._errors):
                if file is not None:
                    file.close()
        super().close()

    def _on_stall(self) -> None:
        self._has_stalled = True
        self._kill()

    def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                if os.name == "posix":
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()

    def _last_error_line(self) -> str:
        """Return the last line of the process's error output."""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def _reach(url: str) -> None:
    label = redact_word(url)
    try:
        urllib.request.urlopen(_head_request(url), timeout=10).close()
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):  # other codes may be for HEAD requests only
            raise UsageError(f"there is no shard {label}: the server responds {error.code} {error.reason}") from error
    except (ValueError, InvalidURL) as error:  # whose text may hold a part of the password
        raise UsageError(
            f"--data {label} is not a valid URL; write special characters of user and password as %XX, such as %2F for a slash"
        ) from error
    except (OSError, HTTPException) as error:
        reason = redact_text(str(getattr(error, "reason", error)))
        raise RunError(f"--data {label} cannot be reached: {reason}") from error


def _head_request(url: str) -> urllib.request.Request:
    """Return a HEAD request; user and password of the URL go into a header, which is not sent on to other hosts."""
    login, address = split_credentials(url)
    request = urllib.request.Request(address, method="HEAD")
    if login:
        encoded = base64.b64encode(login.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request
