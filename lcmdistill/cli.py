"""The command line. Every option is told here in plain words; what it means is decided elsewhere, and imported late."""

import math
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lcmdistill.config import parse_assignment, read_toml, resolve
from lcmdistill.errors import UsageError, explain
from lcmdistill.settings import Format, ObjectiveName, Precision, SolverName, TargetKind, Tracker

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Distil a Stable Diffusion checkpoint into a student that draws in 1 to 8 steps.",
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback when something fails.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]

TeacherModel = Annotated[
    str | None,
    typer.Option(help="tiny, an alias (sd15, sd21), a hub id, or a local diffusers folder.  [default: sd15]"),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="What to learn on; repeatable: image folder, .tar shards (folder, file, URL, braces), tiny, or teacher "
        "for no data set at all.  [default: teacher; tiny for the tiny teacher]"
    ),
]
Prompts = Annotated[
    str | None, typer.Option(help="File of prompts, one a line, for --data teacher.  [default: a bundled list]")
]
Objective = Annotated[ObjectiveName | None, typer.Option(help="The method.  [default: lcm]")]
Solver = Annotated[SolverName | None, typer.Option(help="The teacher's PF-ODE solver.  [default: ddim]")]
Skip = Annotated[int | None, typer.Option(help="k: teacher time steps between the two points compared.  [default: 20]")]
BatchSize = Annotated[int | None, typer.Option(help="Samples a process takes at once.  [default: 4; tiny 32]")]
Accumulate = Annotated[
    int | None, typer.Option(help="Micro-batches summed up for one optimiser step.  [default: 3; tiny 1]")
]
MaxTrainSteps = Annotated[int | None, typer.Option(help="Optimiser steps.  [default: 1000; tiny 400]")]
Resolution = Annotated[
    int | None, typer.Option(help="Side of the training images in pixels.  [default: 512; sd21 768, tiny 64]")
]
Seed = Annotated[int | None, typer.Option(help="The one seed of every random draw.  [default: 0]")]
PrecisionName = Annotated[Precision | None, typer.Option(help="Arithmetic inside the networks.  [default: auto]")]
DeviceName = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.  [default: auto]")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub teacher.")]
Variant = Annotated[str | None, typer.Option(help="Variant of the teacher's weight files, such as fp16.")]
ReportTo = Annotated[Tracker | None, typer.Option(help="Tracker besides metrics.jsonl.  [default: none]")]
PushToHub = Annotated[
    str | None,
    typer.Option(help="Upload the result and its model card to this hub repository (OWNER/NAME); needs a login."),
]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings; flags win over it.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, section.key=value; repeatable. --dry-run prints them all."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the settings and an estimate, and stop.")
]

# The setting that each option of the training commands stands for.
SETTINGS = {
    "teacher": "teacher.model",
    "revision": "teacher.revision",
    "variant": "teacher.variant",
    "data": "data.sources",
    "prompts": "data.prompts",
    "resolution": "data.resolution",
    "objective": "objective.name",
    "solver": "objective.solver",
    "skip": "objective.skip",
    "max_train_steps": "optim.max_train_steps",
    "batch_size": "optim.batch_size",
    "accumulate": "optim.accumulate",
    "learning_rate": "optim.learning_rate",
    "output": "run.output",
    "seed": "run.seed",
    "precision": "run.precision",
    "device": "run.device",
    "report_to": "run.report_to",
    "push_to_hub": "run.push_to_hub",
    "rank": "student.rank",
    "alpha": "student.alpha",
    "target": "student.target",
    "dropout": "student.dropout",
    "target_modules": "student.target_modules",
}


def _finite(value: float | None) -> float | None:
    """A number that is given must be one."""
    if value is not None and not math.isfinite(value):
        raise UsageError(f"--guidance-scale is {value}; it must be a finite number")
    return value


