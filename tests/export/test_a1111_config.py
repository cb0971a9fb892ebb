"""The configuration file next to a v-prediction checkpoint: diffusers reads it as the original configuration."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers.loaders.single_file_utils import (
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
)

from lcmdistill.export.registry import export
from lcmdistill.hub import publish
from lcmdistill.sampling.generate import find_model, load_student
from lcmdistill.utils.errors import UsageError
from tests.support.finished_runs import finished_run
from tests.support.teachers import build_teacher

OPTIONS = {"dtype": "fp32", "guidance_scale": None, "verify": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v")
    return finished_run(build_teacher(folder / "teacher", "v_prediction"), "full", folder / "run")


def test_it_describes_the_checkpoint_beside_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.safetensors"
    sentence = export(run, "single-file", path, **OPTIONS)
    assert "needs the file v.yaml next to the checkpoint (which the export writes)" in sentence
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v.safetensors", "v.yaml"]
    own = load_student(find_model(str(run)).path, torch.device("cpu"))
    original = yaml.safe_load((tmp_path / "v.yaml").read_text())
    assert original["model"]["params"]["parameterization"] == "v"
    read = create_unet_diffusers_config_from_ldm(original, {}, image_size=16)
    for name in ("sample_size", "in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        assert _plain(read[name]) == _plain(own.unet.config[name]), name
    for name in ("down_block_types", "up_block_types"):
        assert _plain(read[name]) == _plain(own.unet.config[name]), name
    read = create_vae_diffusers_config_from_ldm(original, {}, image_size=16)
    for name in ("latent_channels", "block_out_channels", "layers_per_block"):
        assert _plain(read[name]) == _plain(own.vae.config[name]), name
    assert (read["scaling_factor"], own.vae.config.scaling_factor) == (0.18215, 0.5)  # the file's, and the run's
    uploaded: list[str] = []
    monkeypatch.setattr(publish.hub, "push", lambda repo, files, *_, **__: uploaded.extend(files) or "")
    publish.publish_export(run, "single-file", path, "me/v")
    assert {"v.safetensors", "v.yaml", "README.md"} <= set(uploaded)


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def test_a_file_of_that_name_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("mine")
    with pytest.raises(UsageError, match=r"v\.yaml exists, and A1111 needs a file of that name"):
        export(run, "single-file", tmp_path / "v.safetensors", **OPTIONS)
    assert [file.name for file in tmp_path.iterdir()] == ["v.yaml"]


def test_epsilon_students_need_none(small_run: Path, tmp_path: Path) -> None:
    export(small_run, "single-file", tmp_path / "e.safetensors", **OPTIONS)
    assert [file.name for file in tmp_path.iterdir()] == ["e.safetensors"]
