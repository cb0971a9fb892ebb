"""Read metadata.jsonl and metadata.csv: rows as they are, and for each damaged line a reason that names it."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcmdistill.data.text import NOT_TEXT, TextEncodingError, decode_table, is_decoded, split_lines
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json

_LISTED = 3
"line numbers that a reason lists"

_Row = tuple[int, dict[str, Any], str | None]
"(number of its first line, values, what is wrong with it)"


def metadata_rows(path: Path, name: str) -> list[tuple[dict[str, Any], str | None]]:
    """Return (values, reason) of the rows of a metadata file; the reason of a damaged one says what is wrong and where.

    Args:
        path: The file.
        name: What messages call it.

    Raises:
        UsageError: If the encoding is unknown or the table has no usable header; the message names file and line.
    """
    if not path.is_file():  # a pipe or a device, whose reading might not end
        raise UsageError(f"{path} is not a file; replace it by one, or remove it")
    try:
        text = decode_table(path.read_bytes())
    except TextEncodingError as error:
        raise UsageError(f"{path}, line {error.line}: {error}; save it as UTF-8") from error
    rows = list(_json_rows(text) if path.suffix.lower() == ".jsonl" else _csv_rows(path, text))
    lines: dict[str, list[int]] = {}
    for number, _, reason in rows:
        if reason:
            lines.setdefault(reason, []).append(number)
    return [(values, reason and f"{name}, {_listed(lines[reason])}: {reason}") for _, values, reason in rows]


def _listed(numbers: list[int]) -> str:
    """Return line numbers in words. All damaged rows of one kind share a reason, so that it is counted once."""
    more = f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    return f"line{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:_LISTED]))}{more}"


def _json_rows(text: str) -> Iterator[_Row]:
    for number, line in enumerate(split_lines(text), 1):
        if not line.strip():
            continue
        row, problem = {}, None
        try:
            row = parse_json(line)
        except ValueError:
            problem = "not valid JSON"
        if not is_decoded(line):
            problem = NOT_TEXT
        elif problem is None and not isinstance(row, dict):
            problem = 'not a JSON object such as {"file_name": "a.png", "text": "a cat"}'
        yield number, {} if problem else row, problem


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    while True:
        number, values, problem = reader.line_num + 1, [], None
        try:
            values = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            problem = f"not valid CSV ({error})"
        if not is_decoded("".join(values)):
            problem = NOT_TEXT
        if columns is None and (problem or values):
            columns = _checked_columns(path, number, values, problem)
            continue
        if columns is not None and any(values[len(columns) :]):
            problem = f"more than the {len(columns)} fields of the header; put text that holds commas in quotes"
        if problem:
            yield number, {}, problem
        elif values:
            yield number, dict(zip(columns or (), values, strict=False)), None
    if columns is None:
        _checked_columns(path, 1, [], None)


def _checked_columns(path: Path, number: int, columns: list[str], problem: str | None) -> list[str]:
    """Return the columns of a table, raise UsageError if they cannot be used."""
    if problem is None and "file_name" not in columns:
        problem = f"no column file_name, but {', '.join(columns) or 'nothing'}"
    if problem:
        raise UsageError(f"{path}, line {number}: {problem}; name the columns file_name and text, separated by commas")
    return columns
