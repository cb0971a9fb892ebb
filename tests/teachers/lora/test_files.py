"""Other people's LoRA files: text encoders' layers, peft's patterns and scales, and what is refused rather than lost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcmdistill.export.verify import difference, network_inputs, network_output
from lcmdistill.teachers.loading import load_pipeline
from lcmdistill.teachers.lora.adapters import lora_layers
from lcmdistill.teachers.lora.checks import check_fit, known_prefixes
from lcmdistill.teachers.lora.files import load_lora, lora_weights_file, read_kohya_form
from lcmdistill.teachers.lora.kinds import flat_path
from lcmdistill.teachers.lora.lycoris import split_layers
from lcmdistill.teachers.registry import FAMILIES
from lcmdistill.utils.errors import UsageError
from tests.support.lora_files import ENCODERS, WRITERS, Key, kohya, outputs, peft_folder, styled
from tests.support.models import BUILDERS, opened


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{family: the folder of a small random pipeline}."""
    return {family: BUILDERS[family](tmp_path_factory.mktemp(family) / "base") for family in ("sd1", "sdxl")}


@pytest.mark.parametrize("write", WRITERS)
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
    with pytest.raises(UsageError, match=f"{len(file) // 3} of its layers are absent"):
        load_lora(sd1, str(tmp_path / "style.safetensors"), "style")
    wide = {key: torch.cat([value] * 2, -1) if "down" in key else value for key, value in file.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UsageError, match=f"0 of its layers are absent and {len(file) // 3} have another width"):
        load_lora(xl, str(tmp_path / "wide.safetensors"), "style")


SDXL_LAYERS = {
    "add_embedding_linear_1": "label_emb_0_0",
    "time_embedding_linear_2": "time_embed_2",
    "down_blocks_1_resnets_0_conv1": "input_blocks_4_0_in_layers_2",
    "down_blocks_2_attentions_1_transformer_blocks_1_ff_net_2": "input_blocks_8_1_transformer_blocks_1_ff_net_2",
    "up_blocks_0_attentions_2_proj_in": "output_blocks_2_1_proj_in",
}
"layers of a U-Net of SDXL under kohya's names: diffusers' paths, and those of the original layout"


@pytest.mark.parametrize("is_original", [False, True], ids=["paths", "original"])
def test_every_layer_of_a_kohya_file_becomes_an_adapter(
    is_original: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    """diffusers' own converter loses some of them without a word."""
    pipeline, tensors = opened(bases["sdxl"]), {}
    modules = {flat_path(path): (path, module) for path, module in pipeline.unet.named_modules()}
    for name, original in SDXL_LAYERS.items():
        weight, stem = modules[name][1].weight, f"lora_unet_{original if is_original else name}"
        tensors[f"{stem}.lora_down.weight"] = torch.ones(2, *weight.shape[1:])
        tensors[f"{stem}.lora_up.weight"] = torch.ones(len(weight), 2, *[1] * (weight.ndim - 2))
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "style.safetensors")
    assert load_lora(pipeline, str(tmp_path / "style.safetensors"), "style")
    adapted = {
        path: float(layer.get_delta_weight("style").detach().mean())
        for path, layer in lora_layers(pipeline.unet).items()
    }
    assert adapted == {modules[name][0]: 1.0 for name in SDXL_LAYERS}


def test_original_names_of_absent_layers_are_refused_and_prefixes_of_sdxl_are_known(bases: dict[str, Path]) -> None:
    sd1, xl = opened(bases["sd1"]), opened(bases["sdxl"])
    matrices = {".lora_down.weight": torch.ones(2, 16), ".lora_up.weight": torch.ones(16, 2)}

    def check(pipeline: Any, family: str, stem: str) -> None:
        check_fit(
            pipeline, FAMILIES[family], {f"{stem}{end}": value for end, value in matrices.items()}, "a.safetensors"
        )

    # SSD-1B and Vega lack such blocks of SDXL, whose files have these names.
    for pipeline, family in ((xl, "sdxl"), (sd1, "sd")):
        with pytest.raises(
            UsageError, match="1 of its layers are absent and 0 have another width, such as lora_unet_inp"
        ):
            check(pipeline, family, "lora_unet_input_blocks_4_1_transformer_blocks_9_attn1_to_q")
    stem = "text_model_encoder_layers_0_self_attn_q_proj"
    check(sd1, "sd", f"lora_te1_{stem}")
    weights = {f"lora_te1_{stem}{end}": value for end, value in matrices.items()}
    (_, target, _), *rest = split_layers(sd1, known_prefixes(FAMILIES["sd"]), weights, "a.safetensors")
    assert (target.part, rest) == ("text_encoder", [])
    twice = weights | {f"lora_te_{stem}{end}": value for end, value in matrices.items()}
    with pytest.raises(UsageError, match="holds a layer twice, under two names"):
        split_layers(sd1, known_prefixes(FAMILIES["sd"]), twice, "a.safetensors")


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
    ("settings", "message"),
    [({"modules_to_save": ["conv_out"]}, "conv_out")],
)
def test_what_would_be_lost_of_a_peft_adapter_is_refused(
    settings: dict[str, Any], message: str, small_teacher: Path, tmp_path: Path
) -> None:
    peft_folder(tmp_path / "adapter", opened(small_teacher), r=4, lora_alpha=3, **settings)
    with pytest.raises(UsageError, match=f"holds more than plain LoRA layers, such as .*{message}"):
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


