"""The layers: imports point downwards only, and what each layer may know is checked from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lcmdistill"

LAYERS = {
    0: {"schedule", "prediction", "solvers", "consistency", "distances", "ema"},
    1: {"batch", "objectives"},
    2: {
        "settings",
        "recognise",
        "public",
        "presets",
        "methods",
        "optimizer",
        "compiling",
        "teachers",
        "student",
        "lora",
        "data",
        "checkpoint",
        "tracking",
        "rundir",
        "device",
        "side_by_side",
        "interrupt",
        "hub",
    },
    3: {
        "processes",
        "train",
        "loop",
        "sample",
        "evaluate",
        "report",
        "best",
        "export",
        "preflight",
        "preparing",
        "memory",
        "plan",
        "validate",
        "modelcard",
        "publish",
        "info",
    },
    4: {"cli", "config", "errors", "__main__"},
}

LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names} | {"__init__": -1}

# The exceptions: pure modules of the top that lower layers may import, and from which layer on.
IMPORTED_FROM_BELOW = {"errors": 1, "config": 2}

FILES = sorted(PACKAGE.rglob("*.py"))

each_file = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])


def component(file: Path) -> str:
    """The file or sub-package right below lcmdistill that a file belongs to."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(source: str, package: tuple[str, ...] = ("lcmdistill",)) -> Iterator[str]:
    """The dotted name of everything that is imported, wherever in the file; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def imports_of(file: Path) -> list[str]:
    return list(imported(file.read_text(), ("lcmdistill", *file.relative_to(PACKAGE).parent.parts)))


def upward(importer: str, names: list[str]) -> list[str]:
    """The imported names that point upwards from one of the package's components."""
    layer, found = LAYER_OF.get(importer, 0), []
    for name in names:
        top, _, rest = name.partition(".")
        if top != "lcmdistill":
            continue
        target = rest.split(".")[0]
        target = target if target in LAYER_OF else "__init__"  # `from lcmdistill import __version__`
        if LAYER_OF[target] > layer and layer < IMPORTED_FROM_BELOW.get(target, 99):
            found.append(name)
    return found


@each_file
def test_every_file_has_its_layer(file: Path) -> None:
    assert component(file) in LAYER_OF, f"assign {component(file)} to a layer, here and in the architecture's picture"


@each_file
def test_imports_point_downwards(file: Path) -> None:
    assert upward(component(file), imports_of(file)) == []


@each_file
def test_third_parties_stay_in_their_layer(file: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(file)}
    if component(file) != "processes":
        assert "accelerate" not in roots
    if LAYER_OF.get(component(file)) == 0:
        assert roots.isdisjoint({"diffusers", "transformers", "accelerate", "pathlib", "os", "io"})


@each_file
def test_no_file_is_over_400_lines(file: Path) -> None:
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
    assert len(uses) == (2 if file.name == "batch.py" else 0), uses
    assert all(use.endswith("manual_seed") for use in uses)


@pytest.mark.parametrize("module", ["lcmdistill.cli", "lcmdistill.config"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    heavy = ("torch", "diffusers", "transformers", "accelerate", "numpy")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


@pytest.mark.parametrize(
    ("importer", "source", "is_upward"),
    [
        ("solvers", "from lcmdistill.prediction import X0Eps", False),
        ("solvers", "from lcmdistill.batch import Rng", True),
        ("solvers", "def lazily():\n    import lcmdistill.objectives", True),
        ("solvers", "from lcmdistill.errors import RunError", True),
        ("batch", "from lcmdistill.errors import RunError", False),
        ("objectives", "from lcmdistill import config", True),
        ("data", "from lcmdistill.config import DataConfig", False),
        ("data", "from ..train import loop", True),
        ("data", "from .images import open_image", False),
        ("student", "from lcmdistill import __version__", False),
        ("train", "from lcmdistill.cli import main", True),
        ("cli", "from lcmdistill.train import train", False),
    ],
)
def test_an_upward_import_is_found(importer: str, source: str, is_upward: bool) -> None:
    names = list(imported(source, ("lcmdistill", importer)))
    assert bool(upward(importer, names)) == is_upward


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
