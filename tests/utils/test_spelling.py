"""Slips of the keyboard are recognized, and words that are only a little alike are not."""

import pytest

from lcmdistill.utils.spelling import near_words, or_list

KNOWN = ("tiny", "sd15", "sd21", "sdxl", "sd35-medium", "sd35-large", "preset", "vae")


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("tinny", ["tiny"]),
        ("sd5", ["sd15"]),
        ("sdx1", ["sdxl"]),  # a one for an l
        ("SD-1.5", ["sd15"]),
        ("sd3.5", ["sd35-medium", "sd35-large"]),  # the start of both
        ("yes", []),
        ("foo", []),
        ("", []),
    ],
)
def test_near_words(word: str, near: list[str]) -> None:
    assert near_words(word, KNOWN, 3) == near


def test_words_as_a_choice() -> None:
    assert [or_list(words) for words in ("a", "ab", "abc")] == ["a", "a or b", "a, b or c"]
