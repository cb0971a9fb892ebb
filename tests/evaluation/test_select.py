"""Which real images an evaluation is compared with."""

from pathlib import Path

from lcmdistill.config.resolve import with_values
from lcmdistill.evaluation.options import EvaluatedRun, EvaluationOptions, evaluated_run
from lcmdistill.evaluation.select import real_source


def test_runs_are_compared_with_the_same_real_images(small_run: Path, tmp_path: Path, image_folder: Path):
    each = evaluated_run(small_run)

    def source(*data: str, real: str | None = None, prompts: str | None = None) -> str | None:
        some = [
            EvaluatedRun(each.run, with_values(each.config, {"data.sources": (spec,)}), each.model) for spec in data
        ]
        return real_source(some, EvaluationOptions(real=real, prompts=prompts))

    assert source("teacher", str(image_folder), "tiny") == "tiny"
    assert source("teacher", "tiny", real="elsewhere") == "elsewhere"
    # The prompts are not the captions of a user's own images.
    assert source(str(image_folder)) is None
    assert source("tiny", prompts="own.txt") is None
    # Nothing is downloaded and no command is run for a default.
    assert source("teacher", "https://example.invalid/a.tar", "pipe:cat a.tar", str(tmp_path / "gone")) is None
