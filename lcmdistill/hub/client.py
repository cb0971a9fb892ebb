"""The Hugging Face hub: a login that is checked before hours are spent, and uploads in one commit.

The token is huggingface_hub's own business (its login, or HF_TOKEN): nothing here takes, shows or keeps one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lcmdistill.utils.errors import RunError, UsageError


def check_login(repo: str) -> None:
    """Raise unless `repo` is a name that this machine's login may write to.

    repo: "owner/name". UsageError for a name that no repository can have, no token, a token that is refused or may only
    read, and somebody else's namespace; RunError if the hub cannot be asked.
    """
    from huggingface_hub import HfApi, get_token

    if not _is_full_name(repo):
        raise UsageError(f"--push-to-hub {repo!r} is no repository's name; it is OWNER/NAME, such as me/my-lcm")
    if get_token() is None:
        raise UsageError("--push-to-hub needs a login: run `hf auth login`, or set HF_TOKEN")
    try:
        me = HfApi().whoami()
    except Exception as error:
        if _status(error) in (401, 403):
            raise UsageError(f"--push-to-hub: {_endpoint()} rejects the token; run `hf auth login --force`") from None
        raise RunError(f"--push-to-hub: {_endpoint()} cannot be asked who you are: {_reason(error)}") from None
    _check_may_write(repo, me)


def _is_full_name(repo: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return all(repo.partition("/"))


def _check_may_write(repo: str, me: Mapping[str, Any]) -> None:
    """me: what the hub says of the token's owner."""
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UsageError(
            "--push-to-hub: the token may only read; make one that may write and run `hf auth login --force`"
        )
    owner = repo.partition("/")[0]
    known = [me["name"], *(each["name"] for each in me.get("orgs", ()))]
    if owner not in known:
        raise UsageError(f"--push-to-hub {repo}: your login may write to {', '.join(known)}, not to {owner}")


def push(repo: str, files: Mapping[str, Path | bytes], message: str, again: str) -> str:
    """Upload files, {path in the repository: file or content}, in one commit; returns the repository's address.

    A repository that is not there is made. again: the command that uploads once more, named by the RunError of an upload
    that fails; what is on this machine is not touched.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
    try:
        with _without_bars():
            made = HfApi().create_repo(repo, exist_ok=True)
            HfApi().create_commit(made.repo_id, operations, commit_message=message)
    except Exception as error:
        raise RunError(
            f"the upload to {repo} failed: {_reason(error)}; everything is kept here, upload it again with: {again}"
        ) from None
    return str(made)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars where there is no terminal to draw them on."""
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
    """The HTTP status of an answer that was an error; None if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _reason(error: Exception) -> str:
    """The hub's own words, or else the first cause, in one line; without the token, should a library have quoted it."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, unset it"
    while _status(error) is None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    said = getattr(error, "server_message", None) or str(error)
    text = next((line.strip() for line in said.splitlines() if line.strip()), "no message")
    token = get_token()
    text = text.replace(token, "***") if token else text
    return f"{_status(error) or type(error).__name__}: {text}"
