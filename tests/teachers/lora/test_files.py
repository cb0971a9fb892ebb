"""Other people's LoRA files: text encoders' layers, peft's patterns and scales, and what is refused rather than lost."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lcmdistill.export.verify import difference, network_inputs, network_output
from lcmdistill.teachers.lora.files import load_lora
from lcmdistill.teachers.registry import FAMILIES, family_of
from lcmdistill.utils.errors import UsageError
from tests.support.models import BUILDERS, opened

ALPHA, RANK = 1.5, 2

ENCODERS = {"text_encoder": "lora_te", "text_encoder_2": "lora_te2"}

Key = Callable[[str, str, Tensor, Tensor], dict[str, Tensor]]


def kohya(part: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    stem = f"{'lora_unet' if part == 'unet' else ENCODERS[part]}_{path.replace('.', '_')}"
    return {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": torch.tensor(ALPHA),
    }


def uneven(part: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The same update in other words: another alpha, or another rank, in every other layer; one without alpha."""
    file = kohya(part, path, down, up)
    stem = next(iter(file)).removesuffix(".lora_down.weight")
    if path.endswith(("k", "k_proj")):
        file |= {f"{stem}.lora_up.weight": up / 4, f"{stem}.alpha": torch.tensor(4 * ALPHA)}
    if path.endswith(("v", "v_proj")):
        file |= {f"{stem}.lora_up.weight": torch.cat([up, up], 1), f"{stem}.lora_down.weight": torch.cat([down, down])}
    if path.endswith(("q", "q_proj")):
        file[f"{stem}.lora_up.weight"] = up * (ALPHA / RANK)
        del file[f"{stem}.alpha"]
    return file


def diffusers(part: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Without the metadata that a scale is read from: it is in the weights."""
    stem = f"{part}.{path}"
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up * (ALPHA / RANK)}


def diffusers_2023(part: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """As its scripts wrote LoRAs when peft was new."""
    stem = f"{part}.{path}.{'lora' if part == 'unet' else 'lora_linear_layer'}"
    return {f"{stem}.down.weight": down, f"{stem}.up.weight": up * (ALPHA / RANK)}


def diffusers_processors(part: str, path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """As its scripts wrote LoRAs on attentions before that."""
    if part != "unet":
        return diffusers_2023(part, path, down, up)
    attention, _, name = path.replace(".to_out.0", ".to_out").rpartition(".")
    stem = f"unet.{attention}.processor.{name}_lora"
    return {f"{stem}.down.weight": down, f"{stem}.up.weight": up * (ALPHA / RANK)}


def linears(pipeline: Any, part: str) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that style LoRAs are trained on, under the names that every program gives them."""
    prefix = "" if part == "unet" or hasattr(getattr(pipeline, part), "text_model") else "text_model."
    for path, module in getattr(pipeline, part).named_modules():
        if isinstance(module, nn.Linear) and (part != "unet" or ".attn" in path) and "text_projection" not in path:
            yield prefix + path, module


@torch.no_grad()
def styled(pipeline: Any, parts: list[str], write: Key, seed: int = 0) -> dict[str, Tensor]:
    """A random LoRA's file on parts of a pipeline, which it is merged into here, by hand."""
    generator, file = torch.Generator().manual_seed(seed), {}
    for part in parts:
        for path, module in linears(pipeline, part):
            down = 0.3 * torch.randn(RANK, module.in_features, generator=generator)
            up = 0.3 * torch.randn(module.out_features, RANK, generator=generator)
            module.weight += (ALPHA / RANK) * up @ down
            file |= write(part, path, down, up)
    return file


@torch.no_grad()
def outputs(pipeline: Any) -> dict[str, list[Tensor]]:
    ids = torch.randint(188, (2, 77), generator=torch.Generator().manual_seed(3))
    family, unet = family_of(pipeline), pipeline.unet
    found = {"unet": [network_output(family, unet, network_inputs(family, unet, 1.0))]}
    for name in ENCODERS:
        if getattr(pipeline, name, None) is not None:
            found[name] = [getattr(pipeline, name)(ids).last_hidden_state]
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{family: the folder of a small random pipeline}."""
    return {family: BUILDERS[family](tmp_path_factory.mktemp(family) / "base") for family in ("sd1", "sdxl")}


@pytest.mark.parametrize("write", [kohya, uneven, diffusers, diffusers_2023, diffusers_processors])
@pytest.mark.parametrize("whole", [True, False], ids=["with the U-Net", "text alone"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_encoders_get_their_layers(
    family: str, whole: bool, write: Key, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = bases[family]
    encoders = [name for name in ENCODERS if family == "sdxl" or name == "text_encoder"]
    merged, loaded, bare = opened(folder), opened(folder), outputs(opened(folder))
    save_file(styled(merged, [*(["unet"] if whole else []), *encoders], write), tmp_path / "style.safetensors")
    load_lora(loaded, str(tmp_path / "style.safetensors"), "style")
    expected = outputs(merged)
    for name, values in outputs(loaded).items():
        assert difference(values, expected[name]) < 1e-4, name
        assert (difference(values, bare[name]) > 0.05) == (whole or name != "unet"), name
    loaded.set_adapters(["style"], [0.0])
    assert all(difference(values, bare[name]) < 1e-5 for name, values in outputs(loaded).items())


def test_text_layers_of_another_base_are_refused_with_counts(tmp_path: Path) -> None:
    xl, sd1 = (opened(BUILDERS[family](tmp_path / family)) for family in ("sdxl", "sd1"))
    file = styled(xl, ["text_encoder_2"], kohya)
    save_file(file, tmp_path / "style.safetensors")
    with pytest.raises(UsageError, match=f"{2 * len(file) // 3} of its layers are absent"):
        load_lora(sd1, str(tmp_path / "style.safetensors"), "style")
    wide = {key: torch.cat([value] * 2, -1) if "down" in key else value for key, value in file.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UsageError, match=f"0 of its layers are absent and {len(file) // 3} have another width"):
        load_lora(xl, str(tmp_path / "wide.safetensors"), "style")


def peft_folder(folder: Path, base: Any, **settings: Any) -> Any:
    """An adapter that peft itself made and saved; returns the network with it on."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        adapted: Any = get_peft_model(
            base.unet, LoraConfig(target_modules=["to_q", "to_k", "ff.net.2", "conv1"], **settings)
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    return adapted.get_base_model()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 3},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_q": 2, r"mid_block.*\.to_k": 8}},
        {"r": 4, "lora_alpha": 3, "alpha_pattern": {"to_q": 7, r"mid_block\..*\.conv1": 11}},
        {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_k": 8}, "alpha_pattern": {"to_k": 5}, "use_rslora": True},
    ],
    ids=["plain", "rslora", "ranks", "alphas", "all"],
)
def test_a_peft_adapter_acts_as_it_does_in_peft(settings: dict[str, Any], small_teacher: Path, tmp_path: Path) -> None:
    family = FAMILIES["sd"]
    inputs = network_inputs(family, opened(small_teacher).unet, 1.0)
    adapted = peft_folder(tmp_path / "adapter", opened(small_teacher), **settings)
    expected, loaded = [network_output(family, adapted, inputs)], opened(small_teacher)
    bare = [network_output(family, loaded.unet, inputs)]
    load_lora(loaded, str(tmp_path / "adapter"), "it")
    got = [network_output(family, loaded.unet, inputs)]
    assert difference(got, expected) < 1e-5
    assert difference(got, bare) > 0.05


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["conv_out"]}, "conv_out"),
    ],
)
def test_what_would_be_lost_of_a_peft_adapter_is_refused(
    settings: dict[str, Any], said: str, small_teacher: Path, tmp_path: Path
) -> None:
    peft_folder(tmp_path / "adapter", opened(small_teacher), r=4, lora_alpha=3, **settings)
    with pytest.raises(UsageError, match=f"holds more than plain LoRA layers, such as .*{said}"):
        load_lora(opened(small_teacher), str(tmp_path / "adapter"), "it")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"lora_alpha": null}'])
