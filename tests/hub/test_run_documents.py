"""The lines after a run: their commands work where they are typed, and the file is written before it is copied."""

from pathlib import Path

from lcmdistill.hub.run_documents import instructions
from lcmdistill.objectives.recorded import require_run_config


def test_the_command_names_the_run_with_its_place(small_run: Path) -> None:
    assert small_run.is_absolute()
    *_, report, command = instructions(require_run_config(small_run), small_run)
    assert report == f"  report: {small_run}/report.html"
    assert command == f"  try: lcmdistill sample {small_run} --steps 4"


def test_the_file_is_written_before_it_is_copied(small_run: Path) -> None:
    single, comfyui, a1111, library, *_ = instructions(require_run_config(small_run), small_run)
    assert single == (
        f"  a single file for ComfyUI and A1111: lcmdistill export {small_run} --format single-file "
        f"--output {small_run.name}.safetensors"
    )
    assert comfyui.startswith(f"  ComfyUI: Copy {small_run.name}.safetensors to models/checkpoints. ")
    assert a1111.startswith(f"  A1111: Copy {small_run.name}.safetensors to models/Stable-diffusion. ")
    assert comfyui.endswith("4 steps, CFG 1.")
    assert library.startswith("  diffusers: scheduler LCMScheduler, 4 steps, guidance scale ")
