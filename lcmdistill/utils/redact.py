"""Make text fit to show: without credentials in URLs, shell commands, private folders, and codes that control a terminal.

A run's own `config.toml` and `.data.json` keep the settings as they are, because resuming reads them. Everything else that
shows a setting goes through here: messages, errors, `log.txt`, reports, model cards, exports and trackers.
"""

import logging
import re
from typing import Any
from urllib.parse import unquote

COMMAND = "pipe:"

HIDDEN_COMMAND = f"{COMMAND}..."
"stands for a shell command"

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# A path's library turns "//" into "/"; a login may also stand behind "//" without a scheme.
_SCHEME = r"(?:[A-Za-z][A-Za-z0-9+.-]{0,20}://|(?:https?|ftp|s3|gs|hf):/|(?<![\w:/])//(?=[^\s/@]*:[^\s/@]*@))"

_URL = re.compile(rf"({_SCHEME})((?:(?!(?:::)?{_SCHEME}).)*)", re.DOTALL)

_URL_IN_TEXT = re.compile(rf"({_SCHEME})((?:(?!(?:::)?{_SCHEME})[^\s'\"<>])*)")

# "Broken pipe: " belongs to the operating system. "pipe:COMMAND" is how help and errors write the form of a command.
_COMMAND_IN_TEXT = re.compile(rf"(?<!Broken )\b{COMMAND}(?!\.\.\.|COMMAND\b).*", re.DOTALL)


# A transport may quote the header that it refuses.
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=\bBearer )[^\s'\"]+")


def redact_word(word: str) -> str:
    """Return what a setting names, in a form for messages: without credentials, queries and commands."""
    return HIDDEN_COMMAND if word.startswith(COMMAND) else _URL.sub(_redact_url, word)


def redact_value(value: Any) -> Any:
    """Return a setting's value with its words redacted for messages."""
    if isinstance(value, list | tuple):
        return type(value)(map(redact_value, value))
    return redact_word(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Return a message without credentials, tokens, queries and commands.

    Where a command ends in a message cannot be known, so everything after it is removed; use `redact_word` before.
    """
    text = _URL_IN_TEXT.sub(_redact_url, _COMMAND_IN_TEXT.sub(HIDDEN_COMMAND, text))
    return _TOKEN.sub("...", text)


def printable(text: str, *, lines: bool = True) -> str:
    """Return text with the characters escaped that move the cursor, change colors or reverse the reading direction.

    Names and metadata of files that others made may hold some. Tabs stay.

    Args:
        text: What will be shown.
        lines: Whether line feeds stay, too.
    """
    text = text if lines else text.replace("\n", "\\n")
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def public_word(word: str) -> str:
    """Return what a setting names, in a form that is safe to publish: of local paths, only the last part remains."""
    parts = re.split(r"::(?=[/~.{])", redact_word(word))  # shards of several kinds may be joined
    return "::".join(part if "://" in part else _last_part(part) for part in parts)


def split_credentials(url: str) -> tuple[str, str]:
    """Return ("user:password", unescaped, and the URL without it) of a URL; ("", the URL) if it has none."""
    scheme, separator, rest = url.partition("://")
    login, rest = _split_credentials(rest)
    login = login if not login or ":" in login else f"{login}:"
    return unquote(login), f"{scheme}{separator}{rest}"


class RedactingFilter(logging.Filter):
    """Redact the message of every record that a handler gets, and escape its control characters."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the message and keep the record."""
        message = record.getMessage()
        if (redacted := printable(redact_text(message))) != message:
            record.msg, record.args = redacted, None
        return True


def _redact_url(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    login, rest = _split_credentials(rest)
    if login:  # a later "@" may still belong to a password that was not escaped
        rest = rest.rpartition("@")[2]
    return scheme + re.split(r"[?#]", rest, maxsplit=1)[0]


def _split_credentials(rest: str) -> tuple[str, str]:
    """Return (user and password, the rest) of a URL behind its scheme.

    A password with a slash, "?" or "#" that should have been escaped counts as a password.
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        user, _, host = authority.rpartition("@")
        return user, host + rest[len(authority) :]
    if re.search(r":(?!\d*$)", authority) and not authority.startswith("[") and "@" in rest:
        user, _, host = rest.rpartition("@")
        return user, host
    return "", rest


def _last_part(word: str) -> str:
    """Return the last part of a path that is absolute, of a home folder or above the current folder, otherwise the path."""
    return word.rstrip("/").rpartition("/")[2] if re.match(r"[{,]*(/|~|\.\./)|.*[{,](/|~)", word) else word