def test_a_peft_folder_without_a_sound_config_is_refused(text: str, small_teacher: Path, tmp_path: Path) -> None:
    peft_folder(tmp_path / "adapter", opened(small_teacher), r=4, lora_alpha=3)
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(UsageError, match=r"adapter_config\.json is not a peft config with a lora_alpha"):
        load_lora(opened(small_teacher), str(tmp_path / "adapter"), "it")


@pytest.mark.parametrize("lost", ["up", "down"])
def test_a_file_with_half_a_layer_is_refused(lost: str, small_teacher: Path, tmp_path: Path) -> None:
    file = styled(opened(small_teacher), ["unet"], kohya)
    del file[next(key for key in file if f"lora_{lost}" in key)]
    save_file(file, tmp_path / "half.safetensors")
    with pytest.raises(
        UsageError, match="is damaged: 1 of its layers have one matrix instead of two, such as down_blocks_0"
    ):
        load_lora(opened(small_teacher), str(tmp_path / "half.safetensors"), "it")


def test_a_file_that_is_not_finite_is_refused(small_teacher: Path, tmp_path: Path) -> None:
    file = styled(opened(small_teacher), ["unet"], kohya)
    broken = sorted(file)[3]
    file[broken] = file[broken] * float("nan")
    save_file(file, tmp_path / "nan.safetensors")
    with pytest.raises(UsageError, match=rf"not finite, such as {broken}, and would give black images"):
        load_lora(opened(small_teacher), str(tmp_path / "nan.safetensors"), "it")


def test_several_loras_are_put_on_without_a_warning(
    small_teacher: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    save_file(styled(opened(small_teacher), ["unet"], kohya), tmp_path / "a.safetensors")
    pipeline = opened(small_teacher)
    for name in ("a", "b"):
        load_lora(pipeline, str(tmp_path / "a.safetensors"), name)
    assert [str(each.message) for each in recwarn if "peft_config" in str(each.message)] == []


def test_another_kind_of_peft_adapter_is_refused(small_teacher: Path, tmp_path: Path) -> None:
    peft_folder(tmp_path / "adapter", opened(small_teacher), r=4, lora_alpha=3)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LOHA"}))
    with pytest.raises(UsageError, match="LOHA, which is not LoRA"):
        load_lora(opened(small_teacher), str(tmp_path / "adapter"), "it")


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("lora_magnitude_vector", " of DoRA"), ("oft_blocks", " of OFT"), ("on_input", r" of \(IA\)\^3")],
)
def test_tensors_beyond_a_plain_lora_are_refused_by_name(
    suffix: str, kind: str, small_teacher: Path, tmp_path: Path
) -> None:
    file = styled(opened(small_teacher), ["unet"], kohya)
    stem = next(iter(file)).removesuffix(".lora_down.weight")
    save_file({**file, f"{stem}.{suffix}": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=rf"holds 1 tensors{kind} beyond plain LoRA layers, such as {stem}\.{suffix}"):
        load_lora(opened(small_teacher), str(tmp_path / "other.safetensors"), "it")
