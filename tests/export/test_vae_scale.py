"""A single file of a VAE with another scale: programs that assume their family's decode and encode as it was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lcmdistill.export.single_file import write_single_file
from lcmdistill.export.vae_scale import absorb_scale, absorbed_note
from lcmdistill.teachers.naming import ALIASES
from lcmdistill.teachers.registry import single_file_layouts
from lcmdistill.teachers.sd import SD1
from lcmdistill.teachers.sd3 import SD3
from lcmdistill.teachers.single_file.load import CONFIGS
from lcmdistill.teachers.single_file.sd_keys import original_vae
from lcmdistill.teachers.single_file.weights import vae_sources
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.json_text import parse_json
from tests.support.models import opened, small_vae
from tests.support.overrides import images

CLIENTS = {"sd1": (0.18215, 0.0), "sd2": (0.18215, 0.0), "sdxl": (0.13025, 0.0), "sd3": (1.5305, 0.0609)}
"scale and shift in comfy/latent_formats.py, in A1111's configurations and in sd-scripts"


def loaded(tensors: dict[str, Tensor], like: Any) -> Any:
    """The VAE of a file, as every program reads its keys."""
    vae = type(like).from_config(dict(like.config)).eval()
    sources = vae_sources(vae)
    vae.load_state_dict(
        {name: tensors[each[0].key].reshape(vae.state_dict()[name].shape) for name, each in sources.items()}
    )
    return vae


@torch.no_grad()
def check(vae: Any, file: dict[str, Tensor], key: str) -> None:
    """A file's VAE, decoded and encoded by a client's rule, equals the VAE by its own."""
    scale, shift = CLIENTS[key]
    own_scale, own_shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    theirs, rng = loaded(file, vae), torch.Generator().manual_seed(0)
    z, pixels = torch.randn(2, vae.config.latent_channels, 6, 6, generator=rng), images()
    got, expected = theirs.decode(z / scale + shift).sample, vae.decode(z / own_scale + own_shift).sample
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    got, expected = theirs.encode(pixels).latent_dist, vae.encode(pixels).latent_dist
    torch.testing.assert_close(
        (got.mean - shift) * scale, (expected.mean - own_shift) * own_scale, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(got.std * scale, expected.std * own_scale, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("sd1", {"scaling_factor": 0.654}),
        ("sd2", {"scaling_factor": 0.05, "shift_factor": 0.3}),
        ("sdxl", {"scaling_factor": 0.18215}),
        ("sdxl", {"scaling_factor": 0.5, "use_quant_conv": False}),
        ("sd3", {"scaling_factor": 1.5, "shift_factor": 0.06}),
        (
            "sd3",
            {"scaling_factor": 0.76525, "shift_factor": 0.1218, "use_quant_conv": False, "use_post_quant_conv": False},
        ),
    ],
)
def test_clients_decode_and_encode_as_trained(key: str, changes: dict[str, Any]) -> None:
    layout = next(each for _, each in single_file_layouts() if each.key == key)
    torch.manual_seed(0)
    vae = small_vae(16 if key == "sd3" else 4, **changes).eval()
    original = original_vae(vae.state_dict(), vae.config)
    check(vae, absorb_scale(original, vae.config, layout), key)
    with pytest.raises(AssertionError):
        check(vae, original, key)


def test_a_vae_of_the_family_s_scale_is_not_touched() -> None:
    vae = small_vae()
    tensors = original_vae(vae.state_dict(), vae.config)
    same = absorb_scale(tensors, vae.config, SD1)
    assert all(same[key] is value for key, value in tensors.items())
    assert absorbed_note(vae.config, SD1) == ""


def test_a_shift_that_no_weight_can_absorb_is_refused() -> None:
    vae = small_vae(16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    with pytest.raises(UsageError, match=r"factor of 1\.5 and a shift of 0\.06; .* with 1\.5305 and the shift 0\.0609"):
        absorb_scale(original_vae(vae.state_dict(), vae.config), vae.config, SD3)


def test_the_layouts_have_the_scale_of_clients_and_of_the_bundled_configs() -> None:
    for _, layout in single_file_layouts():
        assert (layout.latent_scale, layout.latent_shift) == CLIENTS[layout.key]
        config = parse_json((CONFIGS / layout.key / "vae" / "config.json").read_text())
        assert (config["scaling_factor"], config.get("shift_factor") or 0.0) == CLIENTS[layout.key]


def test_the_bundled_teacher_s_file_is_decoded_by_the_client_s_rule(tmp_path: Path) -> None:
    pipeline, path = opened(Path(ALIASES["tiny"])), tmp_path / "tiny.safetensors"
    write_single_file(pipeline, path, dtype=torch.float32)
    with safe_open(path, "pt") as file:
        check(pipeline.vae.eval(), {key: file.get_tensor(key) for key in file.keys()}, "sd1")  # noqa: SIM118
        assert file.metadata()["lcmdistill.vae_scaling_factor"] == "0.18215"
        assert file.metadata()["lcmdistill.vae"] == (
            "the VAE's scaling factor of 0.654433 is contained in its weights, so that programs decode it with 0.18215"
        )
