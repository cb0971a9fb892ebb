"""LoRA files beyond plain LoRA: each kind changes the weights by its definition, and what is not known is refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d

from lcmdistill.report.info import describe
from lcmdistill.sampling.generate import load_student
from lcmdistill.teachers.lora.files import load_lora
from lcmdistill.teachers.lora.kinds import kinds_of
from lcmdistill.teachers.single_file.sd_keys import original_key, unet_places
from lcmdistill.utils.errors import UsageError
from tests.support.lycoris import ALPHA, LAYERS, RANK, TEXT, layers_of, lycoris_file, normal
from tests.support.models import BUILDERS, opened

SCALE = ALPHA / RANK


def blocks(first: Tensor, second: Tensor) -> Tensor:
    """A Kronecker product, block by block."""
    return torch.cat([torch.cat([value * second for value in row], 1) for row in first])


def low_rank(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return sum((a[:, r, None] * b[None, r] for r in range(len(b))), torch.zeros(())).reshape(weight.shape)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The kernel that acts as 1x1 (b), core, 1x1 (a), read off from single pixels."""
    size, inputs = core.shape[-1], b.shape[1]
    x = torch.zeros(inputs, inputs, size, size)
    kernels = []
    for row in range(size):
        for column in range(size):
            x.zero_()
            x[range(inputs), range(inputs), row, column] = 1.0
            y = conv2d(conv2d(conv2d(x, b[:, :, None, None]), core), a.T[:, :, None, None])
            kernels.append(y[:, :, 0, 0].T)
    return torch.stack(kernels, -1).reshape(a.shape[1], inputs, size, size)


