"""What full-size teachers need, and what `--memory` picks for them: from their shapes alone, no weights and no GPU.

    python examples/memory.py               # the table
    python examples/memory.py sd15-lora     # one of its rows
    python examples/memory.py --measure     # on a GPU: estimated and measured, with random weights
    python examples/memory.py --measure-cpu sdxl-lora    # one step at 256 px in main memory (Linux): minutes

Memory does not depend on the values of the weights. All rows are in bf16 with a global batch of 12, by default 4 x 3.
"""

import argparse
import gc
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import torch

from lcmdistill.config.resolve import resolve
from lcmdistill.config.schema import RunConfig
from lcmdistill.data.dataset import Read
from lcmdistill.diffusion.types import Conditioning
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.registry import FAMILIES
from lcmdistill.training.distributed import make_accelerator
from lcmdistill.training.memory.estimate import step_memory, usable
from lcmdistill.training.memory.plan import Plan, choose_plan, estimator, plan_memory
from lcmdistill.training.run_settings import resolve_run_defaults
from lcmdistill.training.trainer import make_trainer
from lcmdistill.utils.device import GIB, peak_memory
from lcmdistill.utils.errors import UsageError

LIMITS = (8, 12, 16, 24)
ROWS = (
    *("sd15-lora", "sd15-lora-tdm", "sd15-full", "sd15-full-tdm", "sd21-lora", "sd21-full"),
    *("sdxl-lora", "sdxl-lora-tdm", "sdxl-full"),
    *("sd35m-lora", "sd35m-full", "sd35l-lora", "sd35l-full", "sana-lora", "sana-full", "flux-lora"),
    *("pixart-lora", "pixart-full"),
)
SPLIT = {"optim.batch_size": 4, "optim.gradient_accumulation_steps": 3}
GOALS = {"sd15-lora": 8, "sdxl-lora": 12, "sd15-full": 24}
CONFIGS = Path(__file__).parent.parent / "lcmdistill" / "assets" / "configs"


@dataclass(frozen=True)
class FullSize:
    """A published model: its family, the folder with configs of its shapes, its network, and its prompts' shapes.

    Attributes:
        family: The family's key.
        folder: Under lcmdistill/assets/configs. SD 3's VAE has the shapes of FLUX.1's, and SDXL's those of PixArt's.
        network: The arguments of the network's class, None for those in the folder.
        prompts: The shape of a prompt's embeddings.
        pooled: The width of the pooled embeddings, where there are some.
        mask: Whether the network takes a mask of the prompt.
    """

    family: str
    folder: str
    network: dict[str, Any] | None = None
    prompts: tuple[int, int] = (77, 768)
    pooled: int = 0
    mask: bool = False


LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
T5 = 77 + 256
MODELS = {
    "sd15": FullSize("sd", "sd1"),
    "sd21": FullSize("sd", "sd2", None, (77, 1024)),
    "sdxl": FullSize("sdxl", "sdxl", None, (77, 2048), pooled=1280),
    "sd35m": FullSize("sd3", "sd3", None, (T5, 4096), pooled=2048),
    "sd35l": FullSize("sd3", "sd3", {**LARGE, "qk_norm": "rms_norm"}, (T5, 4096), pooled=2048),
    "sana": FullSize("sana", "sd3", {}, (300, 2304), mask=True),
    "flux": FullSize("flux", "sd3", {"guidance_embeds": True}, (512, 4096), pooled=768),
    "pixart": FullSize("pixart", "sdxl", {"sample_size": 128, "caption_channels": 4096}, (120, 4096), mask=True),
}


def full_size(name: str, device: str = "meta", dtype: torch.dtype = torch.float32) -> Teacher:
    """A teacher of a row in its published size, without weights, or with random ones on a device."""
    model, library = MODELS[name], cast("Any", diffusers)
    folder, family = CONFIGS / model.folder, FAMILIES[model.family]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    network_class = getattr(library, family.network_class)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if model.network is not None:
                network = network_class(**model.network)
            else:
                network = network_class.from_config(json.loads((folder / family.network / "config.json").read_text()))
            if name == "sana":
                vae = library.AutoencoderDC()
            else:
                vae = library.AutoencoderKL.from_config(json.loads((folder / "vae" / "config.json").read_text()))
    finally:
        torch.set_default_dtype(default)
    network.eval().requires_grad_(False)

    def encode_prompts(prompts: Any) -> Conditioning:
        n = len(prompts)
        embeds = {"prompt_embeds": torch.zeros(n, *model.prompts)}
        embeds |= {"pooled": torch.zeros(n, model.pooled)} if model.pooled else {}
        mask = {"attention_mask": torch.ones(n, model.prompts[0], dtype=torch.int64)} if model.mask else {}
        return Conditioning(embeds | mask)

    schedule, prediction_type = family.denoiser(scheduler)
    return Teacher(
        family=family,
        pipeline=SimpleNamespace(components={"vae": vae, family.network: network}),
        network=network,
        vae=vae,
        schedule=schedule,
        prediction_type=prediction_type,
        call=family.call,
        encode_prompts=encode_prompts,
        condition=family.condition,
    )


def configured(row: str, teacher: Teacher, **more: Any) -> RunConfig:
    """The defaults of a row, such as sd15-lora or sd15-lora-tdm, with the same batch for every method."""
    _, kind, method = [*row.split("-"), "lcm"][:3]
    settings = {"student.kind": kind, "run.precision": "bf16", "objective.name": method, **SPLIT, **more}
    return resolve_run_defaults(resolve({}, settings, objectives=OBJECTIVES), 1, teacher)


