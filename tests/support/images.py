"""The images that `lcmdistill sample` has written."""

from pathlib import Path


def newest_image(folder: Path, prompt: str = "") -> Path:
    """Return the newest image of a prompt, spelled as in file names; no grid."""
    found = [path for path in folder.glob(f"{prompt}*.png") if not path.name.startswith("grid")]
    return max(found, key=lambda path: path.stat().st_mtime_ns)
