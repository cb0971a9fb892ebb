"""The numbers of an evaluation as CSV and JSON, for download from a page."""

import base64
import csv
import io
import json
from collections.abc import Mapping
from typing import NamedTuple

from lcmdistill.evaluation.results import Results


class Download(NamedTuple):
    """A file on a page.

    Attributes:
        label: The text of the link.
        name: The name of the file.
        href: A data: URI.
    """

    label: str
    name: str
    href: str


def downloads(evaluated: Mapping[str, Results], name: str) -> list[Download]:
    """Return the numbers of runs as files.

    Args:
        evaluated: The results by the runs' names.
        name: The start of the files' names.
    """
    files = {
        "CSV": ("csv", "text/csv", numbers_csv(evaluated)),
        "JSON": ("json", "application/json", numbers_json(evaluated)),
    }
    return [
        Download(f"Numbers as {label}", f"{name}-numbers.{suffix}", f"data:{kind};base64,{_base64(text)}")
        for label, (suffix, kind, text) in files.items()
    ]


def _base64(text: str) -> str:
    return base64.b64encode(text.encode("utf-8")).decode("ascii")


def numbers_csv(evaluated: Mapping[str, Results]) -> str:
    """Return one line per run and sweep point: numbers, their standard errors, and the time per image."""
    metrics = list(dict.fromkeys(name for results in evaluated.values() for name in results.metrics))
    points = [point for results in evaluated.values() for point in results.points.values()]
    with_error = [name for name in metrics if any(name in _errors(point) for point in points)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heads = ["run", "sampler", "steps", "guidance_scale", "images", *metrics]
    writer.writerow([*heads, *(f"{name}_standard_error" for name in with_error), "seconds_per_image"])
    for run, results in evaluated.items():
        for point in results.points.values():
            own = [run, point["sampler"], point["steps"], point["guidance_scale"], results.info["images"]]
            own += [point["numbers"].get(name, "") for name in metrics]
            own += [_errors(point).get(name, "") for name in with_error]
            writer.writerow([*own, point["seconds_per_image"]])
    return buffer.getvalue()


def numbers_json(evaluated: Mapping[str, Results]) -> str:
    """Return the sweep and its points of each run."""
    runs = {
        run: {"sweep": dict(results.info), "points": {name: dict(point) for name, point in results.points.items()}}
        for run, results in evaluated.items()
    }
    return json.dumps(runs, indent=1, ensure_ascii=False) + "\n"


def _errors(point: Mapping[str, object]) -> Mapping[str, object]:
    errors = point.get("standard_errors")
    return errors if isinstance(errors, Mapping) else {}
