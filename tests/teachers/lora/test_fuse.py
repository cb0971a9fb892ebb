"""LoRAs that are fused into a teacher: as diffusers fuses them, in every layout, and as low-rank updates of the plain base."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmdistill.config.lora_words import split_lora, with_loras
from lcmdistill.export.verify import difference, network_inputs, network_output
from lcmdistill.teachers.loading import load_pipeline, load_teacher
from lcmdistill.teachers.lora.adapters import put_lora
from lcmdistill.teachers.lora.files import load_lora
from lcmdistill.teachers.lora.fuse import lora_checksums, low_rank_updates
from lcmdistill.teachers.registry import FAMILIES
from lcmdistill.utils.errors import UsageError
from tests.support.lora_files import ENCODERS, WRITERS, Key, outputs, peft_folder, styled, two_loras
from tests.support.lycoris import lycoris_file
from tests.support.models import BUILDERS, opened


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{family: the folder of a small random pipeline}."""
    return {family: BUILDERS[family](tmp_path_factory.mktemp(family) / "base") for family in ("sd1", "sdxl")}


def sampled(pipeline: Any) -> Tensor:
    """Latents of two steps of the pipeline's own sampler with guidance."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent", "generator": generator}
    return pipeline("a red heart", height=64, width=64, **call).images


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_teacher_with_two_loras_generates_what_diffusers_fused_pipeline_does(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    first, second = two_loras(bases[family], tmp_path)
    theirs = opened(bases[family])
    for file, scale in ((first, 0.8), (second, -0.5)):
        theirs.load_lora_weights(str(file.parent), weight_name=file.name)
        theirs.fuse_lora(lora_scale=scale)
        theirs.unload_lora_weights()
    ours = load_pipeline(str(bases[family]), loras=(f"{first}:0.8", f"{second}:-0.5"))
    expected, bare = sampled(theirs), sampled(opened(bases[family]))
    assert (sampled(ours) - expected).abs().max() < 1e-4
    assert (expected - bare).abs().max() > 0.05


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_layout_is_fused(family: str, write: Key, bases: dict[str, Path], tmp_path: Path) -> None:
    encoders = [name for name in ENCODERS if family == "sdxl" or name == "text_encoder"]
    merged = opened(bases[family])
    save_file(styled(merged, ["unet", *encoders], write), tmp_path / "style.safetensors")
    expected, found = (
        outputs(merged),
        outputs(load_pipeline(str(bases[family]), loras=[str(tmp_path / "style.safetensors")])),
    )
    assert {name: difference(found[name], expected[name]) < 1e-4 for name in expected} == dict.fromkeys(expected, True)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_a_peft_folder_is_fused_as_peft_applies_it(
    settings: dict[str, Any], small_teacher: Path, tmp_path: Path
) -> None:
    family, inputs = FAMILIES["sd"], network_inputs(FAMILIES["sd"], opened(small_teacher).unet, 1.0)
    adapted = peft_folder(tmp_path / "adapter", opened(small_teacher), r=4, lora_alpha=3, **settings)
    expected = [network_output(family, adapted, inputs)]
    found = load_pipeline(str(small_teacher), loras=[str(tmp_path / "adapter")])
    assert difference([network_output(family, found.unet, inputs)], expected) < 1e-5
    sampled_with = opened(small_teacher)
    load_lora(sampled_with, str(tmp_path / "adapter"), "it")
    assert difference([network_output(family, sampled_with.unet, inputs)], expected) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_alphas_of_diffusers_own_files_are_read(settings: dict[str, Any], small_teacher: Path, tmp_path: Path) -> None:
    """As `pipeline.save_lora_weights` writes them, with the adapter's settings in the header."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    pipeline, family = opened(small_teacher), FAMILIES["sd"]
    adapted = peft_folder(tmp_path / "adapter", pipeline, r=4, lora_alpha=3, alpha_pattern={"to_k": 8}, **settings)
    inputs = network_inputs(family, adapted, 1.0)
    expected = [network_output(family, adapted, inputs)]
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted, adapter_name="default"))
    metadata = adapted.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    found = load_pipeline(str(small_teacher), loras=[str(tmp_path / "pytorch_lora_weights.safetensors")])
    assert difference([network_output(family, found.unet, inputs)], expected) < 1e-5


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "DoRA", "Tucker"])
def test_other_kinds_are_fused_as_sample_loads_them(kind: str, small_teacher: Path, tmp_path: Path) -> None:
    save_file(lycoris_file(opened(small_teacher).unet, kind), tmp_path / "it.safetensors")
    loaded = opened(small_teacher)
    load_lora(loaded, str(tmp_path / "it.safetensors"), "it", 0.7)
    fused = load_pipeline(str(small_teacher), loras=[f"{tmp_path / 'it.safetensors'}:0.7"])
    for name, value in fused.unet.state_dict().items():
        torch.testing.assert_close(value, loaded.unet.state_dict()[name])


def test_skipped_layers_stay_skipped(tmp_path: Path) -> None:
    base = BUILDERS["sd2"](tmp_path / "base")
    _, style = two_loras(base, tmp_path)
    encoder = load_pipeline(str(base), loras=[str(style)], clip_skip=1).text_encoder
    last = next(m for path, m in encoder.named_modules() if path.endswith("layers.2"))
    assert not last.mlp.fc2.weight.any()


