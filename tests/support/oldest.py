"""Print pip constraints that select the lowest version that pyproject.toml allows of every dependency but torch."""

import re
import tomllib
from pathlib import Path

# The developers' own tools: their lowest versions are nothing that a user depends on.
TOOLS = {"pytest", "pytest-xdist", "import-linter", "ruff", "pyright"}


def lowest_versions(pyproject: str) -> dict[str, str]:
    """Return {package: lowest version} of the lines `package>=version`."""
    project = tomllib.loads(pyproject)["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    matches = (re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for line in lines)
    found = {match[1]: match[2] for match in matches if match}
    return {package: version for package, version in found.items() if package not in {*TOOLS, "torch"}}


if __name__ == "__main__":
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for package, version in lowest_versions(text).items():
        print(f"{package}=={version}")
