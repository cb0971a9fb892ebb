"""The Hugging Face hub: a login check before training starts, and uploads in one commit.

huggingface_hub manages the token (its login, or HF_TOKEN): nothing here reads it for another purpose, shows or stores it.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lcmdistill.teachers.hub_session import limited_waiting
from lcmdistill.utils.errors import RunError, UsageError

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 60
"how long an upload waits for each answer"


def check_login(repo: str) -> None:
    """Check that the login may write to a repository, OWNER/NAME.

    Raises:
        UsageError: The name is not valid, there is no token, the hub rejects it, it may only read, or the namespace belongs
            to somebody else.
        RunError: The hub is not reachable.
    """
    from huggingface_hub import HfApi, get_token

    if not _is_full_name(repo):
        raise UsageError(f"--push-to-hub {repo!r} is not a repository name; use OWNER/NAME, such as me/my-lcm")
    if get_token() is None:
        raise UsageError("--push-to-hub needs a login: run `hf auth login`, or set HF_TOKEN")
    try:
        with limited_waiting():
            me = HfApi().whoami()
    except Exception as error:
        if _status(error) in (401, 403):
            raise UsageError(f"--push-to-hub: {_endpoint()} rejects the token; run `hf auth login --force`") from None
        raise RunError(f"--push-to-hub: cannot check the login at {_endpoint()}: {_reason(error)}") from None
    _check_may_write(repo, me)


def _is_full_name(repo: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return all(repo.partition("/"))


def _check_may_write(repo: str, me: Mapping[str, Any]) -> None:
    """Raise UsageError unless the token's owner, as the hub reports it, may write to a repository."""
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UsageError(
            "--push-to-hub: the token has read access only; create one with write access and run `hf auth login --force`"
        )
    owner = repo.partition("/")[0]
    known = [me["name"], *(each["name"] for each in me.get("orgs", ()))]
    if owner not in known:
        raise UsageError(f"--push-to-hub {repo}: your login has write access to {', '.join(known)}, not to {owner}")


def push(repo: str, files: Mapping[str, Path | bytes], message: str, again: str, *, private: bool = False) -> str:
    """Upload files in one commit, and log whether the repository is public or private.

    Args:
        repo: The repository, OWNER/NAME. It is created if it does not exist; an existing one keeps its visibility.
        files: {path in the repository: file or content}.
        message: The commit message.
        again: The command that repeats the upload.
        private: Whether a new repository is private; otherwise the owner's default applies, which is usually public.

    Returns:
        The repository's address.

    Raises:
        RunError: The upload failed; the message contains `again`. Local files are not changed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
    try:
        with _without_bars(), limited_waiting(UPLOAD_SECONDS):
            existed = HfApi().repo_exists(repo)
            created = HfApi().create_repo(repo, private=private or None, exist_ok=True)
            is_private = bool(HfApi().model_info(created.repo_id).private)
            logger.info(f"uploading {len(files)} files to {repo}, {_visibility(is_private, existed, private)}")
            HfApi().create_commit(created.repo_id, operations, commit_message=message)
    except Exception as error:
        raise RunError(
            f"the upload to {repo} failed: {_reason(error)}; local files are intact, retry with: {again}"
        ) from None
    return str(created)


def _visibility(is_private: bool, existed: bool, private: bool) -> str:
    """Return whether a repository is public or private, and why that differs from `--private`."""
    text = f"{'an existing' if existed else 'a new'} {'private' if is_private else 'public'} repository"
    if existed and private and not is_private:
        return f"{text}; --private applies to new repositories only"
    return text if is_private or existed else f"{text} (--private makes it private)"


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide progress bars without a terminal."""
    import sys

    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an error response; None without a response."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: Exception) -> str:
    """Return the hub's message, or the first cause, in one line, with the token masked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it"
    while _status(error) is None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    message = getattr(error, "server_message", None) or str(error)
    text = next((line.strip() for line in message.splitlines() if line.strip()), "no message")
    token = get_token()
    text = text.replace(token, "***") if token else text
    return f"{_status(error) or type(error).__name__}: {text}"
