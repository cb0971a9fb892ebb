"""Exports of a trained student. EXPORTERS is the one place that lists the formats."""

from lcmdistill.utils.registry import LazyRegistry

EXPORTERS = LazyRegistry(
    {
        "pipeline": "lcmdistill.export.registry:pipeline",
        "fused": "lcmdistill.export.registry:fused",
        "kohya": "lcmdistill.export.registry:kohya",
        "diffusers-lora": "lcmdistill.export.registry:diffusers_lora",
        "peft": "lcmdistill.export.registry:peft",
        "single-file": "lcmdistill.export.registry:single_file",
        "onnx": "lcmdistill.export.registry:onnx",
    }
)
