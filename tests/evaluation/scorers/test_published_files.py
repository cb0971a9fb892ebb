"""HPSv2, ImageReward and LAION's aesthetic predictors: small random weights under the published files' names.

Each is compared with its published formula, which is written out here on those names, without the code under test.
"""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lcmdistill.evaluation.scorers.base import scorer_metric
from lcmdistill.evaluation.scorers.clip import clip_tokenizer
from lcmdistill.evaluation.scorers.image_reward import networks, split_weights
from lcmdistill.evaluation.scorers.open_clip import config_of, transformers_weights
from lcmdistill.evaluation.scorers.registry import SCORERS
from lcmdistill.utils.errors import RunError, UsageError
from tests.support.scorers import CPU, byte_images, image_pair, random_state, write_clip

State = dict[str, Tensor]

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "green", "apple", "car", "tree"]


def normalized(images: Tensor, side: int) -> Tensor:
    """Square images as CLIP and BLIP take them."""
    arrays = [
        np.asarray(
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC), np.float32
        )
        for image in images
    ]
    return torch.from_numpy(((np.stack(arrays) / 255 - MEAN) / STD).astype(np.float32)).permute(0, 3, 1, 2)


def norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v, for each head."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


# HPSv2: open_clip's CLIP


def open_clip_shapes(
    width: int, vision: int, layers: tuple[int, int], ratio: int, patch: int, places: int, vocabulary: int, out: int
) -> dict[str, tuple[int, ...]]:
    """The keys of open_clip's CLIP, as `open_clip.create_model("ViT-H-14").state_dict()` has them."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, width),
        "text_projection": (width, out),
        "logit_scale": (),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": (places, vision),
        "visual.proj": (vision, out),
        "visual.conv1.weight": (vision, 3, patch, patch),
        "token_embedding.weight": (vocabulary, width),
    }
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{name}.{kind}": (vision if "visual" in name else width,) for kind in ("weight", "bias")}
    for prefix, w, count in (("visual.", vision, layers[0]), ("", width, layers[1])):
        for i in range(count):
            block = f"{prefix}transformer.resblocks.{i}"
            parts = {"attn.out_proj": (w, w), "mlp.c_fc": (ratio * w, w), "mlp.c_proj": (w, ratio * w)}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * w, w), f"{block}.attn.in_proj_bias": (3 * w,)}
            for name, shape in parts.items():
                shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{name}.{kind}": (w,) for kind in ("weight", "bias")}
    return shapes


def transformer(x: Tensor, state: State, prefix: str, heads: int, mask: Tensor | float = 0.0) -> Tensor:
    for i in range(
        len({key for key in state if re.fullmatch(rf"{prefix}transformer\.resblocks\.\d+\.ln_1\.bias", key)})
    ):
        block = f"{prefix}transformer.resblocks.{i}"
        y = norm(x, state, f"{block}.ln_1", 1e-5)
        qkv = F.linear(y, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"])
        x = x + linear(attention(*qkv.chunk(3, -1), heads, mask), state, f"{block}.attn.out_proj")
        y = linear(norm(x, state, f"{block}.ln_2", 1e-5), state, f"{block}.mlp.c_fc")
        x = x + linear(F.gelu(y), state, f"{block}.mlp.c_proj")
    return x


def open_clip_cosine(images: Tensor, prompts: tuple[str, ...], state: State, heads: int) -> Tensor:
    x = F.conv2d(normalized(images, 32), state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = transformer(norm(x, state, "visual.ln_pre", 1e-5), state, "visual.", heads)
    image = norm(x[:, 0], state, "visual.ln_post", 1e-5) @ state["visual.proj"]
    rows = [clip_tokenizer()(prompt).input_ids for prompt in prompts]
    tokens = torch.tensor([row + [0] * (77 - len(row)) for row in rows])  # open_clip pads with zeros
    mask = torch.full((77, 77), -math.inf).triu(1)
    y = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    y = norm(transformer(y, state, "", heads, mask), state, "ln_final", 1e-5)
    text = y[torch.arange(len(y)), tokens.argmax(1)] @ state["text_projection"]
    return F.cosine_similarity(image, text)


@pytest.fixture(scope="module")
def hps_state() -> State:
    return random_state(open_clip_shapes(128, 128, (2, 2), 2, 8, 17, 49408, 24))


@pytest.mark.parametrize("wrapped", [True, False])
def test_hpsv2_is_the_cosine_of_open_clip(hps_state: State, wrapped: bool, tmp_path: Path):
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": hps_state} if wrapped else hps_state, path)
    images = image_pair(3, 48)
    found = scorer_metric(SCORERS["hpsv2"], str(tmp_path if wrapped else path), CPU).per_image(images).view(-1)
    expected = open_clip_cosine(byte_images(images), images.prompts, hps_state, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert found.std() > 1e-3


def test_every_key_of_vit_h_14_has_its_place():
    """The sizes of the published file; the expected config is that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""
    from transformers import CLIPModel

    shapes = open_clip_shapes(1024, 1280, (32, 24), 4, 14, 257, 49408, 1024)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = config_of(state)
    expected_sizes = ((1024, 24, 16, 4096, "gelu"), (1280, 32, 16, 5120, "gelu"))
    for part, expected in zip((config.text_config, config.vision_config), expected_sizes, strict=True):
        sizes = (part.hidden_size, part.num_hidden_layers, part.num_attention_heads, part.intermediate_size)
        assert (*sizes, part.hidden_act) == expected
    assert (config.projection_dim, config.vision_config.image_size, config.vision_config.patch_size) == (1024, 224, 14)
    with torch.device("meta"):
        model = CLIPModel(config)
    weights = transformers_weights(state)
    expected_shapes = {name: value.shape for name, value in model.state_dict().items() if "position_ids" not in name}
    assert {name: value.shape for name, value in weights.items()} == expected_shapes


