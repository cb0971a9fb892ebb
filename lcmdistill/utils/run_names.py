"""Runs by name: `fast` is `runs/fast`, and a mistyped name is answered with the near ones."""

import difflib
from pathlib import Path

RUNS = Path("runs")
"the folder that runs are written to unless --output specifies another"


def run_path(word: str) -> Path:
    """Return the path that a word names: an existing path, the run of that name under runs/, or the word itself."""
    path = Path(word).expanduser()
    named = RUNS / path
    is_name = word and len(path.parts) == 1 and not path.exists()
    return named if is_name and named.is_dir() else path


def names_a_run(word: str) -> bool:
    """Return whether a word that does not exist can only mean a run: in runs/ (also misspelled), or next to runs."""
    folder = Path(word).expanduser().parent
    is_typo = bool(difflib.get_close_matches(folder.name, [RUNS.name], cutoff=0.7) and near_runs(word))
    return folder.name == RUNS.name or is_typo or (folder != Path() and any(all_runs(folder)))


def near_runs(word: str, count: int = 3) -> list[str]:
    """Return the runs whose names are like a word, the most similar first: those under runs/, and those next to it."""
    path = Path(word).expanduser()
    paths = {str(each): each.name for folder in dict.fromkeys((path.parent, RUNS)) for each in all_runs(folder)}
    names = difflib.get_close_matches(path.name, set(paths.values()), n=count, cutoff=0.5)
    return [each for name in names for each, of in paths.items() if of == name][:count]


def did_you_mean(word: str) -> str:
    """Return the part of a message that names the near runs: " (did you mean runs/fast?)"; "" if there is none."""
    near = near_runs(word)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def all_runs(folder: Path = RUNS) -> list[Path]:
    """Return the run folders in a folder, by name."""
    try:
        return sorted(path.parent for path in folder.glob("*/config.toml"))
    except OSError:
        return []
