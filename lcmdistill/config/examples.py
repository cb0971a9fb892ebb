"""The commented configurations that ship with the package: `--config NAME`, and `--config list`."""

import re
from importlib.resources import files
from pathlib import Path

from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.spelling import near_words, or_list

FOLDER = Path(str(files("lcmdistill") / "assets" / "examples"))


def example_names() -> list[str]:
    """Return the names of the shipped configurations."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def config_file(word: str) -> Path:
    """Return the file that a --config word names: an existing path, or a shipped configuration by its name.

    Raises:
        UsageError: It is neither.
    """
    path, names = Path(word).expanduser(), example_names()
    if path.exists():
        return path
    shipped = FOLDER / f"{path.name.removesuffix('.toml')}.toml"
    if shipped.is_file():
        return shipped
    near = near_words(path.name.removesuffix(".toml"), names, 3)
    hint = f"did you mean {or_list(near)}?" if near else f"pass an existing TOML file, or one of {', '.join(names)}"
    raise UsageError(f"--config {word} cannot be read (No such file or directory); {hint}")


def describe_examples() -> list[tuple[str, str, str]]:
    """Return (name, what it is, its command) of each shipped configuration, from its head."""
    rows = []
    for name in example_names():
        text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
        head = re.sub(r"\n# ", " ", text.split("\n#\n")[0]).removeprefix("# ")
        command = re.search(r"^# command: +(.+)$", text, flags=re.MULTILINE)
        rows.append((name, head.split(". ")[0].rstrip("."), command[1] if command else ""))
    return rows
