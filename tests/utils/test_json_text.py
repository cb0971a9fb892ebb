"""JSON that somebody else wrote."""

import pytest

from lcmdistill.utils.json_text import parse_json


def test_whatever_is_wrong_with_a_text_is_a_value_error() -> None:
    assert parse_json(b'{"a": [1, null]}') == {"a": [1, None]}
    for text in ("[" * 100_000, '{"a":' * 50_000, "", b"\xff\xfe"):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_json(text)