def test_alphas_next_to_diffusers_keys_are_applied(small_teacher: Path, tmp_path: Path) -> None:
    expected, loaded = opened(small_teacher), opened(small_teacher)
    file = styled(expected, ["unet"], kohya)  # which puts its update into the pipeline, too
    ends = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}
    paths = {flat_path(path): path for path, _ in loaded.unet.named_modules()}
    renamed = {}
    for key, value in file.items():
        stem, _, end = key.partition(".")
        renamed[f"unet.{paths[stem.removeprefix('lora_unet_')]}.{ends[end]}"] = value
    save_file(renamed, tmp_path / "style.safetensors")
    load_lora(loaded, str(tmp_path / "style.safetensors"), "style")
    assert difference(outputs(loaded)["unet"], outputs(expected)["unet"]) < 1e-4


def test_the_lora_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "lora").mkdir(parents=True)
    (tmp_path / "run" / "lora" / "run.safetensors").touch()
    with pytest.raises(UsageError, match=r"run is a run; pass the LoRA in it: .*run/lora$"):
        lora_weights_file(str(tmp_path / "run"), "--lora run")


def test_an_empty_layer_is_refused(small_teacher: Path, tmp_path: Path) -> None:
    file = styled(opened(small_teacher), ["unet"], kohya)
    down = next(key for key in file if "lora_down" in key)
    up = down.replace("lora_down", "lora_up")
    file |= {down: file[down][:0], up: file[up][:, :0].contiguous()}
    save_file(file, tmp_path / "empty.safetensors")
    with pytest.raises(UsageError, match=r"is damaged: \w+\.lora_(down|up)\.weight is empty"):
        load_lora(opened(small_teacher), str(tmp_path / "empty.safetensors"), "it")


@pytest.mark.parametrize("settings", ["{", "[1]", "[" * 50_000])
def test_damaged_adapter_settings_are_refused(settings: str, small_teacher: Path, tmp_path: Path) -> None:
    pipeline = opened(small_teacher)
    save_file(styled(pipeline, ["unet"], kohya), tmp_path / "a.safetensors", {"lora_adapter_metadata": settings})
    with pytest.raises(UsageError, match="adapter settings in its header"):
        read_kohya_form(pipeline, str(tmp_path / "a.safetensors"), "--teacher-lora a")


def test_a_file_that_is_not_finite_is_refused(small_teacher: Path, tmp_path: Path) -> None:
    file = styled(opened(small_teacher), ["unet"], kohya)
    broken = sorted(file)[3]
    file[broken] = file[broken] * float("nan")
    save_file(file, tmp_path / "nan.safetensors")
    with pytest.raises(UsageError, match=rf"not finite, such as {broken}, and would give black images"):
        load_lora(opened(small_teacher), str(tmp_path / "nan.safetensors"), "it")


def test_weights_that_overflow_with_a_lora_are_refused(small_teacher: Path, tmp_path: Path) -> None:
    file = styled(opened(small_teacher), ["unet"], kohya)
    save_file({key: value * 0 + 3e38 for key, value in file.items()}, tmp_path / "huge.safetensors")
    with pytest.raises(UsageError, match=r"the weights of its unet overflow with --teacher-lora .*huge"):
        load_pipeline(str(small_teacher), loras=[str(tmp_path / "huge.safetensors")])


def test_eight_bit_weights_are_read(small_teacher: Path, tmp_path: Path) -> None:
    file = styled(opened(small_teacher), ["unet"], kohya)
    small = {key: value.to(torch.float8_e4m3fn) if value.ndim > 1 else value for key, value in file.items()}
    save_file(small, tmp_path / "small.safetensors")
    save_file({key: value.half() for key, value in small.items()}, tmp_path / "half.safetensors")
    found = []
    for name in ("small", "half"):
        pipeline = opened(small_teacher)
        load_lora(pipeline, str(tmp_path / f"{name}.safetensors"), "it")
        found.append(outputs(pipeline)["unet"])
    assert difference(found[0], found[1]) == 0
    assert difference(found[0], outputs(opened(small_teacher))["unet"]) > 0.05


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
    [("oft_blocks", " of OFT"), ("on_input", r" of \(IA\)\^3")],
)
def test_tensors_beyond_a_plain_lora_are_refused_by_name(
    suffix: str, kind: str, small_teacher: Path, tmp_path: Path
) -> None:
    file = styled(opened(small_teacher), ["unet"], kohya)
    stem = next(iter(file)).removesuffix(".lora_down.weight")
    save_file({**file, f"{stem}.{suffix}": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=rf"holds 1 tensors{kind} beyond plain LoRA layers, such as {stem}\.{suffix}"):
        load_lora(opened(small_teacher), str(tmp_path / "other.safetensors"), "it")
