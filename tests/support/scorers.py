"""Small random models in the formats in which scorers are published."""

from pathlib import Path

import torch
from torch import Tensor

from lcmdistill.evaluation.metrics.base import ImagePair
from tests.support.teachers import write_tokenizer

CPU = torch.device("cpu")


def image_pair(count: int = 3, side: int = 64) -> ImagePair:
    """Random images with three prompts."""
    a, b = (torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    latents = torch.zeros(count, 4, 8, 8)
    return ImagePair(latents, a, latents, b, ("a red apple", "a blue car", "a green tree")[:count])


def byte_images(pair: ImagePair) -> Tensor:
    """The images of a pair as uint8."""
    return (pair.pixels * 255).round().byte()


def small_clip(width: int = 16, vocabulary: int = 190, projection: int = 8):
    """A small random CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    text = {**small, "vocab_size": vocabulary, "max_position_embeddings": 77, **ends}
    vision = {**small, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
    return model.eval()


def write_clip(folder: Path) -> Path:
    """A small random CLIP with its processor, as transformers saves one."""
    import transformers
    from transformers import CLIPProcessor, CLIPTokenizer

    # The names of version 5 and of version 4.
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    write_tokenizer(folder.parent / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / "tokenizer", model_max_length=77)
    images = processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    small_clip().save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of given shapes, with the scales of a trained network; biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        scale = 0.3 if len(shape) < 2 else shape[-1] ** -0.5
        state[name] = scale * torch.randn(shape, generator=generator)
        if len(shape) == 1 and name.endswith("weight"):
            state[name] += 1  # of a norm
    return state
