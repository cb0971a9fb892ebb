"""The formats `pipeline` and `fused`: a diffusers pipeline folder."""

import json
import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lcmdistill.export.base import Exporter, ExportRequest, Usage, merge_adapter, unverified
from lcmdistill.export.trained_student import TrainedStudent
from lcmdistill.export.verify import BOUNDS, check_close, pipeline_outputs
from lcmdistill.teachers.compat import dtype_option
from lcmdistill.teachers.naming import is_local
from lcmdistill.teachers.pipelines import absent_parts
from lcmdistill.utils.atomic import atomic_dir
from lcmdistill.utils.checksums import write_checksums
from lcmdistill.utils.json_text import parse_json


def export_pipeline(student: TrainedStudent, request: ExportRequest) -> str:
    """Write a diffusers pipeline folder in the requested dtype; the adapter of a LoRA student is merged.

    Args:
        student: The trained student.
        request: What to write, and where.

    Returns:
        A sentence with the largest difference from the student.
    """
    pipeline = student.pipeline()
    expected = pipeline_outputs(pipeline, request.guidance_scale) if request.verify else {}
    merge_adapter(student, pipeline)
    with atomic_dir(request.output) as folder:
        write_pipeline(pipeline.to(dtype=request.dtype), folder, "")
        request.write_card(student, "pipeline", request.output, folder)
        if not request.verify:
            return unverified(request.output)
        from diffusers import DiffusionPipeline

        absent = dict.fromkeys(absent_parts(pipeline))
        del pipeline  # one copy in memory at a time
        reloaded = DiffusionPipeline.from_pretrained(folder, **dtype_option(request.dtype), **absent)
        outputs = pipeline_outputs(reloaded, request.guidance_scale)
        return check_close(outputs, expected, BOUNDS[request.dtype], request.output)


def python_code(usage: Usage) -> str:
    """Return the Python code that opens the folder and generates an image."""
    return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{usage.place}"{usage.absent_options})
{usage.call}"""


PIPELINE = Exporter(
    key="pipeline",
    title="a diffusers pipeline folder",
    student_kinds=("full",),
    writes="folder",
    write=export_pipeline,
    python=python_code,
    keeps_omega_input=True,
)

FUSED = Exporter(
    key="fused",
    title="a diffusers pipeline folder with the LoRA merged, which needs no peft",
    student_kinds=("lora",),
    writes="folder",
    write=export_pipeline,
    python=python_code,
)


def save_pipeline(pipeline: Any, folder: Path, card: str) -> None:
    """Write the pipeline folder of a run and its model card atomically, with checksums; the weights keep their dtype."""
    with atomic_dir(folder) as partial:
        write_pipeline(pipeline, partial, card)
        write_checksums(partial)


def write_pipeline(pipeline: Any, folder: Path, card: str) -> None:
    """Fill an existing folder with a pipeline and its model card; the weights keep their dtype."""
    # diffusers would warn that the pipeline is not saved to the folder that it was loaded from.
    logging.getLogger("diffusers.configuration_utils").setLevel(logging.ERROR)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("text_encoder*/model.safetensors"):
        _default_to_fp32(path.with_name("config.json"))
        if "CLIPText" in path.with_name("config.json").read_text(encoding="utf-8"):
            _add_clip_prefix(path)
    checker = folder / "safety_checker" / "model.safetensors"
    if checker.is_file():
        _default_to_fp32(checker.with_name("config.json"))
        _add_clip_prefix(checker, "vision_model.", within="vision_model.")
    add_vocabularies(folder)
    remove_local_names(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def add_vocabularies(folder: Path) -> None:
    """Write vocab.json and merges.txt next to each tokenizer.json: transformers 4 reads them, version 5 writes neither."""
    for path in folder.glob("tokenizer*/tokenizer.json"):
        model = parse_json(path.read_text(encoding="utf-8"))["model"]
        if path.with_name("vocab.json").exists() or model["type"] != "BPE":
            continue
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        path.with_name("vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        path.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def remove_local_names(folder: Path) -> None:
    """Remove the folders that models were loaded from, which the libraries record in the configs."""
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        values = parse_json(text) if '"_name_or_path"' in text else None
        if isinstance(values, dict) and is_local(str(values.pop("_name_or_path", "a/b"))):
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _default_to_fp32(config: Path) -> None:
    """Make transformers 5 load fp32 by default, as diffusers does for the other parts."""
    values = parse_json(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _add_clip_prefix(path: Path, prefix: str = "text_model.", within: str = "") -> None:
    """Restore the prefix of CLIP's keys that transformers >= 5.6 leaves out.

    Without it, transformers 4 initializes the model with random weights.

    Args:
        path: The model's file.
        prefix: The prefix that version 4 expects.
        within: The prefix of the CLIP model's keys in another model, such as a safety checker.
    """
    tensors = load_file(path)
    if not any(key.startswith(within + prefix) for key in tensors):
        bare = {key for key in tensors if key.startswith(within) and not key.startswith("text_projection")}
        named = {within + prefix + key.removeprefix(within) if key in bare else key: v for key, v in tensors.items()}
        partial = path.with_suffix(".partial")  # the tensors are mapped from the file, which must not be overwritten
        save_file(named, partial, metadata={"format": "pt"})
        partial.replace(path)
