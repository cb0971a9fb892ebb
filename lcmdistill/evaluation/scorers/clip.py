"""The CLIP score (Hessel et al. 2021): the cosine between an image and its prompt, times 100.

Shapes: B images, F features.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcmdistill.evaluation.metrics.resize import clip_pixels, lanczos_square
from lcmdistill.evaluation.scorers.base import ScoreFunction, Scorer, local_folder
from lcmdistill.teachers.folders import check_kernels
from lcmdistill.utils.errors import UsageError

DMD2_PREFIX = "A photo depicts "
"what the DMD2 evaluation writes before each prompt, as Hessel et al. do"

DMD2_SIDE = 256
"the side in pixels to which the DMD2 evaluation reduces images first"


@dataclass(frozen=True)
class Clip:
    """A CLIP model with what turns images and prompts into its inputs.

    Attributes:
        model: A transformers CLIPModel.
        tokenizer: Its tokenizer.
        pixels: uint8 images to its pixel values.
    """

    model: Any
    tokenizer: Any
    pixels: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Return the images' embeddings of length 1, (B, F)."""
        pixels = self.pixels(images).to(self.model.device)
        embedding = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return nn.functional.normalize(embedding)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return the prompts' embeddings of length 1, (B, F). Prompts are truncated to the model's positions."""
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.model.device)
        output = self.model.text_model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        return nn.functional.normalize(self.model.text_projection(output.pooler_output))

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its prompt, (B,)."""
        return (self.image_features(images) * self.text_features(prompts)).sum(1)


def load_clip(word: str, device: torch.device, scorer: str, weights: str) -> Clip:
    """Load a CLIPModel of transformers.

    A folder without a tokenizer gets CLIP's own, which is bundled, and one without an image processor CLIP's preprocessing.

    Args:
        word: A folder or a cached hub id.
        device: The device of the model.
        scorer: The scorer's key, for error messages.
        weights: What to pass, for error messages.

    Raises:
        UsageError: It is not a CLIP model.
        RunError: It is neither a folder nor in the local cache.
    """
    from transformers import CLIPModel, CLIPProcessor

    loader: Any = CLIPModel
    if Path(word).suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        raise UsageError(f"--scorer {scorer}={word} is a file without a model description; pass {weights}")
    folder = local_folder(word, scorer, weights)
    try:
        check_kernels(folder / "config.json", loader.config_class.get_config_dict(folder, local_files_only=True)[0])
        model, report = loader.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"--scorer {scorer}={word} holds no CLIP model; pass {weights}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
    if type(model.config).model_type != "clip" or missing:
        what = f"lacks {len(missing)} weights of a CLIP model, such as {missing[0]}" if missing else "is another model"
        raise UsageError(f"--scorer {scorer}={word} {what}; pass {weights}")
    model = model.float().eval().requires_grad_(False).to(device)
    has = {path.name for path in folder.iterdir()}
    if not (has & {"preprocessor_config.json", "processor_config.json"} and has & {"tokenizer.json", "vocab.json"}):
        return Clip(model, clip_tokenizer(), plain_pixels(model))
    processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)

    def pixels(images: Tensor) -> Tensor:
        arrays = [image.permute(1, 2, 0).numpy() for image in images]
        return processor.image_processor(images=arrays, return_tensors="pt")["pixel_values"]

    return Clip(model, processor.tokenizer, pixels)


def plain_pixels(model: Any, *, pad: bool = False) -> Callable[[Tensor], Tensor]:
    """Return CLIP's own preprocessing at a model's image size; pad: see `clip_pixels`."""
    return lambda images: clip_pixels(images, model.config.vision_config.image_size, pad=pad)


def clip_tokenizer() -> Any:
    """Return CLIP's own tokenizer, which needs no download."""
    from transformers import CLIPTokenizer

    from lcmdistill.teachers.single_file.load import write_clip_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(Path(folder))
        return CLIPTokenizer.from_pretrained(folder)


CLIP_WEIGHTS = "the folder or hub id of a transformers CLIPModel, such as openai/clip-vit-base-patch16"


def _load(word: str, device: torch.device) -> ScoreFunction:
    clip = load_clip(word, device, "clip", CLIP_WEIGHTS)
    return lambda images, prompts: 100 * clip.cosine(images, prompts)


def _load_dmd2(word: str, device: torch.device) -> ScoreFunction:
    clip = load_clip(word, device, "clip_dmd2", CLIP_DMD2.weights)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * clip.cosine(lanczos_square(images, DMD2_SIDE), [f"{DMD2_PREFIX}{prompt}" for prompt in prompts])

    return score


CLIP = Scorer(
    key="clip",
    label="CLIP score",
    description="Agreement between the image and its prompt: 100 times the cosine of their embeddings.",
    measured_on="CLIP's features of the image and of the prompt",
    limits="It sees 224 px and 77 tokens, counts and places objects poorly, and differs between CLIP models.",
    weights=CLIP_WEIGHTS,
    load=_load,
)

CLIP_DMD2 = Scorer(
    key="clip_dmd2",
    label="CLIP score (DMD2)",
    description=f"The CLIP score of images reduced to {DMD2_SIDE} px and prompts that start with {DMD2_PREFIX.strip()!r}.",
    measured_on="CLIP's features of the image and of the prompt",
    limits="Comparable with DMD2's tables, there divided by 100, for ViT-g-14 only; it sees 224 px and 77 tokens.",
    weights="the folder or hub id laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    load=_load_dmd2,
)
