"""What makes a step cheap leaves its result alone: answers kept, data read ahead, checkpoints written behind, memory layout."""

import itertools
import os
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from test_train import assert_same, losses

from lcmdistill import checkpoint, loop, side_by_side
from lcmdistill.config.resolve import resolve
from lcmdistill.data.dataset import LatentDataset
from lcmdistill.data.eviction import make_room
from lcmdistill.data.latent_cache import prepare
from lcmdistill.data.loader import batch_of, read_ahead
from lcmdistill.data.teacher_cache import ask_teacher, which_draw
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import vp_schedule
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.objectives.base import forwards
from lcmdistill.teachers.loading import load_teacher
from lcmdistill.teachers.single_file.load import CONFIGS
from lcmdistill.training.checkpoint import Writer
from lcmdistill.training.compile import compile_blocks
from lcmdistill.training.distributed import make_accelerator
from lcmdistill.training.preflight import dry_run
from lcmdistill.training.setup import Run, build
from lcmdistill.training.trainer import _restore, distill
from lcmdistill.utils.errors import RunError, UsageError
from lcmdistill.utils.run_dir import checkpoints

CPU = torch.device("cpu")
Settings = dict[str, Any]


@pytest.fixture
def settings(small_teacher: Path, image_folder: Path, tmp_path: Path) -> Settings:
    own = {"teacher.model": str(small_teacher), "data.sources": (str(image_folder),)}
    own |= {"student.rank": 4}
    return {**SMALL, **own, "data.cache_dir": str(tmp_path / "cache"), "run.output": str(tmp_path / "run")}


def built(settings: Settings, **changes: Any) -> Run:
    """A run at its first step."""
    config = resolve({}, {**settings, **{key.replace("__", "."): value for key, value in changes.items()}})
    teacher = load_teacher(config.teacher.model)
    (spec,) = config.data.sources
    dataset = LatentDataset([prepare(spec, config.data, teacher, config.run.seed)], [config.data.count])
    return build(config, Path(config.run.output or ""), make_accelerator(config), teacher, dataset)


# -- the teacher's answers -------------------------------------------------------------------------------------------


def one_evaluation() -> list[str]:
    """The objectives that ask a teacher at all."""
    schedule = vp_schedule({})
    names = [name for name, kind in OBJECTIVES.items() if "solver" in kind.__dataclass_fields__]
    return [name for name in names if forwards(OBJECTIVES[name](solver="ddim"), schedule).get("teacher")]


EACH_ASKING = [
    (name, guidance) for name in one_evaluation() for guidance in ("baked", "free")[: 2 if name != "cd" else 1]
]


@pytest.mark.parametrize(("name", "guidance"), EACH_ASKING)
def test_a_kept_answer_is_the_teacher_s_own(name: str, guidance: str, settings: Settings) -> None:
    """At the same draws the loss is what the live teacher makes of it, but for the 11 bits that are kept."""
    own = {"objective__guidance": guidance}
    if name == "cd":
        settings, own = {k: v for k, v in settings.items() if "w_m" not in k}, {}
    run = built(
        settings, objective__name=name, objective__solver="ddim", data__teacher_draws=2, data__caption_drop=0.3, **own
    )
    assert run.answers is not None
    asked = [(5, 1), (0, 0), (5, 0)]
    rng = Rng(run.config.run.seed, 9, range(3), kept=asked)
    batch = batch_of(run.dataset.read([index for index, _ in asked]), rng, run.models.null, 0.3)
    live = run.config.objective.loss(run.models, batch, rng)
    kept = run.config.objective.loss(loop._answered(run, rng), batch, rng)
    torch.testing.assert_close(kept, live, rtol=2e-3, atol=2e-5)
    assert live.std() > 0.01 * live.mean()  # the three are told apart
    other = run.config.objective.loss(loop._answered(run, replace(rng, kept=asked[::-1])), batch, rng)
    assert not torch.allclose(other, live, rtol=2e-3)


def test_omega_stays_free_and_the_rest_is_the_sample_s_own(settings: Settings) -> None:
    asked = [(3, 0), (3, 1), (4, 0)]
    one, two = (Rng(0, step, range(3), kept=asked) for step in (1, 2))
    for stream in ("posterior", "noise", "times", "caption-drop"):
        assert torch.equal(one.uniform(stream), two.uniform(stream))
        assert len(set(one.uniform(stream).tolist())) == 3
    assert not torch.equal(one.uniform("omega"), two.uniform("omega"))


def test_every_epoch_meets_another_draw_and_then_the_first_again() -> None:
    assert [which_draw(step, range(4), 4, 8, 2) for step in range(5)] == [[0] * 4, [0] * 4, [1] * 4, [1] * 4, [0] * 4]
    assert which_draw(1, range(4), 4, 6, 3) == [0, 0, 1, 1]


