"""`lcmdistill report RUN --watch`: serve a run's page on this machine, and reload it in the browser when the run changes."""

import logging
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from lcmdistill.objectives.recorded import require_run_config
from lcmdistill.report.page import context, render_page
from lcmdistill.utils.checksums import digest
from lcmdistill.utils.errors import RunError, UsageError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
"only programs on this machine reach the page"

WATCHED = ("config.toml", "metrics.jsonl", "samples/step-*.png", "evaluation/sweep.json")
"what the page is made of"


def version_of(run: Path) -> str:
    """Return a hash that changes when the page's content does."""
    stamps = []
    for pattern in WATCHED:
        for path in sorted(run.glob(pattern)):
            try:
                stat = path.stat()
            except OSError:
                continue  # removed meanwhile
            stamps.append((path.name, stat.st_size, stat.st_mtime_ns))
    return digest(stamps)


class Pages:
    """The page of a run, rendered again when the run has changed."""

    def __init__(self, run: Path) -> None:
        self._run, self._lock = run, Lock()
        self._version, self._page = "", ""

    def latest(self) -> tuple[str, str]:
        """Return the version and the page of that version."""
        with self._lock:
            version = version_of(self._run)
            if version != self._version:
                values = context(self._run, require_run_config(self._run))
                self._page = render_page("report.html", {**values, "watch": version})
                self._version = version
            return self._version, self._page


class _Handler(BaseHTTPRequestHandler):
    """Answers / with the page and /version with its current version."""

    def __init__(self, run: Path, pages: Pages, *arguments: Any) -> None:
        self._run, self._pages = run, pages
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer a request."""
        # A name of another site that resolves to this machine must not read the page.
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in (HOST, "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "forbidden\n")
        elif self.path == "/version":
            self._answer(HTTPStatus.OK, "text/plain", version_of(self._run))
        elif self.path == "/":
            try:
                self._answer(HTTPStatus.OK, "text/html", self._pages.latest()[1])
            except (UsageError, RunError) as error:  # a file that is being written; the next request may succeed
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "not found\n")

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the browser asks every few seconds."""


def make_server(run: Path, port: int) -> ThreadingHTTPServer:
    """Return a server of a run's page, not started yet. port: 0 takes any that is free.

    Raises:
        UsageError: The folder is not a run, or the port is in use.
    """
    require_run_config(run)
    try:
        server = ThreadingHTTPServer((HOST, port), partial(_Handler, run, Pages(run)))
    except OSError as error:
        raise UsageError(f"--port {port} cannot be used ({error.strerror}); choose another one") from error
    server.daemon_threads = True
    return server


def watch(run: Path, port: int) -> None:
    """Serve a run's page until Ctrl-C. port: as `make_server`."""
    with make_server(run, port) as server:
        logger.info(f"report: http://{HOST}:{server.server_address[1]}/ (Ctrl-C stops)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            logger.info("stopped; lcmdistill report writes the page to the run folder")