@app.command()
def distill(
    teacher: TeacherModel = None,
    data: Data = None,
    prompts: Prompts = None,
    output: Annotated[str | None, typer.Option(help="The run's folder.  [default: runs/TEACHER-OBJECTIVE]")] = None,
    objective: Objective = None,
    solver: Solver = None,
    skip: Skip = None,
    max_train_steps: MaxTrainSteps = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="AdamW's learning rate.  [default: 1e-6; tiny 1e-4]")
    ] = None,
    resolution: Resolution = None,
    seed: Seed = None,
    precision: PrecisionName = None,
    device: DeviceName = None,
    revision: Revision = None,
    variant: Variant = None,
    report_to: ReportTo = None,
    push_to_hub: PushToHub = None,
    config: Config = None,
    set_: Set = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Distil a teacher into a Latent Consistency Model. Run the same command again to resume."""
    _train("full", locals())


@app.command("distill-lora")
def distill_lora(
    teacher: TeacherModel = None,
    data: Data = None,
    prompts: Prompts = None,
    output: Annotated[
        str | None, typer.Option(help="The run's folder.  [default: runs/TEACHER-OBJECTIVE-lora]")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="r, the rank of each layer's update.  [default: 64; tiny 16]")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="The update is scaled by alpha / r.  [default: 64; tiny 16]")
    ] = None,
    target: Annotated[
        TargetKind | None,
        typer.Option(help="Target network: the live adapter, or an EMA of it.  [default: live; tiny ema]"),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout on the adapter's inputs.  [default: 0]")] = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(help="Layers to adapt, by the end of their names; repeatable.  [default: the published list]"),
    ] = None,
    objective: Objective = None,
    solver: Solver = None,
    skip: Skip = None,
    max_train_steps: MaxTrainSteps = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="AdamW's learning rate.  [default: 1e-4; tiny 1e-3]")
    ] = None,
    resolution: Resolution = None,
    seed: Seed = None,
    precision: PrecisionName = None,
    device: DeviceName = None,
    revision: Revision = None,
    variant: Variant = None,
    report_to: ReportTo = None,
    push_to_hub: PushToHub = None,
    config: Config = None,
    set_: Set = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train an LCM-LoRA: a small file that makes the checkpoint it was trained on draw in 2 to 8 steps."""
    _train("lora", locals())


def _train(kind: str, options: dict[str, Any]) -> None:
    """Settle the configuration and run it. options: a training command's own, by name."""
    flags: dict[str, Any] = dict(parse_assignment(text) for text in options["set_"] or ())
    flags |= {key: options[name] for name, key in SETTINGS.items() if options.get(name) not in (None, [])}
    if "student.kind" in flags:
        raise UsageError("student.kind is not for --set: distill trains a full student, distill-lora a LoRA")
    flags["student.kind"] = kind
    file = read_toml(options["config"]) if options["config"] else {}
    if (recorded := file.get("student.kind", kind)) != kind:
        command = "distill-lora" if recorded == "lora" else "distill"
        raise UsageError(
            f"--config {options['config']} is for {command}: its student.kind is {recorded!r}; run lcmdistill {command}"
        )
    resolved = resolve(file, flags)
    from lcmdistill import preflight

    preflight.check_early(resolved)
    if options["dry_run"]:
        preflight.dry_run(resolved)
        return
    from lcmdistill import train

    train.distill(resolved)