def test_answers_are_asked_once_and_serve_every_omega_and_adapters(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(settings, data__teacher_draws=2)
    (folder,) = Path(settings["data.cache_dir"], "answers").iterdir()
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(files) == 1
    again = built(settings, data__teacher_draws=2, objective__w_max=3.0, objective__w_min=2.0, student__kind="lora")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    assert next(run.teacher.network.parameters()).device == CPU
    assert again.answers is not None
    for changed in (
        {"objective__skip": 50},
        {"run__seed": 1},
        {"data__caption_drop": 0.5},
        {"objective__guidance": "free"},
    ):
        built(settings, data__teacher_draws=2, **changed)
    assert len(list(folder.parent.iterdir())) == 5


def test_answers_that_were_removed_while_they_were_asked_are_missed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked_in_vain(*given: Any, **told: Any) -> Path:
        folder = ask_teacher(*given, **told)
        shutil.rmtree(folder)
        return folder

    monkeypatch.setattr(loop, "ask_teacher", asked_in_vain)
    with pytest.raises(RunError, match=r"were removed while this run filled it.*raise data\.cache_limit"):
        built(settings, data__teacher_draws=1)
    monkeypatch.undo()
    assert built(settings, data__teacher_draws=1).answers is not None


@pytest.mark.parametrize("kind", ["latents", "answers"])
def test_a_file_that_a_power_cut_left_short_is_made_anew(kind: str, settings: Settings, tmp_path: Path) -> None:
    told = {**settings, "data.teacher_draws": 1, "optim.max_train_steps": 1}
    distill(resolve({}, told))
    (file,) = Path(settings["data.cache_dir"], kind).rglob("*.safetensors")
    whole = file.read_bytes()
    for left in (whole[:-1], b""):
        file.write_bytes(left)
        distill(resolve({}, {**told, "run.output": str(tmp_path / str(len(left)))}))
        assert file.read_bytes() == whole


def test_a_dry_run_tells_what_asking_beforehand_takes(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(resolve({}, {**settings, "data.teacher_draws": 1000}))
    assert re.search(r"asked beforehand: 24,000, .* [\d.]+ h and 0.01 GB of the cache", capsys.readouterr().out)


def test_a_run_on_kept_answers_resumes_to_the_bit(settings: Settings, tmp_path: Path) -> None:
    told = {**settings, "data.teacher_draws": 2, "optim.max_train_steps": 4, "run.checkpoint_every": 2}
    whole = distill(resolve({}, {**told, "run.output": str(tmp_path / "whole")}))
    for steps in (2, 4):
        cut = distill(resolve({}, {**told, "run.output": str(tmp_path / "cut"), "optim.max_train_steps": steps}))
    assert_same(whole, cut)
    live = distill(resolve({}, {**told, "run.output": str(tmp_path / "live"), "data.teacher_draws": 0}))
    assert losses(live) != losses(whole)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"objective.solver": "heun"}, r"asks its teacher twice a step with heun; use --solver ddim or euler"),
        ({"objective.name": "ct"}, "asks no teacher; leave it at 0"),
        ({"data.buckets": ("16x24", "16x16")}, "leave it at 0, or leave data.buckets out"),
        ({"data.teacher_draws": -1}, "must be at least 0"),
    ],
)
def test_what_cannot_be_asked_beforehand_is_refused(told: Settings, said: str, settings: Settings) -> None:
    kept = {k: v for k, v in settings.items() if "w_m" not in k or "objective.name" not in told}
    with pytest.raises(UsageError, match=said):
        distill(resolve({}, {**kept, "data.teacher_draws": 2, **told}))
    assert not Path(settings["run.output"]).exists()


# -- side by side ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def stepped(run: Run, steps: int = 3) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of a run's next steps, and what is trained after them."""
    told = [float(loss) for loss, _ in itertools.islice(loop.train_steps(run, run.config.objective), steps)]
    return told, list(run.student.trainable.values())


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    "own",
    [
        # Some of whose pairs end at the first time, where the target is what the teacher's step led to.
        {"objective__skip": 500},
        {"objective__skip": 500, "objective__guidance": "free", "optim__batch_size": 3},
        {"objective__name": "tcd", "objective__skip": 500, "objective__solver": "heun"},
        {"objective__name": "cd", "objective__scales": 3},
        {"data__teacher_draws": 2, "optim__batch_size": 3},
        {"data__teacher_draws": 2, "optim__batch_size": 32},
        {"objective__name": "ct"},
        {"objective__name": "ct", "student__target": "live"},
        {"run__gradient_checkpointing": True},
        {"run__precision": "bf16", "optim__batch_size": 4},
    ],
    ids=str,
)
def test_work_side_by_side_is_the_whole_micro_batch_s(own: Settings, settings: Settings) -> None:
    if own.get("objective__name") in ("cd", "ct"):
        settings = {key: value for key, value in settings.items() if "w_m" not in key}
    own = {"optim__batch_size": 16, "optim__accumulate": 2, **own}
    own |= {"optim__learning_rate": 1e-6}  # at which what rounding leaves does not grow
    run, again, whole = (built(settings, **own) for _ in range(3))
    assert run.side_by_side is not None
    whole.side_by_side = None
    (losses, weights), (others, their), (plain, _) = map(stepped, (run, again, whole))
    assert losses == others
    assert all(map(torch.equal, weights, their))
    near = 1e-5 if run.config.run.precision == "fp32" else 5e-3
    assert losses == pytest.approx(plain, rel=near)
    torch.testing.assert_close(run.by_noise, whole.by_noise, rtol=near, atol=near / 10)
    means, its = ([state["exp_avg"] for state in each.optimizer.state.values()] for each in (run, whole))
    largest = max(float(value.abs().max()) for value in its)
    torch.testing.assert_close(means, its, rtol=0, atol=10 * near * largest)