# ImageReward: BLIP


def blip_shapes(width: int, layers: int, patch: int, places: int, text: int, text_layers: int, words: int, ratio: int):
    """The keys of ImageReward.pt: those of BLIP_Pretrain, and of the head."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, width),
        "visual_encoder.pos_embed": (1, places, width),
        "visual_encoder.patch_embed.proj.weight": (width, 3, patch, patch),
        "visual_encoder.patch_embed.proj.bias": (width,),
        "text_encoder.embeddings.word_embeddings.weight": (words, text),
        "text_encoder.embeddings.position_embeddings.weight": (512, text),
        "vision_proj.weight": (256, width),
        "vision_proj.bias": (256,),
        "text_proj.weight": (256, text),
        "text_proj.bias": (256,),
    }

    def both(name: str, out: int, inputs: int | None = None) -> None:
        shapes[f"{name}.weight"] = (out,) if inputs is None else (out, inputs)
        shapes[f"{name}.bias"] = (out,)

    both("visual_encoder.norm", width)
    both("text_encoder.embeddings.LayerNorm", text)
    for i in range(layers):
        block = f"visual_encoder.blocks.{i}"
        both(f"{block}.norm1", width)
        both(f"{block}.norm2", width)
        both(f"{block}.attn.qkv", 3 * width, width)
        both(f"{block}.attn.proj", width, width)
        both(f"{block}.mlp.fc1", ratio * width, width)
        both(f"{block}.mlp.fc2", width, ratio * width)
    for i in range(text_layers):
        block = f"text_encoder.encoder.layer.{i}"
        for kind, inputs in (("attention", text), ("crossattention", width)):
            both(f"{block}.{kind}.self.query", text, text)
            both(f"{block}.{kind}.self.key", text, inputs)
            both(f"{block}.{kind}.self.value", text, inputs)
            both(f"{block}.{kind}.output.dense", text, text)
            both(f"{block}.{kind}.output.LayerNorm", text)
        both(f"{block}.intermediate.dense", ratio * text, text)
        both(f"{block}.output.dense", text, ratio * text)
        both(f"{block}.output.LayerNorm", text)
    shapes = {f"blip.{name}": shape for name, shape in shapes.items()}
    inputs = text
    for i, out in zip((0, 2, 4, 6, 7), (1024, 128, 64, 16, 1), strict=True):
        both(f"mlp.layers.{i}", out, inputs)
        inputs = out
    return shapes


def reward(images: Tensor, tokens: Tensor, state: State, heads: int, text_heads: int) -> Tensor:
    """The published formula on the published names: BLIP's vision model, MED with the image as encoder, five layers."""
    v = {key.removeprefix("blip.visual_encoder."): value for key, value in state.items()}
    x = F.conv2d(images, v["patch_embed.proj.weight"], v["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([v["cls_token"].expand(len(x), -1, -1), x], 1) + v["pos_embed"]
    for i in range(2):
        qkv = linear(norm(x, v, f"blocks.{i}.norm1", 1e-6), v, f"blocks.{i}.attn.qkv")
        x = x + linear(attention(*qkv.chunk(3, -1), heads), v, f"blocks.{i}.attn.proj")
        y = F.gelu(linear(norm(x, v, f"blocks.{i}.norm2", 1e-6), v, f"blocks.{i}.mlp.fc1"))
        x = x + linear(y, v, f"blocks.{i}.mlp.fc2")
    seen = norm(x, v, "norm", 1e-6)
    t = {key.removeprefix("blip.text_encoder."): value for key, value in state.items()}
    h = t["embeddings.word_embeddings.weight"][tokens] + t["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    h = norm(h, t, "embeddings.LayerNorm", 1e-12)
    mask = torch.zeros(tokens.shape).masked_fill(tokens == 0, -math.inf)[:, None, None]
    for i in range(2):
        block = f"encoder.layer.{i}"
        for kind, source, hidden in (("attention", None, mask), ("crossattention", seen, 0.0)):
            k = h if source is None else source
            q, k, w = (
                linear(h, t, f"{block}.{kind}.self.query"),
                linear(k, t, f"{block}.{kind}.self.key"),
                linear(k, t, f"{block}.{kind}.self.value"),
            )
            y = linear(attention(q, k, w, text_heads, hidden), t, f"{block}.{kind}.output.dense")
            h = norm(h + y, t, f"{block}.{kind}.output.LayerNorm", 1e-12)
        y = linear(F.gelu(linear(h, t, f"{block}.intermediate.dense")), t, f"{block}.output.dense")
        h = norm(h + y, t, f"{block}.output.LayerNorm", 1e-12)
    out = h[:, 0]
    for i in (0, 2, 4, 6, 7):
        out = linear(out, state, f"mlp.layers.{i}")
    return (out.squeeze(1) - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_blip_with_a_head(tmp_path: Path):
    shapes = blip_shapes(128, 2, 8, 17, 192, 2, len(WORDS), 2)
    state = random_state(shapes)
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    images = image_pair(3, 40)._replace(prompts=("a red apple", "a blue car on a tree", "A GREEN tree " * 30))
    found = scorer_metric(SCORERS["imagereward"], str(tmp_path), CPU).per_image(images).view(-1)
    rows = []
    for prompt in images.prompts:
        words = [WORDS.index(word) if word in WORDS else 1 for word in prompt.lower().split()][:33]
        rows.append([2, *words, 3, *[0] * (33 - len(words))])
    expected = reward(normalized(byte_images(images), 32), torch.tensor(rows), state, 2, 3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert found.std() > 1e-3


def test_every_key_of_image_reward_has_its_place():
    """The sizes of BLIP's ViT-L and of med_config.json."""
    shapes = blip_shapes(1024, 24, 16, 197, 768, 12, 30524, 4)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.empty(1, 512, device="meta")
    parts = split_weights(state)
    with torch.device("meta"):
        vision, text = networks(parts)
    for module, part in ((vision, "vision"), (text, "text")):
        own = {name: value.shape for name, value in module.state_dict().items() if "position_ids" not in name}
        assert {name: value.shape for name, value in parts[part].items()} == own
    assert (vision.config.num_attention_heads, vision.config.image_size, vision.config.layer_norm_eps) == (
        16,
        224,
        1e-6,
    )
    assert (text.config.num_attention_heads, text.config.intermediate_size, text.config.hidden_act) == (
        12,
        3072,
        "gelu",
    )


def test_image_reward_needs_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(
        RunError, match=r"needs the tokenizer google-bert/bert-base-uncased; put its vocab\.txt next to Image"
    ):
        scorer_metric(SCORERS["imagereward"], str(tmp_path / "ImageReward.pt"), CPU)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    with pytest.raises(UsageError, match=r"holds no ImageReward model; pass ImageReward\.pt"):
        scorer_metric(SCORERS["imagereward"], str(tmp_path / "ImageReward.pt"), CPU)


# The aesthetic predictors


@pytest.mark.parametrize("version", [1, 2])
def test_the_aesthetic_score_is_a_head_on_clips_image(version: int, tmp_path: Path):
    from transformers import CLIPModel

    write_clip(tmp_path / "clip-vit-large-patch14")
    shapes: dict[str, tuple[int, ...]] = {"weight": (1, 8), "bias": (1,)}
    if version == 2:
        sizes, shapes = (8, 1024, 128, 64, 16, 1), {}
        for i, (inputs, out) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
            shapes |= {f"layers.{i}.weight": (out, inputs), f"layers.{i}.bias": (out,)}
    state = random_state(shapes)
    path = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(state, path)
    images = image_pair(3, 32)
    found = scorer_metric(SCORERS["aesthetic"], str(path), CPU).per_image(images).view(-1)
    model = CLIPModel.from_pretrained(tmp_path / "clip-vit-large-patch14")
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=normalized(byte_images(images), 32)).pooler_output
        out = F.normalize(model.visual_projection(pooled))
    for i in ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7.") if version == 2 else ("",):
        out = F.linear(out, state[f"{i}weight"], state[f"{i}bias"])
    torch.testing.assert_close(found, out.squeeze(1), atol=1e-5, rtol=1e-4)


def test_files_of_other_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.save(
        {f"layers.{i}.{kind}": torch.zeros(1, 1) for i in (0, 3, 6, 9, 11) for kind in ("weight", "bias")},
        tmp_path / "relu",
    )
    with pytest.raises(UsageError, match="is not one of LAION's linear heads"):
        scorer_metric(SCORERS["aesthetic"], str(tmp_path / "relu"), CPU)
    torch.save({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(RunError, match=r"needs openai/clip-vit-large-patch14; put its folder next to head\.pth"):
        scorer_metric(SCORERS["aesthetic"], str(tmp_path / "head.pth"), CPU)
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="holds no open_clip model"):
        scorer_metric(SCORERS["hpsv2"], str(tmp_path / "x.pt"), CPU)
    with pytest.raises(UsageError, match=r"holds none of HPS_v2\.1_compressed\.pt, HPS_v2_compressed\.pt"):
        scorer_metric(SCORERS["hpsv2"], str(tmp_path), CPU)
    state = random_state(open_clip_shapes(64, 64, (1, 1), 1, 8, 17, 100, 8))
    torch.save(state | {"visual.extra": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(UsageError, match=r'other weights than the published model: Unexpected key.*"visual\.extra"'):
        scorer_metric(SCORERS["hpsv2"], str(tmp_path / "more.pt"), CPU)


class Payload:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_no_pickle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, scorer in {"HPS_v2.1_compressed.pt": "hpsv2", "head.pth": "aesthetic"}.items():
        torch.save({"state_dict": Payload()}, tmp_path / name)
        with pytest.raises(UsageError, match="cannot be read as tensors only, and pickled code is not executed"):
            scorer_metric(SCORERS[scorer], str(tmp_path / name), CPU)
    assert not (tmp_path / "executed").exists()