@app.command()
def sample(
    model: Annotated[
        str | None,
        typer.Argument(help="Run folder, pipeline folder or hub id.  [default: the newest run under runs/]"),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--model", help="The same as MODEL: what the LoRAs of --lora are put on.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA file or folder (kohya, diffusers, peft); repeatable: a style with an LCM-LoRA."),
    ] = None,
    lora_scale: Annotated[
        list[float] | None, typer.Option(help="Weight of each --lora, in their order.  [default: 1]")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts, one a line.")] = None,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Network evaluations an image; 1 to 8 for a student.")
    ] = 4,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Guidance in diffusers' convention (omega + 1).  [default: the run's own, else 8.5; with a LoRA 1]",
            callback=_finite,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first image; the next ones count up.")
    ] = 0,
    num_images: Annotated[int, typer.Option(min=1, help="Images a prompt.")] = 1,
    resolution: Annotated[int | None, typer.Option(min=8, help="Side in pixels.  [default: the run's own]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn at once; the images do not depend on it.")] = 4,
    output: Annotated[Path, typer.Option(help="Folder for the PNGs and grid.png.")] = Path("samples"),
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Draw images with a student: PNGs with their settings inside, and a grid."""
    from lcmdistill import sample as sampling
    from lcmdistill.data.sources import read_prompts
    from lcmdistill.device import pick_device
    from lcmdistill.tracking import progress, say
    from lcmdistill.validate import default_prompts

    if model and base:
        raise UsageError("MODEL and --model say the same; give one of them")
    if len(lora_scale or ()) > len(lora or ()):
        raise UsageError(f"{len(lora_scale or ())} --lora-scale were given for {len(lora or ())} --lora")
    found = sampling.find_model(model or base)
    loras = [*found.loras, *(lora or ())]
    texts = list(prompt or []) + (read_prompts(str(prompts)) if prompts else []) or list(default_prompts(found.teacher))
    own = found.guidance_scale or (1.0 if loras else 8.5)
    guidance = guidance_scale if guidance_scale is not None else own
    scales = [*[1.0] * len(found.loras), *(lora_scale or ())]
    scales += [1.0] * (len(loras) - len(scales))
    pipeline = sampling.load_student(found.path, pick_device(device), loras, scales, found.options)
    wanted = [text for text in texts for _ in range(num_images)]
    with progress("drawing", len(wanted)) as bar:
        drawings = sampling.draw(
            pipeline,
            wanted,
            [seed + i for i in range(len(wanted))],
            steps=steps,
            guidance_scale=guidance,
            resolution=resolution or found.resolution,
            batch_size=batch_size,
            on_progress=bar.update,
        )
    grid = sampling.write_drawings(
        drawings,
        output,
        model=found.path,
        steps=steps,
        guidance_scale=guidance,
        sampler=sampling.sampler_of(pipeline),
        loras=list(zip(loras, scales, strict=True)),
    )
    say(f"{len(drawings)} images at {steps} steps, guidance scale {guidance:g}: {output}, all in {grid}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    format_: Annotated[Format, typer.Option("--format", help="What to write.")],
    output: Annotated[Path, typer.Option(help="File (kohya, single-file: .safetensors) or folder to write.")],
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"],
        typer.Option(help="What the weights are cast to; diffusers-lora, peft and onnx are fp32."),
    ] = "fp16",
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Guidance baked into a single file (omega + 1).  [default: the run's own]", callback=_finite),
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None,
        typer.Option(help="onnx: int8 for the weights of matrix products and what they are multiplied with."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reload the file as its consumer does and compare.")
    ] = True,
    push_to_hub: PushToHub = None,
    debug: Debug = False,
) -> None:
    """Write what a run made for diffusers, ComfyUI, A1111, peft or ONNX, and check that it reads back the same."""
    from lcmdistill import export as exporting
    from lcmdistill import hub, publish
    from lcmdistill.tracking import say

    if push_to_hub:
        hub.check_login(push_to_hub)
    options: dict[str, Any] = {"dtype": dtype, "guidance_scale": guidance_scale, "quantize": quantize}
    say(exporting.export(run, format_, output, **options, verify=verify))
    if push_to_hub:
        publish.publish_export(run, format_, output, push_to_hub)


def _quiet_libraries() -> None:
    """Keep the libraries' own chatter out of the output; their errors reach the user through ours."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def main() -> None:
    """The console script: one sentence and an exit code for whatever goes wrong, a traceback only with --debug."""
    _quiet_libraries()
    try:
        app()
    except SystemExit:
        raise
    except BaseException as error:
        if "--debug" in sys.argv[1:]:
            raise
        sentence, code = explain(error)
        print(f"Error: {sentence}" if code < 128 else sentence, file=sys.stderr)  # a signal is no error
        sys.exit(code)