@pytest.mark.usefixtures("two_cores")
def test_what_threads_would_share_is_left_whole(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter is switched on and off in one network; a large network needs no threads of its own."""
    assert built(settings).side_by_side is not None
    assert built(settings, student__kind="lora").side_by_side is None
    monkeypatch.setattr(side_by_side, "SMALL", 1000)
    assert built(settings).side_by_side is None


@pytest.mark.usefixtures("two_cores")
def test_what_fails_while_it_is_asked_ahead_ends_the_step(settings: Settings) -> None:
    run = built(settings)

    def broken(*_: Any) -> Any:
        raise RuntimeError("the teacher is out of order")

    run.models = replace(run.models, teacher=broken)
    with pytest.raises(RuntimeError, match="out of order"):
        stepped(run)


@pytest.mark.parametrize("target", ["ema", "live"])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "lcf"])
def test_an_adapter_beside_its_target_s_learns_recomputed_or_not(name: str, target: str, settings: Settings) -> None:
    """Whichever adapter was switched on last is the one that a network has gradients for, and that a recomputation meets."""
    if name in ("cd", "ct", "ict"):
        settings = {key: value for key, value in settings.items() if "w_m" not in key}
    found = []
    for again in (False, True):
        own = {"student__kind": "lora", "student__target": target, "run__gradient_checkpointing": again}
        run = built(settings, objective__name=name, student__dropout=0.1 * (target == "live"), **own)
        steps = itertools.islice(loop.train_steps(run, run.config.objective), 2)
        found.append([float(value) for loss, norm in steps for value in (loss, norm)])
        assert min(found[-1]) > 0
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# -- reading ahead ---------------------------------------------------------------------------------------------------


class Recorded:
    """A data set that notes what is read, when, and by whom."""

    def __init__(self) -> None:
        self.read_by: list[tuple[list[int], str]] = []

    def read(self, indices: Sequence[int]) -> Any:
        if 13 in indices:
            raise OSError("the disk is gone")
        self.read_by.append((list(indices), threading.current_thread().name))
        return list(indices)


def test_one_micro_batch_is_read_ahead_by_a_thread() -> None:
    dataset: Any = Recorded()
    reads = read_ahead(dataset, ([i] for i in range(5)))
    assert next(reads) == [0]  # pyright: ignore[reportUnnecessaryComparison]
    assert next(reads) == [1]  # pyright: ignore[reportUnnecessaryComparison]
    assert list(reads) == [[2], [3], [4]]
    assert [indices for indices, _ in dataset.read_by] == [[0], [1], [2], [3], [4]]
    assert {name for _, name in dataset.read_by}.isdisjoint({threading.current_thread().name})
    lazily = read_ahead(dataset, ([i] for i in range(100)))
    next(lazily)
    assert len(dataset.read_by) <= 5 + 2


def test_what_goes_wrong_in_the_thread_is_raised_where_its_data_are_wanted() -> None:
    dataset: Any = Recorded()
    reads = read_ahead(dataset, [[1], [13], [2]])
    next(reads)
    with pytest.raises(OSError, match="disk"):
        next(reads)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.full((4, 3, 2, 2), value).to(memory_format=torch.channels_last)
    return {"student": {"conv": weight, "bias": torch.full((3,), value)}}


@pytest.mark.parametrize("left", [1e12, 0.0])
def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(
    left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory for a copy, which a thread writes, and without."""
    monkeypatch.setattr(checkpoint, "cpu_memory_left", lambda: left)
    go, write = threading.Event(), checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *a, **k: (go.wait(10), write(*a, **k)))
    writer = Writer(tmp_path, keep=1)
    if not left:
        go.set()
    for step in (1, 2):
        tensors = groups(float(step))
        writer.save(step, tensors, {})
        for value in tensors["student"].values():
            value.fill_(99.0)
        assert bool(checkpoints(tmp_path)) == (not left or step == 2)
        go.set()
    writer.wait()
    (only,) = checkpoints(tmp_path)
    assert only.name == "step-00000002"
    assert {float(v.unique()) for v in load_file(only / "student.safetensors").values()} == {2.0}