def expected(kind: str, layer: dict[str, Tensor], weight: Tensor) -> Tensor:
    """A layer's new weight by the definition of its kind, in another form than the code's."""
    if kind == "norm":
        return weight + layer["w_norm"]
    if kind == "full":
        return weight + layer["diff"]
    if kind.startswith("LoHa"):
        if kind == "LoHa Tucker":
            # Its core has the outputs first.
            halves = [tucker(layer[f"hada_t{i}"], layer[f"hada_w{i}_a"], layer[f"hada_w{i}_b"]) for i in (1, 2)]
        else:
            halves = [low_rank(layer[f"hada_w{i}_a"], layer[f"hada_w{i}_b"], weight) for i in (1, 2)]
        return weight + SCALE * halves[0] * halves[1]
    if kind.startswith("LoKr"):
        first = layer["lokr_w1"] if "lokr_w1" in layer else layer["lokr_w1_a"] @ layer["lokr_w1_b"]
        if kind == "LoKr Tucker":
            second = tucker(layer["lokr_t2"], layer["lokr_w2_a"], layer["lokr_w2_b"])
        else:
            second = layer["lokr_w2"] if "lokr_w2" in layer else layer["lokr_w2_a"] @ layer["lokr_w2_b"]
        return weight + (1.0 if kind == "LoKr full" else SCALE) * blocks(first, second).reshape(weight.shape)
    up, down = layer["lora_up.weight"].flatten(1), layer["lora_down.weight"].flatten(1)
    if kind == "Tucker":
        return weight + SCALE * tucker(layer["lora_mid.weight"], up.T, down)
    merged = weight + SCALE * low_rank(up, down, weight)
    rows = [
        row / row.square().sum().sqrt() * size for row, size in zip(merged, layer["dora_scale"].flatten(), strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("scale", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_each_kind_changes_the_weights_by_its_definition(
    kind: str, scale: float, small_teacher: Path, tmp_path: Path
) -> None:
    before, pipeline = opened(small_teacher).unet, opened(small_teacher)
    file = lycoris_file(before, kind)
    save_file(file, tmp_path / "it.safetensors")
    assert load_lora(pipeline, str(tmp_path / "it.safetensors"), "it", scale) is False
    after, changed = dict(pipeline.unet.named_modules()), layers_of(before, LAYERS[kind][1])
    assert len(changed) > 2
    for path, module in before.named_modules():
        for name, value in module.named_parameters(recurse=False):
            wanted = value
            if path in changed:
                stem = f"lora_unet_{path.replace('.', '_')}."
                layer = {key.removeprefix(stem): each for key, each in file.items() if key.startswith(stem)}
                bias = layer.get("b_norm", layer.get("diff_b", torch.zeros(1)))
                whole = expected(kind, layer, value) if name == "weight" else value + bias
                wanted = value + scale * (whole - value)
            torch.testing.assert_close(getattr(after[path], name), wanted, atol=1e-5, rtol=1e-5)


def test_text_encoders_and_plain_layers_of_a_mixed_file_are_merged(small_teacher: Path, tmp_path: Path) -> None:
    pipeline, before = opened(small_teacher), opened(small_teacher)
    draw, file = normal(5), lycoris_file(pipeline.unet, "LoHa")
    for i, (path, module) in enumerate(pipeline.text_encoder.named_modules()):
        if isinstance(module, torch.nn.Linear):
            stem = f"lora_te_text_model_{path.removeprefix('text_model.').replace('.', '_')}"
            make = list(TEXT.values())[i % len(TEXT)]
            file |= {f"{stem}.{end}": value for end, value in make(draw, module.weight.detach()).items()}
    save_file(file, tmp_path / "it.safetensors")
    load_lora(pipeline, str(tmp_path / "it.safetensors"), "it")
    changed = [
        not torch.equal(a.weight, b.weight)
        for (_, a), (_, b) in zip(
            pipeline.text_encoder.named_modules(), before.text_encoder.named_modules(), strict=True
        )
        if isinstance(a, torch.nn.Linear)
    ]
    assert all(changed)
    assert len(changed) == 6


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_names_of_the_original_layout_and_of_lycoris_are_known(family: str, tmp_path: Path) -> None:
    folder = BUILDERS[family](tmp_path / "base")
    unet = opened(folder).unet
    places = unet_places(unet.config)
    file, renamed = lycoris_file(unet, "LoKr"), {}
    for path in layers_of(unet, torch.nn.Linear):
        original = original_key(f"{path}.weight", places)
        assert original is not None
        stem, other = (name.replace(".", "_") for name in (path, original.removesuffix(".weight")))
        renamed |= {
            key.replace(f"lora_unet_{stem}.", f"lora_unet_{other}."): value
            for key, value in file.items()
            if key.startswith(f"lora_unet_{stem}.")
        }
    native = {key.replace("lora_unet_", "lycoris_"): value for key, value in file.items()}
    states = []
    for i, each in enumerate((file, renamed, native)):
        save_file(each, tmp_path / f"{i}.safetensors")
        pipeline = opened(folder)
        load_lora(pipeline, str(tmp_path / f"{i}.safetensors"), "it")
        states.append(pipeline.unet.state_dict())
    assert len(file) == len(renamed)
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())


Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda file: {**file, "lora_unet_x.oft_blocks": torch.ones(1)},
            r"1 tensors of a kind .*oft_blocks; supported",
        ),
        (lambda file: {**file, "bundle_emb.a": torch.ones(1)}, r"1 tensors of a kind .*bundle_emb"),
        (
            lambda file: {**file, "lora_unet_absent.w_norm": torch.ones(4)},
            "1 of its layers are absent",
        ),
        (
            lambda file: {key: value[:-1] if "w1_a" in key else value for key, value in file.items()},
            "tensors of other shapes",
        ),
        (lambda file: {key: value for key, value in file.items() if "w2_b" not in key}, "lacks its .*w2_b"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_changes_nothing(
    edit: Edit, message: str, small_teacher: Path, tmp_path: Path
) -> None:
    pipeline = opened(small_teacher)
    save_file(edit(lycoris_file(pipeline.unet, "LoHa")), tmp_path / "it.safetensors")
    with pytest.raises(UsageError, match=message):
        load_lora(pipeline, str(tmp_path / "it.safetensors"), "it")
    before = opened(small_teacher).unet.state_dict()
    assert all(torch.equal(before[key], value) for key, value in pipeline.unet.state_dict().items())


def test_a_merged_file_and_an_adapter_act_together(small_teacher: Path, tmp_path: Path) -> None:
    """The merged one changes the adapted layers too, whichever comes first."""
    unet = opened(small_teacher).unet
    save_file(lycoris_file(unet, "LoHa"), tmp_path / "loha.safetensors")
    plain = {}
    for stem in {key.partition(".")[0] for key in lycoris_file(unet, "LoHa")}:
        module = next(m for p, m in unet.named_modules() if p.replace(".", "_") == stem.removeprefix("lora_unet_"))
        plain |= {f"{stem}.lora_down.weight": torch.ones(1, module.in_features)}
        plain |= {f"{stem}.lora_up.weight": torch.ones(module.out_features, 1)}
    save_file(plain, tmp_path / "plain.safetensors")
    both = [str(tmp_path / "loha.safetensors"), str(tmp_path / "plain.safetensors")]
    z, t, c = torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 77, 16)
    outputs = []
    for order in (both, both[::-1]):
        pipeline = load_student(str(small_teacher), torch.device("cpu"), loras=order, scales=[0.5, 0.5])
        with torch.no_grad():
            outputs.append(pipeline.unet(z, t, c).sample)
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("kind", list(LAYERS))
def test_info_names_every_kind(kind: str, small_teacher: Path, tmp_path: Path) -> None:
    file = lycoris_file(opened(small_teacher).unet, kind)
    save_file(file, tmp_path / "it.safetensors")
    rows = dict(describe(str(tmp_path / "it.safetensors")))
    (named,) = kinds_of(file)
    assert rows["type"].startswith(
        f"LoRA, {named}, kohya keys, on {len(layers_of(opened(small_teacher).unet, LAYERS[kind][1]))}"
    )


def test_a_text_encoder_s_lora_is_loaded_without_a_table(
    small_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline, file = opened(small_teacher), dict[str, Tensor]()
    for path, module in pipeline.text_encoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            stem = f"lora_te_text_model_{path.removeprefix('text_model.').replace('.', '_')}"
            file[f"{stem}.lora_down.weight"] = torch.ones(1, module.in_features)
            file[f"{stem}.lora_up.weight"] = torch.ones(module.out_features, 1)
    save_file(file, tmp_path / "it.safetensors")
    logger: Any = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    load_lora(pipeline, str(tmp_path / "it.safetensors"), "it")
    logger.removeHandler(caplog.handler)
    assert "MISSING" not in caplog.text + "".join(capsys.readouterr())
