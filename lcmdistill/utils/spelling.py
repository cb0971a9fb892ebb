"""Slips of the keyboard: which of several known words a mistyped one most likely is."""

import difflib
import re
from collections.abc import Iterable

LIKE = 0.75
"the similarity, from 0 to 1, from which a word is taken for a slip of another; below it suggestions are nonsense"

SHORTEST_START = 3
"letters from which a word is taken for the start of a longer one"

_ALIKE = str.maketrans("10", "lo")


def near_words(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Return the known words that a mistyped one is like, the most similar first; [] if it is like none of them.

    Case and separators do not count, nor the difference of 1 and l, 0 and o.

    Args:
        word: What was typed.
        known: What is allowed.
        count: How many words to return at most.
    """
    keys, key = {each: _key(each) for each in known}, _key(word)
    if equal := [each for each, other in keys.items() if other == key]:
        return equal[:count]
    if starts := [each for each, other in keys.items() if len(key) >= SHORTEST_START and other.startswith(key)]:
        return starts[:count]
    likeness = {each: difflib.SequenceMatcher(None, other, key).ratio() for each, other in keys.items()}
    return sorted((each for each in keys if likeness[each] >= LIKE), key=lambda each: -likeness[each])[:count]


def or_list(words: Iterable[str]) -> str:
    """Return words as a choice: "a", "a or b", "a, b or c"."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _key(word: str) -> str:
    return re.sub(r"[-_. ]", "", word.lower()).translate(_ALIKE)