def cell(plan: Plan) -> str:
    """A plan in few words."""
    if not plan.fits:
        return f"no: {plan.needed.total / GIB:.1f} at least"
    run, optim = plan.config.run, plan.config.optim
    picked = ["recomputed"] * run.gradient_checkpointing + ["EMA on the CPU"] * plan.config.student.offload_target
    picked += ["base in int8"] * (plan.config.student.quantize_base == "int8")
    return f"{plan.needed.total / GIB:.1f}: {', '.join([f'{optim.batch_size} x {optim.gradient_accumulation_steps}', *picked])}"


def table(rows: list[str]) -> None:
    """Print what each limit leads to, as markdown. The numbers are GiB at the peak of a step."""
    print(f"| run | trained parameters | unlimited | {' | '.join(f'{limit} GiB' for limit in LIMITS)} |")
    print("|---|---|---|" + "---|" * len(LIMITS))
    for row in rows:
        teacher = full_size(row.partition("-")[0])
        config = configured(row, teacher)
        needed = estimator(config, teacher, torch.bfloat16, 1)
        unlimited = needed(config)
        rooms = [usable(n * GIB, whole_gpu=True) for n in LIMITS]
        plans = [choose_plan(config, needed, room, allow_8bit=False, allow_int8=True) for room in rooms]
        cells = [f"{unlimited.trainable:,}", f"{unlimited.total / GIB:.1f}", *map(cell, plans)]
        print(f"| {row}, {config.data.resolution} px | {' | '.join(cells)} |", flush=True)


class Latents:
    """A data set of one sample with the shapes of a teacher."""

    shapes = None  # all have the same

    def __init__(self, teacher: Teacher, resolution: int) -> None:
        self._z, _, self._c = teacher.example(1, resolution, "cpu")

    def __len__(self) -> int:
        return 64

    def read(self, indices: list[int]) -> Read:
        """Zeros, as a LatentDataset's."""
        z = self._z.expand(len(indices), -1, -1, -1)
        return Read(z, torch.zeros_like(z), self._c.expand(len(indices)))


def measure(config: RunConfig, teacher: Teacher, steps: int = 3) -> tuple[Plan | None, int | None]:
    """The plan of a run, and the most bytes that a GPU held while it took some steps. The teacher is not to be used again."""
    accelerator = make_accelerator(config)
    plan = plan_memory(config, teacher, accelerator.device, free=0.0)
    config = plan.config if plan else config
    data: Any = Latents(teacher, config.data.resolution)
    trainer = make_trainer(config, Path(tempfile.mkdtemp()), accelerator, teacher, data)
    peak_memory(accelerator.device, reset=True)
    for _, _ in zip(range(steps), trainer.steps(), strict=False):
        pass
    return plan, peak_memory(accelerator.device)


def status(name: str) -> int:
    """Bytes of main memory of this process: VmRSS, what it has now, or VmHWM, the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure_cpu(rows: list[str]) -> None:
    """Print what one step of batch 1 at 256 px takes in main memory beyond what the process had before, beside the estimate."""
    print("| run, 256 px, 1 x 1, bf16 | estimated GiB | measured GiB | |\n|---|---|---|---|")
    more = {"data.resolution": 256, "optim.batch_size": 1, "optim.gradient_accumulation_steps": 1, "run.device": "cpu"}
    for row in rows:
        accelerator, before = (
            make_accelerator(resolve({}, {"run.device": "cpu"}, objectives=OBJECTIVES)),
            status("VmRSS"),
        )
        teacher = full_size(row.partition("-")[0], "cpu", torch.bfloat16)
        config = configured(row, teacher, **{**more, "run.memory": "off"})
        estimated = step_memory(config, teacher, torch.bfloat16)
        data: Any = Latents(teacher, config.data.resolution)
        trainer = make_trainer(config, Path(tempfile.mkdtemp()), accelerator, teacher, data)
        vae = sum(p.numel() * p.element_size() for p in teacher.vae.parameters())
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        next(trainer.steps())
        took = status("VmHWM") - before - vae
        print(
            f"| {row} | {estimated.total / GIB:.1f} | {took / GIB:.1f} | {estimated.total / took - 1:+.0%} |",
            flush=True,
        )
        print(f"\n{estimated}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of the table: {', '.join(ROWS)}")
    parser.add_argument("--measure", action="store_true", help="run some steps on the GPU that is here")
    parser.add_argument("--measure-cpu", action="store_true", help="run a step of the rows in main memory")
    arguments = parser.parse_args()
    if arguments.measure_cpu:
        return measure_cpu(arguments.rows or ["sdxl-lora"])
    if not arguments.measure:
        return table(arguments.rows or list(ROWS))
    if not torch.cuda.is_available():
        raise SystemExit("--measure needs a CUDA GPU, and torch sees none here")
    print(f"{torch.cuda.get_device_name()}\n\n| run | limit | estimated GiB | measured GiB | |\n|---|---|---|---|---|")
    for row in arguments.rows or list(GOALS):
        limit = GOALS.get(row, 24)
        teacher = full_size(row.partition("-")[0], "cuda")
        config = configured(row, teacher, **{"run.memory": str(limit), "run.device": "cuda"})
        try:
            plan, took = measure(config, teacher)
        except UsageError as error:
            print(f"| {row} | {limit} GiB | {error} | | |")
            continue
        assert plan is not None
        assert took is not None
        estimated = plan.needed.total
        off = f"{estimated / took - 1:+.0%}, {'under' if took < limit * GIB else 'OVER'} the limit"
        print(f"| {row} | {limit} GiB | {cell(plan)} | {took / GIB:.2f} | {off} |", flush=True)
        del teacher
        torch.cuda.empty_cache()
    return None


if __name__ == "__main__":
    main()
