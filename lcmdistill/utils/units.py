"""Numbers as people read them: sizes on disk, durations, dates, counts of things."""

import datetime


def size_text(count: float) -> str:
    """Return a size on disk: "1.2 GB", "340 MB", "12 kB"; 1 GB is 1e9 bytes."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            value = count / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{count / 1e3:.0f} kB"


def duration_text(seconds: float) -> str:
    """Return a duration in the two units that matter: "3 d 4 h", "2 h 05 min", "3 min 20 s", "12 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def date_text(seconds: float) -> str:
    """Return the local date and time of seconds since the epoch: "2026-01-31 09:05"."""
    return f"{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: "1 image", "1,200 images". plural: where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
