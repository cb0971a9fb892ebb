"""Recognize files that are neither checkpoints nor LoRAs, by the names of their tensors or their first bytes.

Nothing here loads weights or opens a pickle.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"{name: (dtype, shape)}, as in a safetensors file's header"

MOST_EMBEDDINGS = 3
"the number of tensors in a textual inversion: one per text encoder"

MOST_TOKENS = 128
"the number of vectors in one of its tensors"

EMBEDDING_WIDTHS = (768, 1024, 1280, 4096)
"the widths of CLIP's and T5's embeddings"

PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02")
"the first bytes of torch.save: a zip archive, or a bare pickle before version 1.6"

IN_OTHER_PROGRAMS = "cannot be used here; use it in ComfyUI, A1111 or diffusers"

OTHER_MODEL = "cannot be used as a file; supported are files of Stable Diffusion 1, 2, XL and 3, and diffusers folders"


@dataclass(frozen=True)
class OtherFile:
    """What a file is.

    Attributes:
        title: Its kind.
        use: What it can be used for here, or that it cannot be used.
    """

    title: str
    use: str

    @property
    def text(self) -> str:
        """The end of a sentence that begins with the file's name."""
        return f"is {'an' if self.title[0] in 'AEIOUu' else 'a'} {self.title}; {self.use}"


MARKS = (
    (
        ("control_model.", "controlnet_", "lora_controlnet", "input_hint_block.", "zero_convs."),
        "ControlNet",
        IN_OTHER_PROGRAMS,
    ),
    (("ip_adapter.", "image_proj."), "IP-Adapter", IN_OTHER_PROGRAMS),
    (
        ("model_ema.diffusion_model",),
        "checkpoint with the EMA copy of its network only",
        "cannot be used here; use the file with the weights themselves, or save it with the EMA weights in their place",
    ),
    (("adapter.body.", "body.0.block1."), "T2I-Adapter", IN_OTHER_PROGRAMS),
    (
        ("model.1.sub.0.RDB1.", "body.0.rdb1.", "conv_first.", "layers.0.residual_group.", "model.0.weight"),
        "upscaler of finished images (ESRGAN, SwinIR or the like)",
        "cannot be used here; use it in ComfyUI or A1111",
    ),
    (("vision_model.", "visual.", "cond_stage_model.visual."), "CLIP image encoder", IN_OTHER_PROGRAMS),
    (
        ("encoder.block.0.layer.0.SelfAttention.", "shared.weight"),
        "T5 text encoder",
        "cannot be used as a file; pass a diffusers folder of Stable Diffusion 3 with its T5 as --teacher or --base",
    ),
    (
        ("text_model.", "transformer.text_model.", "transformer.resblocks.", "encoder.layers.0.self_attn."),
        "CLIP text encoder",
        "pass it as --text-encoder to distill and distill-lora",
    ),
    (
        ("cond_stage_model.", "conditioner.embedders."),
        "text encoder of a checkpoint",
        "pass it as --text-encoder to distill and distill-lora",
    ),
    (("taesd_decoder.", "taesd_encoder."), "TAESD (small VAE for previews)", IN_OTHER_PROGRAMS),
    (
        ("first_stage_model.", "decoder.conv_in.", "decoder.up_blocks.", "encoder.conv_in."),
        "VAE",
        "pass it as --vae to distill and distill-lora",
    ),
    (("double_blocks.", "model.diffusion_model.double_blocks."), "FLUX transformer", OTHER_MODEL),
    (
        ("transformer_blocks.", "single_transformer_blocks."),
        "transformer with diffusers' keys",
        "cannot be used as a file; pass its diffusers folder as --teacher",
    ),
    (("blocks.0.", "model.diffusion_model."), "network of another kind of model", OTHER_MODEL),
)
"the starts of keys, any of which marks a kind; the first kind that matches counts"

FIRST = ("ControlNet", "IP-Adapter", "T2I-Adapter")
"the kinds whose files may hold layers that look like a LoRA"


def image_adapter(tensors: Tensors) -> OtherFile | None:
    """Return what a file is whose layers may look like those of a LoRA; None for others."""
    found = other_file(tensors)
    return found if found and found.title in FIRST else None


def other_file(tensors: Tensors) -> OtherFile | None:
    """Return what a safetensors file is that is neither a checkpoint nor a LoRA; None for an unknown one."""
    for starts, title, use in MARKS:
        if any(name.startswith(starts) for name in tensors):
            return OtherFile(title, use)
    return OtherFile("textual inversion (an embedding)", IN_OTHER_PROGRAMS) if _is_embedding(tensors) else None


def _is_embedding(tensors: Tensors) -> bool:
    shapes = [shape for _, shape in tensors.values()]
    return 0 < len(shapes) <= MOST_EMBEDDINGS and all(
        len(shape) in (1, 2) and shape[-1] in EMBEDDING_WIDTHS and (len(shape) == 1 or shape[0] <= MOST_TOKENS)
        for shape in shapes
    )


def not_safetensors(path: Path) -> OtherFile | None:
    """Return what a file in another format is, by its first bytes; None for an unknown one."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return None
    if start == b"GGUF":
        return OtherFile(
            "GGUF file of quantized weights",
            "cannot be used here; use a .safetensors file in fp32, fp16, bf16 or fp8 of the same model",
        )
    if start.startswith(PICKLE_STARTS):
        return OtherFile(
            "pickle of PyTorch, which was not opened because that can run any code",
            "cannot be used here; use the model's .safetensors file, or convert it in ComfyUI or A1111",
        )
    return None
