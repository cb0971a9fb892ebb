"""Exports of a trained student. EXPORTERS is the one place that lists the formats."""

from lcmdistill.utils.registry import LazyRegistry

EXPORTERS = LazyRegistry(
    {
        "pipeline": "lcmdistill.export.diffusers_pipeline:PIPELINE",
        "fused": "lcmdistill.export.diffusers_pipeline:FUSED",
        "kohya": "lcmdistill.export.lora_formats:KOHYA",
        "diffusers-lora": "lcmdistill.export.lora_formats:DIFFUSERS",
        "peft": "lcmdistill.export.lora_formats:PEFT",
        "single-file": "lcmdistill.export.single_file:SINGLE_FILE",
        "onnx": "lcmdistill.export.onnx:ONNX",
    }
)
