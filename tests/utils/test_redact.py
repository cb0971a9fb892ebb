"""Secrets: what is shown of URLs, commands and folders, and that nothing else is lost."""

import logging

import pytest

from lcmdistill.utils.errors import RunError
from lcmdistill.utils.redact import printable, public_word, redact_text, redact_value, redact_word, split_credentials

WORDS = {
    "tiny": "tiny",
    "data/own": "data/own",
    "https://h/a.tar": "https://h/a.tar",
    "https://me:secret@h:8080/{00..09}.tar?token=secret#secret": "https://h:8080/{00..09}.tar",
    "https://secret@h/a.tar": "https://h/a.tar",
    "https://h/a@2.tar": "https://h/a@2.tar",
    "https://me:sec@ret/secret@h/a.tar": "https://h/a.tar",
    "https://me:sec@ret@h/a.tar": "https://h/a.tar",
    "https://me:se/cret@h/a.tar": "https://h/a.tar",
    "https://me:se cr'et\"<@h/a.tar": "https://h/a.tar",
    "http://[::1]:80/a.tar?secret": "http://[::1]:80/a.tar",
    "https://me:secret@h/a.tar::https://you:secret@i/b.tar": "https://h/a.tar::https://i/b.tar",
    "{https://me:secret@h/a,https://you:secret@i/b}.tar": "{https://h/a,https://i/b}.tar",
    "https://me:secret@h/a.tar::b.tar": "https://h/a.tar::b.tar",
    "pipe:curl -H 'secret' https://h/a.tar\nsecret": "pipe:...",
}


@pytest.mark.parametrize(("word", "shown"), WORDS.items())
def test_words_are_shown_without_credentials_queries_and_commands(word: str, shown: str) -> None:
    assert redact_word(word) == public_word(word) == shown
    assert redact_value([word, 3]) == [shown, 3]
    message = f"--data {redact_word(word)} cannot be read: 404; pass another"
    assert redact_text(message) == message, "redacting twice changes nothing"


@pytest.mark.parametrize(
    ("path", "published"),
    [
        ("/home/me/secret/pictures", "pictures"),
        ("/home/me/secret/", "secret"),
        ("~/secret/a.txt", "a.txt"),
        ("../secret/a.txt", "a.txt"),
        ("/secret/a.tar::/secret/b.tar", "a.tar::b.tar"),
        ("https://h/a.tar::/secret/b.tar", "https://h/a.tar::b.tar"),
        ("{/secret/a,/secret/b}/{0..9}.tar", "{0..9}.tar"),
        ("runs/mine", "runs/mine"),
    ],
)
def test_of_private_folders_the_last_part_is_published(path: str, published: str) -> None:
    assert redact_word(path) == path, "the user's own messages name the whole path"
    assert public_word(path) == published


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--config https:/me:secret@h/a.toml?k=secret is not a file", "--config https:/h/a.toml is not a file"),
        ("//me:secret@h/a.tar does not exist", "//h/a.tar does not exist"),
        ("C:/Users/me/a#b and //host/share stay", "C:/Users/me/a#b and //host/share stay"),
        ("GET https://me:secret@h/a.tar?k=secret: 403", "GET https://h/a.tar 403"),
        ("'https://me:secret@h/a.tar?k=secret' is refused", "'https://h/a.tar' is refused"),
        ("no such option: pipe:cat secret | sort; see --help", "no such option: pipe:..."),
        ("[Errno 32] Broken pipe: 'a'", "[Errno 32] Broken pipe: 'a'"),
        (
            "write pipe:COMMAND, such as aws s3 cp s3://B/K.tar -",
            "write pipe:COMMAND, such as aws s3 cp s3://B/K.tar -",
        ),
    ],
)
def test_any_text_is_shown_without_secrets(text: str, shown: str) -> None:
    assert redact_text(text) == shown


def test_a_url_is_split_into_credentials_and_the_rest() -> None:
    assert split_credentials("https://me:a%2Fb@h/a.tar?part=1") == ("me:a/b", "https://h/a.tar?part=1")
    assert split_credentials("https://me:a/b@h/a.tar") == ("me:a/b", "https://h/a.tar")
    assert split_credentials("https://token@h/a.tar") == ("token:", "https://h/a.tar")
    assert split_credentials("https://h/a@2.tar") == ("", "https://h/a@2.tar")


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b[2Jb\r\x07\x9b\u202e\tc\nd é") == "a\\x1b[2Jb\\r\\x07\\x9b\\u202e\tc\nd é"
    assert printable("a\nError: b", lines=False) == "a\\nError: b"


def test_messages_and_errors_are_redacted_at_last(capsys: pytest.CaptureFixture[str]) -> None:
    from lcmdistill.cli._errors import report_error
    from lcmdistill.utils.logging import ConsoleHandler

    record = logging.LogRecord("lcmdistill", logging.INFO, "", 0, "read %s", ("http://me:secret@h/a",), None)
    ConsoleHandler().handle(record)
    assert report_error(RunError("http://me:secret@h/a?secret failed")) == 1
    assert report_error(ValueError("pipe:secret")) == 1
    record.msg = "\x1b[2J"
    ConsoleHandler().handle(record)
    assert report_error(RunError("\x1b]0;title\x07 in\ntwo lines")) == 1
    shown = capsys.readouterr()
    assert shown.out == "read http://h/a\n\\x1b[2J\n"
    assert shown.err.splitlines()[-1] == "Error: \\x1b]0;title\\x07 in\\ntwo lines"
    assert "secret" not in shown.err


def test_tokens_in_messages_of_a_transport_are_hidden() -> None:
    assert redact_text("Illegal header value b'Bearer secret\\n'") == "Illegal header value b'Bearer ...'"
    assert redact_text("the token hf_abcdefghijklmnopqrst is not valid") == "the token ... is not valid"
    assert redact_text("hf_transfer is a package") == "hf_transfer is a package"
