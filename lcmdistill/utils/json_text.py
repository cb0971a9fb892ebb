"""Parse JSON that somebody else may have written, or a disk may have damaged."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Use it in place of `json.loads`, which ends in a RecursionError for deep nesting.

    Raises:
        ValueError: The text is not JSON, or its lists and objects are nested too deeply.
    """
    try:
        return json.loads(text)  # noqa: TID251
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error
