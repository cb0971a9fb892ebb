"""A sweep of real runs: stopped, resumed, and compared on one page whose rows differ by their settings."""

import re
from pathlib import Path

import pytest

import lcmdistill
from lcmdistill.evaluation import sweep
from tests.support.evaluated import shorten_references
from tests.support.teachers import Command

pytestmark = pytest.mark.slow

WORDS = ["--teacher", "tiny", "--objective", "lcm,tcd", "--set", "objective.skip=5,20", "--max-train-steps", "2"]

WORDS += ["--batch-size", "2", "--set", "data.max_samples=128", "--set", "run.validate_every=0", "--device", "cpu"]


def test_a_sweep_is_stopped_resumed_and_ends_in_one_page(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    shorten_references(monkeypatch)
    words = ["sweep", "distill", *WORDS, "--eval-steps", "1,2", "--num-images", "4", "--output", "s"]
    run, trained = lcmdistill.run, []

    def stop_in_the_third(config: object) -> Path:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(config)
        return run(config)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patched:
        patched.setattr(lcmdistill, "run", stop_in_the_third)
        code, _, _ = command(*words)
    assert code == 130
    names = {path.parent.name for path in (tmp_path / "s").glob("*/.finished")}
    assert names == {"lcm_skip-5", "lcm_skip-20"}
    weights = tmp_path / "s" / "lcm_skip-5" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns

    code, out, error = command(*words)
    assert code == 0, error
    assert weights.stat().st_mtime_ns == before
    assert out.count("is already finished with 2 steps") == 2
    page = (tmp_path / "s" / "comparison.html").read_text()
    rows = re.findall(
        r'<tr><th scope="row">(\w+_skip-\d+)</th><td class="setting">(\w+)</td><td class="setting">(\d+)</td>', page
    )
    assert sorted(rows) == [(f"{name}_skip-{k}", name, k) for name in ("lcm", "tcd") for k in ("20", "5")]
    assert re.search(r"by SSIM at 2 steps:\n  1\. \w+_skip-\d+: [\d.]+ \(objective \w+, skip \d+", out)
    assert "lcmdistill sample" in page
    # A third time nothing is trained or generated.
    monkeypatch.setattr(sweep, "student_latents", lambda *args, **options: pytest.fail("generated again"))
    assert command(*words)[0] == 0