def test_caches_know_a_fused_teacher_and_its_scale(small_teacher: Path, tmp_path: Path) -> None:
    first, second = two_loras(small_teacher, tmp_path)
    ways: list[tuple[str, ...] | None] = [
        None,
        (str(first),),
        (f"{first}:0.5",),
        (str(second),),
        (str(first), str(second)),
    ]
    teachers = [load_teacher(str(small_teacher), loras=loras) for loras in ways]
    assert len({teacher.fingerprint(with_network=True) for teacher in teachers}) == len(ways)
    # Latents of images depend on the VAE and the text encoders only, which the LoCon leaves as they are.
    encoders = [teacher.fingerprint(with_network=False) for teacher in teachers]
    assert encoders[0] == encoders[1] == encoders[2]
    assert encoders[0] != encoders[3]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_low_rank_updates_are_the_whole_difference(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    first, second = two_loras(bases[family], tmp_path)
    loras = (f"{first}:0.8", f"{second}:-0.5")
    fused, plain = load_pipeline(str(bases[family]), loras=loras), opened(bases[family])
    updates = low_rank_updates(fused, loras)
    assert set(updates) == {"unet", *(name for name in ENCODERS if getattr(plain, name, None) is not None)}
    for part, layers in updates.items():
        put_lora(getattr(plain, part), layers, "it")
    expected = outputs(fused)
    for name, values in outputs(plain).items():
        assert difference(values, expected[name]) < 1e-4, name


def refused(message: str, base: Path, loras: list[str], **options: Any) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load_pipeline(str(base), loras=loras, **options)
    assert "\n" not in str(error.value)


def test_what_cannot_be_fused_is_refused_in_a_sentence(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["sd1"]
    refused(
        r"--teacher-lora .*gone\.safetensors does not exist; specify", base, [str(tmp_path / "gone.safetensors:0.5")]
    )
    xl = {"lora_unet_add_embedding_linear_1.lora_down.weight": torch.ones(1, 4)}
    xl |= {"lora_unet_add_embedding_linear_1.lora_up.weight": torch.ones(4, 1)}
    save_file(xl, tmp_path / "xl.safetensors")
    refused(
        r"--teacher-lora .*xl\.safetensors does not fit this model: .* for another base",
        base,
        [f"{tmp_path}/xl.safetensors"],
    )
    save_file({"mystery.weight": torch.ones(2, 2)}, tmp_path / "odd.safetensors")
    refused(r"--teacher-lora .*odd\.safetensors holds no LoRA in a known layout", base, [f"{tmp_path}/odd.safetensors"])
    (tmp_path / "text.safetensors").write_text("no tensors")
    refused(r"--teacher-lora .*text\.safetensors is not a safetensors file", base, [f"{tmp_path}/text.safetensors"])


def test_a_changed_file_is_refused(small_teacher: Path, tmp_path: Path) -> None:
    file, _ = two_loras(small_teacher, tmp_path)
    (recorded,) = lora_checksums([f"{file}:0.5"])
    assert recorded == hashlib.sha256(file.read_bytes()).hexdigest()
    load_pipeline(str(small_teacher), loras=[str(file)], lora_checksums=[recorded])
    save_file({key: 2 * value for key, value in load_file(file).items()}, file)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    message = rf"locon\.safetensors has changed: its SHA-256 begins with {found[:10]}, and {recorded[:10]} is recorded"
    refused(message, small_teacher, [str(file)], lora_checksums=[recorded])
    refused("lora_checksums has 2 entries for 1 LoRAs", small_teacher, [str(file)], lora_checksums=[found, found])


@pytest.mark.parametrize("kind", ["LoHa", "DoRA", "full"])
def test_a_difference_of_another_kind_is_no_low_rank_update(kind: str, small_teacher: Path, tmp_path: Path) -> None:
    pipeline = opened(small_teacher)
    save_file(lycoris_file(pipeline.unet, kind), tmp_path / "it.safetensors")
    with pytest.raises(
        UsageError, match=r"lora_relative_to is base, but --teacher-lora .*it\.safetensors is of the kind "
    ):
        low_rank_updates(pipeline, [str(tmp_path / "it.safetensors")])


@pytest.mark.parametrize(
    ("word", "path", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style.safetensors:-1", "style.safetensors", -1.0),
        ("a folder/style:1e-1", "a folder/style", 0.1),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1.0),
        (r"C:\loras\style.safetensors:0.8", r"C:\loras\style.safetensors", 0.8),
        ("C:/loras/style:2", "C:/loras/style", 2.0),
        ("d:style.safetensors", "d:style.safetensors", 1.0),
        ("owner/name", "owner/name", 1.0),
        ("owner/name:0.5", "owner/name", 0.5),
        ("style: v2.safetensors", "style: v2.safetensors", 1.0),
    ],
)
def test_a_scale_is_what_follows_the_last_colon(word: str, path: str, scale: float) -> None:
    assert split_lora(word) == (path, scale)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("style.safetensors:strong", "the scale is 'strong' and must be a number, such as style.safetensors:0.8"),
        ("style.safetensors:", "the scale is '' and must be a number"),
        ("style.safetensors:nan", "the scale is 'nan'"),
        ("style.safetensors:inf", "the scale is 'inf'"),
        (":0.8", "names no file"),
        ("", "names no file"),
        ("https://u:p@example.org/a.safetensors?token=secret", "https://example.org/a.safetensors is a URL; download"),
    ],
)
def test_a_word_that_is_no_lora_is_refused(word: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"^--teacher-lora ") as error:
        split_lora(word)
    assert message in str(error.value)
    assert "secret" not in str(error.value)


def test_names_in_public_lack_local_folders() -> None:
    loras = ("/home/me/loras/style.safetensors:0.8", r"C:\me\detail.safetensors", "../other/")
    assert with_loras("sd15", loras) == "sd15 with style.safetensors (0.8) and detail.safetensors (1) and other (1)"
    assert with_loras("sd15", None) == "sd15"