def test_a_failure_of_the_writing_thread_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    writer = Writer(tmp_path, keep=1)
    writer.save(1, groups(1.0), {})
    with pytest.raises(OSError, match="no space"):
        writer.save(2, groups(2.0), {})
    writer.wait()


# -- memory layout and the compiler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_files_do_not_tell_what_layout_a_network_computes_in(kind: str, settings: Settings) -> None:
    run = built(settings, student__kind=kind)
    run.student.network.to(memory_format=torch.channels_last)  # as on CUDA
    assert not all(value.is_contiguous() for value in run.student.network.state_dict().values())
    assert all(value.is_contiguous() for value in run.student.for_export().state_dict().values())


def test_moments_come_back_in_the_layout_of_their_parameters(settings: Settings) -> None:
    told = {**settings, "optim.max_train_steps": 2, "run.checkpoint_every": 2}
    folder = distill(resolve({}, told))
    run = built(settings)
    torch.nn.ModuleList([run.student.online, run.student.target]).to(memory_format=torch.channels_last)  # pyright: ignore
    _restore(run, checkpoints(folder / "checkpoints")[-1])
    for parameter, state in run.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_each_block_is_compiled_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer of one block whole, of several each of its blocks."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        config: Any = UNet2DConditionModel.load_config(CONFIGS / name / "unet")
        network: Any = UNet2DConditionModel.from_config(config)
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    compile_blocks(network)
    assert {type(block).__name__ for block in compiled} == {
        "ResnetBlock2D",
        "Transformer2DModel" if name == "sd1" else "BasicTransformerBlock",
    }
    inside = [id(module) for block in compiled for module in block.modules()]
    assert len(inside) == len(set(inside))
    blocks = [m for m in network.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
    assert {id(block) for block in blocks} <= set(inside)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_compiled_blocks_train_the_same(
    kind: str, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {**settings, "student.kind": kind, "optim.max_train_steps": 3, "run.log_every": 1}
    told |= {"optim.learning_rate": 1e-6}  # at which what rounding leaves does not grow
    plain, compiled = (
        distill(resolve({}, {**told, "run.compile": wish, "run.output": str(tmp_path / wish)}))
        for wish in ("off", "on")
    )
    assert capsys.readouterr().out.count("the networks are compiled at the first step, which takes minutes") == 1
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    names = [
        load_file(checkpoints(run / "checkpoints")[-1] / "student.safetensors").keys() for run in (compiled, plain)
    ]
    assert names[0] == names[1]


# -- the bound of the cache ------------------------------------------------------------------------------------------


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    made = []
    for age, kind in enumerate(("latents", "answers", "latents", "latents")):
        folder = tmp_path / kind / f"{age:024x}"
        folder.mkdir(parents=True)
        (folder / "0.safetensors").write_bytes(bytes(1000))
        os.utime(folder, (1000 - age, 1000 - age))
        made.append(folder)
    evaluation = tmp_path / "evaluation" / "abc"
    evaluation.mkdir(parents=True)
    oldest = made[3]
    assert make_room(tmp_path, 2500, [oldest]) == 2000  # the oldest is needed, and the two after it go
    assert [folder.is_dir() for folder in made] == [True, False, False, True]
    assert make_room(tmp_path, 2500, []) == 0
    assert make_room(tmp_path, 0, [oldest]) == 1000
    assert oldest.is_dir()
    assert evaluation.is_dir()


def test_room_that_another_run_makes_meanwhile_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "latents" / ("0" * 24)
    folder.mkdir(parents=True)
    (folder / "0.safetensors").write_bytes(bytes(10))
    rename = Path.rename

    def too_late(path: Path, target: Path) -> Path:
        shutil.rmtree(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", too_late)
    assert make_room(tmp_path, 0, []) == 0
    assert not folder.exists()


def test_a_run_makes_room_for_itself_and_keeps_what_it_needs(settings: Settings, tmp_path: Path) -> None:
    cache = Path(settings["data.cache_dir"])
    other = cache / "latents" / ("0" * 24)
    other.mkdir(parents=True)
    (other / "0.safetensors").write_bytes(bytes(10))
    told = {**settings, "data.teacher_draws": 1, "data.cache_limit": 1e-9}
    distill(resolve({}, told))
    assert not other.exists()
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert {path.parent.parent.name for path in files} == {"latents", "answers"}
    distill(resolve({}, {**told, "run.output": str(tmp_path / "again")}))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == files
