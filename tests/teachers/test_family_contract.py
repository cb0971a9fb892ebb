"""Every family fulfills the contract, and no other file knows the classes of diffusers' networks and pipelines."""

import ast
import dataclasses
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.latent_cache import prepare
from lcmdistill.data.loader import batch_of
from lcmdistill.data.trajectories import TrajectoryPlan, check_trajectory
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.types import TeacherNetwork, x0_eps_network
from lcmdistill.students.student import AutocastNetwork, raw_network
from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.registry import FAMILIES, family_of, family_of_class, family_of_folder
from lcmdistill.teachers.single_file.sd_keys import TEXT_STYLES
from lcmdistill.training.run_data import sources_of
from lcmdistill.training.run_settings import resolve_run_defaults
from lcmdistill.utils.errors import UsageError
from tests.support.models import FAMILY_BUILDERS
from tests.support.pixel_models import build_pixel
from tests.support.runs import resolve

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lcmdistill"

each_family = pytest.mark.parametrize("key", list(FAMILIES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> diffusers folder of a small random model, the first that FAMILY_BUILDERS has of it."""
    found: dict[str, Path] = {}
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        for name, build in {**FAMILY_BUILDERS, "pixel": build_pixel}.items():
            folder = build(tmp_path_factory.mktemp(name) / "model")
            family = family_of_folder(folder)
            assert family is not None
            found.setdefault(family.key, folder)
    assert found.keys() == set(FAMILIES), "add a small random model of the family to tests/support/models.py"
    return found


@each_family
def test_a_family_describes_itself_completely(key: str) -> None:
    family: TeacherFamily = FAMILIES[key]
    assert family.key == key
    for name in ("title", "network", "network_class", "network_label", "task", "tags", "pipeline_classes"):
        assert getattr(family, name), name
    for name in (*family.pipeline_classes, family.network_class):
        assert hasattr(diffusers, name), name
    for name in (family.data_scheduler, family.reference_scheduler):
        assert hasattr(diffusers, name), name
    for has_omega_input in (True, False):
        for has_options in (True, False):
            name = family.student_pipeline_class(has_omega_input, has_options)
            assert name is None or name in family.pipeline_classes, (
                "a student's pipeline is loaded again as this family"
            )
    assert set(family.onnx_classes) <= set(family.pipeline_classes)
    assert bool(family.layouts) == (family.layout_of is not None)
    assert family.lora_modules
    assert bool(family.lora_formats) == bool(family.lora_prefixes)
    assert set(family.lora_prefixes.values()) <= {family.network, *family.text_encoders}
    for alias, entry in family.aliases.items():
        assert entry.model, alias
        assert entry.license or Path(entry.model).is_dir(), f"{alias}: a hub model needs the license of its card"
    for layout in family.layouts:
        assert layout.text_encoders.keys() == set(family.text_encoders)
        assert {style for _, style in layout.text_encoders.values()} <= TEXT_STYLES.keys()
        assert layout.default_prediction in layout.architectures
        assert layout.architectures.keys() == layout.base_versions.keys()


def test_every_pipeline_class_belongs_to_one_family() -> None:
    names = [name for family in FAMILIES.values() for name in family.pipeline_classes]
    assert len(names) == len(set(names))
    assert all(family_of_class(name) is not None for name in names)


@each_family
def test_a_model_of_the_family_behaves_as_described(key: str, folders: dict[str, Path]) -> None:
    teacher = load_teacher(str(folders[key]))
    family: Any = teacher.family
    assert family is family_of(teacher.pipeline)
    assert family.key == key
    assert type(teacher.network).__name__ == family.network_class
    assert family.describe(type(teacher.pipeline).__name__, teacher.network.config)
    encoders = [name for name in teacher.pipeline.components if name.startswith("text_encoder")]
    assert sorted(encoders) == sorted(family.text_encoders)
    z, t, c = teacher.example(2, 8 if family.in_pixels else 16, "cpu")
    with torch.no_grad():
        assert teacher.call(teacher.network, z, t, c.values, None).shape == z.shape
    inputs = family.example_inputs(teacher.network, torch.Generator().manual_seed(0), 2)
    assert set(inputs) <= {*signature(teacher.network.forward).parameters, *family.added_inputs}
    assert all(len(value) == 2 for value in inputs.values())
    channels = 2 * z.shape[1] + 1 if family.takes_mask else z.shape[1]
    latents = torch.zeros(2, channels, *z.shape[2:])
    kwargs = family.network_kwargs(family, teacher.network, {"sample": latents, "timestep": t, **inputs})
    with torch.no_grad():
        teacher.network(**kwargs, return_dict=False)
    scheduler = family.student_scheduler(teacher.schedule, teacher.pipeline.scheduler.config, "LCMScheduler", {})
    assert hasattr(scheduler, "step")
    layers = [name for name, _ in teacher.network.named_modules()]
    assert any(layer.endswith(name) for layer in layers for name in family.lora_modules)


@each_family
def test_missing_weights_are_refused_whatever_the_class(key: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Every network, VAE and text encoder of every family: the libraries only warn."""
    family: TeacherFamily = FAMILIES[key]
    parts = [family.network, *(() if family.in_pixels else ("vae",)), *family.text_encoders]
    for part in parts:
        folder = tmp_path / part
        shutil.copytree(folders[key], folder)
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        del tensors[max(tensors, key=lambda name: tensors[name].numel() * (not name.endswith("shared.weight")))]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(
            UsageError, match=r"cannot be loaded as a diffusers pipeline: .*\b1 weight|meta tensor|missing"
        ):
            load_teacher(str(folder))


def test_a_family_that_lacks_a_field_cannot_be_built() -> None:
    required = [
        field.name
        for field in dataclasses.fields(TeacherFamily)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    values = {name: getattr(FAMILIES["sd"], name) for name in required}
    TeacherFamily(**values)
    for name in required:
        with pytest.raises(TypeError, match=name):
            TeacherFamily(**{key: value for key, value in values.items() if key != name})


def test_families_are_read_without_torch() -> None:
    code = (
        "import sys; from lcmdistill.teachers.registry import FAMILIES; print([f.title for f in FAMILIES.values()]); "
    )
    code += "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stderr


@pytest.mark.parametrize("kind", ["full", "lora"])
@each_family
def test_a_published_guidance_precedes_the_defaults_of_methods(key: str, kind: str, folders: dict[str, Path]) -> None:
    """Those are of Stable Diffusion. What the command specifies precedes both."""
    published, teacher = FAMILIES[key].published, load_teacher(str(folders[key]))
    if "objective.w_max" not in published:
        pytest.skip("published without a guidance of its own")
    values = {"teacher.model": str(folders[key]), "student.kind": kind}
    config = resolve_run_defaults(resolve({}, values), 1, teacher)
    assert (config.objective.w_min, config.objective.w_max) == tuple(
        published[f"objective.w_{end}"] for end in ("min", "max")
    )
    chosen = {"objective.w_min": 1.5, "objective.w_max": 1.5}
    config = resolve_run_defaults(resolve({}, {**values, **chosen}), 1, teacher)
    assert (config.objective.w_min, config.objective.w_max) == (1.5, 1.5)


FAMILY_FILES = {place.partition(":")[0].rpartition(".")[2] + ".py" for place in FAMILIES.locations.values()}

# Classes that belong to no family: diffusers' base class, which opens any pipeline, and ONNX's file reader.
GENERIC = {"DiffusionPipeline", "OnnxRuntimeModel", "ModelMixin"}

# (file, class): why that file names it.
EXCEPTIONS = {
    ("teachers/overrides.py", "AutoencoderKL"): "--vae takes this VAE class only, for every family",
}

CLASSES = {
    name
    for name in dir(diffusers)
    if name.endswith(("Pipeline", "Model", "ControlNet")) or name.startswith(("Autoencoder", "UNet"))
} - GENERIC


def strings(tree: ast.AST) -> list[tuple[int, str]]:
    """Names and string constants of a module, docstrings and bare strings excluded."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            found.append((node.lineno, node.value))
        elif isinstance(node, ast.Name):
            found.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute):
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.alias):
            found.append((node.lineno, node.name.rpartition(".")[2]))
    return found


def family_knowledge(source: str) -> list[tuple[int, str]]:
    """Classes that a module names, and tests of the beginning or the end of a class name."""
    tree = ast.parse(source)
    found = [(line, text) for line, text in strings(tree) if text in CLASSES]
    found += [(line, text) for line, text in strings(tree) if text in ("text_encoder_2", "tokenizer_2")]
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith")
        ):
            tests_class = any(isinstance(n, ast.Attribute) and n.attr == "__name__" for n in ast.walk(node.func.value))
            parts = [str(n.value) for arg in node.args for n in ast.walk(arg) if isinstance(n, ast.Constant)]
            test = str.startswith if node.func.attr == "startswith" else str.endswith
            if tests_class and any(test(name, part) for name in CLASSES for part in parts):
                found.append((node.lineno, ast.unparse(node)))
    return found


FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if not (path.parent.name == "teachers" and path.name in FAMILY_FILES)
)


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_family_files_name_classes_of_networks_and_pipelines(file: Path) -> None:
    place = str(file.relative_to(PACKAGE))
    found = [(line, text) for line, text in family_knowledge(file.read_text()) if (place, text) not in EXCEPTIONS]
    assert not found, f"{place}: ask the family instead (see teachers/README.md): {found}"


@pytest.mark.parametrize(
    "source",
    [
        'if type(x).__name__ == "UNet2DModel": pass',
        'type(pipeline).__name__.startswith("PixArt")',
        'type(pipeline).__name__.endswith("InpaintPipeline")',
        "from diffusers import StableDiffusionPipeline",
        "isinstance(x, diffusers.UNet2DConditionModel)",
        '"text_encoder_2" in pipeline.components',
    ],
)
def test_knowledge_of_a_family_is_found(source: str) -> None:
    assert family_knowledge(source)
    assert not family_knowledge('type(scheduler).__name__ == "TCDScheduler"; DiffusionPipeline.from_pretrained(x)')


@each_family
def test_a_family_generates_trajectories_that_a_method_starts_on(
    key: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    teacher = load_teacher(str(folders[key]))
    settings: dict[str, Any] = {"objective.name": "cd" if teacher.in_pixels else "pcm", "teacher.model": "x"}
    settings |= {"data.trajectory": 2, "data.teacher_steps": 2, "data.max_samples": 2}
    settings |= {
        "data.resolution": min(64, teacher.usual["data.resolution"]),
        "data.cache_dir": str(tmp_path / "cache"),
    }
    config = resolve({}, settings)
    if teacher.condition_is_random:
        with pytest.raises(UsageError, match="an inpainting model is trained on masks"):
            check_trajectory(config, teacher, is_generated=True)
        return
    check_trajectory(config, teacher, is_generated=True)
    (source,) = sources_of(config, teacher)
    rows: list[int] = []

    def counted(network: Any, z: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(len(z))
        return teacher.call(network, z, *args)

    counting: Any = dataclasses.replace(teacher, call=counted)
    read = LatentDataset([prepare(source, config.data, counting, 0)], [2]).read([0, 1])
    plan = TrajectoryPlan.of(config)
    assert plan is not None
    calls, rows_per_call = plan.calls(1000), 2 * (2 if teacher.applies_cfg and plan.omega else 1)
    assert 2 * plan.forwards(teacher) == calls * rows_per_call
    # Embedded guidance is not applied a second time. The last evaluation, of x0, is missing where the clean end has no noise.
    assert sum(rows) in (calls * rows_per_call, (calls - 1) * rows_per_call)
    rng, null = Rng(0, 0, range(2)), teacher.encode_prompts([""])
    batch = batch_of(read, rng, null, 0.0)
    raw = raw_network(AutocastNetwork(teacher.network, teacher.call, torch.float32))
    prediction = x0_eps_network(raw, teacher.schedule, teacher.prediction_type)
    network = TeacherNetwork(prediction, null, teacher.applies_cfg)
    with torch.no_grad():
        state = config.objective.teacher_step(network, teacher.schedule, batch, rng)
    assert batch.trajectory is not None
    assert torch.equal(state.z_t, batch.trajectory.at(teacher.schedule, batch.latents, state.t))
    assert state.z_s.isfinite().all()
