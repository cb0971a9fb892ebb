"""The Python API runs the commands as functions, and importing it is quick."""

import logging
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import lcmdistill
from lcmdistill.utils.errors import UsageError
from tests.support.teachers import SMALL


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, lcmdistill; lcmdistill.RunConfig; print({'torch', 'typer'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_run_from_its_training_to_its_export(small_teacher: Path, image_folder: Path, tmp_path: Path) -> None:
    settings = {key: value for key, value in SMALL.items() if not key.startswith("optim.")}
    run = lcmdistill.distill(
        teacher=small_teacher,
        data=image_folder,
        output="runs/api",
        batch_size=2,
        max_train_steps=2,
        learning_rate=1e-3,
        settings={**settings, "optim.beta1": 0.95},
    )
    assert run == Path("runs/api")

    config = lcmdistill.load_run(run)
    assert isinstance(config, lcmdistill.RunConfig)
    assert (config.optim.max_train_steps, config.optim.beta1) == (2, 0.95)

    images = lcmdistill.sample(run, prompt=["red heart", "blue circle"], steps=2, device="cpu")
    assert [(each.prompt, each.seed) for each in images] == [("red heart", 0), ("blue circle", 1)]
    assert images[0].image.size == (config.data.resolution,) * 2
    assert len(list((run / "images").glob("*.png"))) == 3  # and a grid

    (results,) = lcmdistill.evaluate(run, steps=[1], guidance_scale=4, num_images=2)
    assert results.steps == [1]
    assert lcmdistill.report(run) == run / "report.html"

    written = lcmdistill.export(run, format="pipeline", output=tmp_path / "exported", dtype="fp32")
    assert (written / "model_index.json").is_file()
    assert "lcm" in str(lcmdistill.info(run)).lower()


def test_a_lora_run(small_teacher: Path, image_folder: Path) -> None:
    settings = {**SMALL, "optim.max_train_steps": 1}
    run = lcmdistill.distill_lora(teacher=small_teacher, data=image_folder, rank=2, output="lora", settings=settings)
    assert list((run / "lora").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"learning_rat": 1e-3}, "unknown option 'learning_rat' of distill; did you mean 'learning_rate'?"),
        ({"xyzzy": 1}, "unknown option 'xyzzy' of distill; see lcmdistill distill --help"),
        ({"batch_size": 2.5}, "invalid value for '--batch-size': "),
        ({"batch_size": 0}, "optim.batch_size is 0; it must be from 1 to 65536"),
        ({"settings": {"optim.bta1": 0.9}}, "unknown setting 'optim.bta1'; did you mean 'optim.beta1'?"),
        ({"objective": "lmc"}, "lmc"),
    ],
)
def test_a_mistake_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        lcmdistill.distill(teacher="tiny", dry_run=True, **options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_subpackages_with_the_name_of_a_function_are_that_function(small_run: Path) -> None:
    for name in ("export", "report"):
        import_module(f"lcmdistill.{name}")
    assert lcmdistill.report(small_run) == small_run / "report.html"
    with pytest.raises(UsageError, match="LoRA"):
        lcmdistill.export(small_run, format="kohya", output=small_run.parent / "lora")


def test_a_program_keeps_its_own_log_handlers(small_teacher: Path) -> None:
    before = logging.getLogger("lcmdistill").handlers[:]
    lcmdistill.info(small_teacher)
    assert logging.getLogger("lcmdistill").handlers == before
