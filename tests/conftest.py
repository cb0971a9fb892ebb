"""Shared fixtures: a small random Stable Diffusion, built from its real classes, and small real image folders."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.speed import Settings
from tests.support.teachers import SMALL, Command, build_teacher


def pytest_collection_finish() -> None:
    """Exempt the libraries' objects from garbage collection, which would walk millions of them again and again."""
    import diffusers  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)


@pytest.fixture
def speed_settings(small_teacher: Path, image_folder: Path, tmp_path: Path) -> Settings:
    own = {"teacher.model": str(small_teacher), "data.sources": (str(image_folder),)}
    own |= {"student.rank": 4}
    return {**SMALL, **own, "data.cache_dir": str(tmp_path / "cache"), "run.output": str(tmp_path / "run")}


@pytest.fixture
def train_settings(small_teacher: Path, image_folder: Path) -> dict[str, Any]:
    return {**SMALL, "teacher.model": str(small_teacher), "data.sources": (str(image_folder),)}


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random epsilon teacher."""
    return build_teacher(tmp_path_factory.mktemp("teacher") / "small")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve real emoji of the bundled shards as PNGs with captions beside them."""
    from lcmdistill.data.sources.registry import make_source

    folder = tmp_path_factory.mktemp("images")
    for i, member in enumerate(make_source("tiny").members(12)):
        assert isinstance(member.image, bytes)
        (folder / f"{i:02d}.webp").write_bytes(member.image)
        (folder / f"{i:02d}.txt").write_text(member.caption or "")
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, small_teacher: Path, image_folder: Path) -> Path:
    """The folder of a finished run on the small teacher, with validation grids."""
    from tests.support.runs import distill, resolve

    folder = tmp_path_factory.mktemp("runs") / "runs" / "small-lcm"
    own = {"teacher.model": str(small_teacher), "data.sources": (str(image_folder),), "run.output": str(folder)}
    own |= {"data.cache_dir": str(folder.parent.parent / "cache"), "run.validate_every": 4}
    return distill(resolve({}, {**SMALL, **own, "run.validation_prompts": ("red heart",)}))


@pytest.fixture(scope="session")
def small_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random feature network as a TorchScript file: what --features takes."""

    import torch

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randn(8, 3, 5, 5, generator=generator))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(images.float() / 255, self.weight, stride=3).relu().mean((2, 3))

    path = tmp_path_factory.mktemp("features") / "small.pt"
    torch.jit.script(Features()).save(str(path))
    return path


@pytest.fixture(scope="session")
def evaluated_run(
    tmp_path_factory: pytest.TempPathFactory, small_run: Path, small_features: Path, image_folder: Path
) -> Path:
    """A copy of the small run with an evaluation of few images."""
    import shutil

    from lcmdistill.evaluation.evaluate import evaluate
    from lcmdistill.evaluation.options import EvaluationOptions

    folder = tmp_path_factory.mktemp("evaluated") / "small-lcm"
    shutil.copytree(small_run, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LCMDISTILL_CACHE", str(folder.parent / "cache"))
        patched.setattr("lcmdistill.evaluation.metrics.features.MIN_KID_IMAGES", 2)
        evaluate(
            [folder],
            EvaluationOptions(
                steps=(1, 2),
                guidance_scales=(4.0, 2.0),
                num_images=3,
                features=small_features,
                real=str(image_folder),
                device="cpu",
            ),
        )
    return folder


@pytest.fixture(scope="session", autouse=True)
def _flops_counted_once() -> Iterator[None]:
    """Count the FLOPs of each network once: a quarter of a small run. training/test_profiling tests the count itself."""
    profiling = sys.modules.get("lcmdistill.training.profiling")  # not where no collected test trains
    if profiling is None:
        yield
        return
    count, counted = profiling.forward_flops, {}

    def forward_flops(teacher: Any, size: Any) -> int:
        key = type(teacher.network), repr(sorted(teacher.network.config.items())), repr(size)
        if key not in counted:
            counted[key] = count(teacher, size)
        return counted[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(profiling, "forward_flops", forward_flops)
        yield


@pytest.fixture(autouse=True)
def _fixed_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure nothing and count no memory for the summary at the start of a run. The tests of the summary override this."""
    if summary := sys.modules.get("lcmdistill.training.summary"):
        from lcmdistill.training.cost_time import Rates
        from lcmdistill.training.memory.estimate import Breakdown

        monkeypatch.setattr(summary, "measure_rates", lambda *_: Rates(0.1, 0.1, 0.1, 0.1, 0.1, 0.1))
        monkeypatch.setattr(summary, "step_memory", lambda *_, **__: Breakdown(1, 1, 4, 4, 4, 4, 8, 4))


@pytest.fixture(autouse=True)
def _charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the charts of reports, a quarter of a small run. The tests of the report override this fixture."""
    if page := sys.modules.get("lcmdistill.report.page"):
        monkeypatch.setattr(page, "to_svg", lambda chart, number: "<svg></svg>")


@pytest.fixture(autouse=True)
def _short_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generate the reference images of validations in 10 steps instead of 50. The slow tests override this fixture."""
    if validation := sys.modules.get("lcmdistill.training.validation"):
        monkeypatch.setattr(validation, "TEACHER_STEPS", 10)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave flushing to the operating system: a run flushes some 40 files. `utils/test_atomic.py` tests that they are."""
    if atomic := sys.modules.get("lcmdistill.utils.atomic"):
        monkeypatch.setattr(atomic, "flush", lambda handle: None)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCMDISTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run the command line in tmp_path; return the exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    from lcmdistill import cli

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lcmdistill", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run
