"""What is published about a teacher: names without folders, licenses as the hub takes them, settings without secrets."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcmdistill.teachers.loading import load_pipeline
from lcmdistill.teachers.naming import license_name, license_of, loading_code, model_hint, public_name, redact_paths
from lcmdistill.utils.errors import UsageError

OWN, NAMED = "license: other\nlicense_name: my-own", {"license": "other", "license_name": "my-own"}


def test_names_hold_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    snapshot = "/home/me/.cache/huggingface/hub/models--owner--its-name/snapshots/0123abc"
    names = {
        "tiny": "tiny",
        "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
        "owner/name": "owner/name",
        "models/mine": "mine",  # which is there, and so no hub id
        str(tmp_path / "models" / "mine"): "mine",
        "./models/mine/": "mine",
        "~/checkpoints/photo.safetensors": "photo.safetensors",
        "/gone/away": "away",
        snapshot: "owner/its-name",
    }
    assert {model: public_name(model) for model in names} == names


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit", {"license": "mit"}),
        (OWN + "\nlicense_link: https://a.b/c", {**NAMED, "license_link": "https://a.b/c"}),
        (OWN + "\nlicense_link: LICENSE.md", NAMED),
        ("tags:\n- a", {}),
        ("license: [a: b", {}),
    ],
)
def test_a_licence_is_read_from_the_teacher_s_card(tmp_path: Path, front: str, expected: dict[str, str]) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    assert license_of(str(tmp_path)) == expected
    assert license_name(license_of(str(tmp_path))) == {"mit": "mit", "other": "my-own"}.get(expected.get("license", ""))


def test_a_licence_is_read_from_a_file_s_header_or_known_by_alias(tmp_path: Path) -> None:
    for words, expected in (
        ("CreativeML Open RAIL-M", {"license": "other", "license_name": "CreativeML Open RAIL-M"}),
        ("openrail++", {"license": "openrail++"}),
        ("", {}),
    ):
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"modelspec.license": words})
        assert license_of(str(tmp_path / "a.safetensors")) == expected
    assert license_of("sdxl") == {"license": "openrail++"}
    assert license_of("tiny") == {"license": "apache-2.0"}
    assert license_of("nobody/knows") == license_of(str(tmp_path / "nowhere")) == {}


def test_code_opens_each_kind_of_model_by_its_own_way() -> None:
    code = loading_code("~/photo.safetensors", "StableDiffusionXLPipeline", "TCDScheduler")
    assert "from diffusers import StableDiffusionXLPipeline, TCDScheduler\n" in code
    assert 'StableDiffusionXLPipeline.from_single_file("photo.safetensors")' in code
    assert 'from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")' in loading_code("sd15", "X", "LCMScheduler")
    found: dict[str, object] = {}
    exec(loading_code("tiny", "X", "LCMScheduler"), found)
    assert type(found["pipeline"]).__name__ == "StableDiffusionPipeline"


def test_settings_are_shown_without_folders_and_secrets() -> None:
    published = redact_paths(
        {
            "teacher.model": "/opt/models/mine",
            "data.sources": [
                "/home/me/pictures",
                "data/own",
                "pipe:curl -H 'token: x' u",
                "https://me:x@h/a.tar?sig=x",
            ],
            "data.cache_dir": "~/cache",
            "run.validation_prompts": ["/imagine a cat"],
            "run.seed": 0,
        }
    )
    assert published == {
        "teacher.model": "mine",
        "data.sources": ["pictures", "data/own", "pipe:...", "https://h/a.tar"],
        "data.cache_dir": "cache",
        "run.validation_prompts": ["/imagine a cat"],
        "run.seed": 0,
    }
    assert redact_paths({"teacher.model": "sd15"}) == {"teacher.model": "sd15"}


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("tinny", "tiny"),
        ("sd5", "sd15"),
        ("sdx1", "sdxl"),
        ("SDXL", "sdxl"),
        ("sd1.5", "sd15"),
        ("flux", "flux-dev"),
        ("sd3.5", "sd35-medium or sd35-large"),
        ("runwayml/stable-diffusion-v1-5", "sd15"),  # where that model was before it moved
    ],
)
def test_a_mistyped_model_is_answered_with_the_near_aliases(
    word: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # runs in the current folder are near names too
    assert model_hint(word) == f" (did you mean {hint}?)"


def test_a_model_like_no_other_is_not_answered_with_one() -> None:
    assert model_hint("no-such-teacher") == ""


def test_a_mistyped_alias_is_refused_with_the_alias() -> None:
    with pytest.raises(UsageError, match=r"there is no model 'sd5' \(did you mean sd15\?\); specify"):
        load_pipeline("sd5")
