"""The structure: imports point one way, files stay short, random state is never global, and the command line starts fast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lcmdistill"
FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of pyproject.toml, as `lint-imports` does."""
    pytest.importorskip("importlinter")  # `make test-oldest` installs no tools
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run([sys.executable, "-c", command, "--no-cache"], capture_output=True, text=True, cwd=folder)


def test_the_contracts_of_pyproject_hold():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


def test_a_broken_contract_is_found(tmp_path: Path):
    package = tmp_path / "lcmdistill"
    for name in ("cli", "hub", "report", "training", "export", "evaluation", "sampling", "data", "students"):
        (package / name).mkdir(parents=True)
    for name in ("teachers", "objectives", "diffusion", "config", "utils"):
        (package / name).mkdir()
    for folder in [package, *package.iterdir()]:
        (folder / "__init__.py").touch()
    (package / "training" / "distributed.py").write_text("import accelerate\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert lint_imports(tmp_path).returncode == 0, "the empty skeleton is clean"
    (package / "data" / "up.py").write_text("def lazily():\n    import lcmdistill.training\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "lcmdistill.data is not allowed to import lcmdistill.training" in result.stdout


@each_file
def test_no_file_is_over_400_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize("readme", sorted(PACKAGE.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_a_package_s_readme_names_each_of_its_files(readme: Path):
    files = [path for path in readme.parent.glob("*.py") if path.name != "__init__.py"]
    folders = [path.parent for path in readme.parent.glob("*/__init__.py")]
    text = readme.read_text(encoding="utf-8")
    assert [path.name for path in (*files, *folders) if f"`{path.name}" not in text] == []


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_test_imports_another_test_or_an_example(file: Path) -> None:
    modules = [node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in modules if ".test_" in f".{name}" or name.split(".")[0] == "examples"]
    assert len(file.read_text().splitlines()) <= 400


# torch's draws that fall back to the global generator if they are not given one; the methods end in an underscore.
DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"}

DRAWS |= {"multinomial", "poisson"}

METHODS = ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_")

SEEDERS = {"manual_seed", "manual_seed_all", "seed_all", "set_seed", "enable_full_determinism"}

OWN_STATE = {"random.Random", "random.SystemRandom", "numpy.random.default_rng", "numpy.random.Generator"}


def dotted(node: ast.expr) -> str:
    """a.b.c of an attribute's source, or "" for what is no plain name."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def global_random_uses(source: str) -> list[str]:
    """Calls that read or set random state that is shared by all of the process."""
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):  # what each local name stands for: np -> numpy, shuffle -> random.shuffle
        if isinstance(node, ast.Import):
            names |= {
                (a.asname or a.name.split(".")[0]): (a.name if a.asname else a.name.split(".")[0]) for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            names |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, _, rest = dotted(node.func).partition(".")
        called = ".".join(filter(None, [names.get(head, head), rest]))
        method = node.func.attr if isinstance(node.func, ast.Attribute) else called.rpartition(".")[2]
        has_generator = any(keyword.arg == "generator" for keyword in node.keywords)
        is_torch_draw = called.startswith("torch.") and called.rpartition(".")[2] in DRAWS
        is_draw = (is_torch_draw or method.endswith(METHODS)) and not has_generator
        is_module_state = called.startswith(("random.", "numpy.random.")) and (
            called not in OWN_STATE or (not node.args and not node.keywords)
        )
        # torch.Generator().manual_seed(0) seeds an object, and is not called by a plain dotted name
        is_seeder = method in SEEDERS and called.startswith(("torch.", "accelerate.", "transformers.", "diffusers."))
        if is_draw or is_module_state or is_seeder:
            found.append(f"line {node.lineno}: {ast.unparse(node.func)}")
    return found


@each_file
def test_no_global_random_state(file: Path) -> None:
    uses = global_random_uses(file.read_text())
    # The one exception: dropout layers draw from nowhere else, so seed_dropout seeds the generators for them.
    assert len(uses) == (2 if file.name == "random.py" else 0), uses
    assert all(use.endswith("manual_seed") for use in uses)


@pytest.mark.parametrize("module", ["lcmdistill.cli", "lcmdistill.config.resolve"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    heavy = ("torch", "diffusers", "transformers", "accelerate", "numpy")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


@pytest.mark.parametrize(
    ("source", "is_global"),
    [
        ("import torch; torch.manual_seed(0)", True),
        ("import torch; torch.cuda.manual_seed_all(0)", True),
        ("import torch; torch.randn(3)", True),
        ("from torch import randn; randn(3)", True),
        ("import torch; torch.randn(3, generator=g)", False),
        ("import torch; torch.Generator().manual_seed(0)", False),
        ("import torch; torch.nn.init.normal_(p)", True),
        ("import torch; torch.nn.init.normal_(p, generator=g)", False),
        ("p.data.uniform_(0, 1)", True),
        ("import random; random.shuffle(x)", True),
        ("from random import shuffle; shuffle(x)", True),
        ("import random; random.Random(3).shuffle(x)", False),
        ("import random; random.Random().shuffle(x)", True),
        ("import numpy as np; np.random.rand(3)", True),
        ("import numpy as np; np.random.default_rng(3).normal()", False),
        ("from accelerate.utils import set_seed; set_seed(0)", True),
    ],
)
def test_global_random_state_is_found(source: str, is_global: bool) -> None:
    assert bool(global_random_uses(source)) == is_global
