"""The model card of a run: what it was distilled from and with, and how its files are used."""

import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from PIL import Image

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten, settings_to_toml
from lcmdistill.export.trained_student import TrainedStudent, load_trained_student
from lcmdistill.objectives.base import MethodInfo
from lcmdistill.students.student import guidance_of
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.family import TeacherFamily
from lcmdistill.teachers.naming import (
    is_local,
    license_name,
    license_of,
    loading_code,
    public_name,
    public_path,
    redact_paths,
)
from lcmdistill.utils.atomic import write_text

_FULL_USE = """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}/pipeline")
{call}
```

or `lcmdistill sample {quoted} --steps 4 --prompt "a prompt"`. """

_LORA_USE = """ComfyUI and A1111: put `lora/{name}.safetensors` among the LoRAs, weight 1, sampler {sampler}, 4 steps,
CFG {guidance:g}. diffusers:

```python
{loaded}pipeline.load_lora_weights("{folder}/lora", weight_name="{name}.safetensors")
{call}
```

or `lcmdistill sample {quoted} --steps 4 --prompt "a prompt"`. """

_PEFT_USE = """```python
from peft import PeftModel
{loaded}pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, "{folder}/lora")
{call}
```

or `lcmdistill sample {quoted} --steps 4 --prompt "a prompt"`. """

_GUIDANCE = {
    "input": "Guidance is an input of the network: images cost one forward a\nstep, and negative prompts have no effect.",
    "baked": "The guidance that it was trained with is in its weights: draw at\nguidance scale 1, up to 2 at most.",
    "free": "None is in its weights: guidance scales above\n1 and negative prompts act when it draws, at twice the cost.",
}

_AS_STARTED = "Guidance acts on it as on what it was fine-tuned from, which has\nno input for omega."

_PIXEL_USE = """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}/pipeline")
image = pipeline(num_inference_steps=2{label}).images[0]
```

or `lcmdistill sample {quoted} --steps 2{prompt}`. {classes}"""

# How a file or folder on the hub is used, by the format that it was exported in.
_IN_PYTHON = {
    "pipeline": """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{place}")
{call}""",
    "kohya": '{loaded}pipeline.load_lora_weights("{place}", weight_name="{file}")\n{call}',
    "diffusers-lora": '{loaded}pipeline.load_lora_weights("{place}")\n{call}',
    "peft": """from peft import PeftModel
{loaded}pipeline.{network} = PeftModel.from_pretrained(pipeline.{network}, "{place}")
{call}""",
    "single-file": """from diffusers import {scheduler}, {file_class}
from huggingface_hub import hf_hub_download

pipeline = {file_class}.from_single_file(hf_hub_download("{place}", "{file}"))
pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config)
{call}""",
    "onnx": """from optimum.onnxruntime import {onnx_class}

pipeline = {onnx_class}.from_pretrained("{place}")
{call}""",
}

_ELSEWHERE = {
    "kohya": "ComfyUI, A1111: put `{file}` among the LoRAs, weight 1, sampler {sampler}, 4 steps, CFG {guidance:g}.\n\n",
    "single-file": "ComfyUI, A1111: put `{file}` among the checkpoints, sampler {sampler}, 4 steps, CFG {guidance:g}.\n\n",
}


def _image(method: MethodInfo, guidance: float, clip_skip: int = 0) -> str:
    call = method.pipeline_call(4, guidance)
    return f"image = {call.removesuffix(')') + f', clip_skip={clip_skip})' if clip_skip else call}.images[0]"


def card_for(
    card: str,
    name: str,
    place: str,
    file: str,
    model: str,
    *,
    method: MethodInfo,
    guidance: float,
    has_omega_input: bool,
    family: TeacherFamily,
) -> str:
    """A run's card with its Use section rewritten for one export.

    name: the format; place: the hub's repository or a folder; file: the file's name, if it is one; model: the teacher;
    guidance: what to draw with; has_omega_input: whether the exported network has an input for it; family: the teacher's.
    """
    before, found, rest = card.partition("\n## Use\n")
    after = rest[rest.find("\n## Configuration\n") :]
    if not found or not after.startswith("\n"):  # not as it was written here: somebody's own
        return card
    base = family.pipeline_classes[0]
    kind = family.student_pipeline_class(has_omega_input, bool(method.sampling_options)) or base
    values = {"place": place, "file": file, "guidance": guidance, "sampler": method.sampler, "network": family.network}
    values |= {"scheduler": method.scheduler, "call": _image(method, guidance)}
    values |= {"onnx_class": family.onnx_classes.get(kind, ""), "file_class": base}
    values |= {"loaded": loading_code(model, base, method.scheduler)}
    code = _IN_PYTHON[name].format(**values)
    return f"{before}{found}\n{_ELSEWHERE.get(name, '').format(**values)}```python\n{code}\n```\n{after}"


def model_card(
    config: RunConfig,
    folder: Path,
    teacher: Teacher,
    picture: str | None = None,
    samples: Mapping[str, str] | None = None,
) -> str:
    """Markdown with the hub's metadata on top. Guidance is told in both conventions, and of this machine's folders none.

    picture: a validation grid; samples: {a file beside the card: its prompt}, shown by the hub.
    """
    from huggingface_hub import ModelCardData

    method, objective = config.objective.info, config.objective
    name, is_lora, licence = (
        public_name(config.teacher.model),
        config.student.kind == "lora",
        license_of(config.teacher.model),
    )
    is_hub_id = not is_local(name)
    family = teacher.family
    tags = [*family.tags, *method.tags, "lcmdistill"]
    shown = [{"text": prompt, "output": {"url": file}} for file, prompt in (samples or {}).items()]
    more: dict[str, Any] = {**licence, **({"widget": shown} if shown else {})}
    data = ModelCardData(
        library_name="peft" if is_lora and family.uses_peft_only else "diffusers",
        pipeline_tag=family.task,
        base_model=name if is_hub_id else None,
        base_model_relation=("adapter" if is_lora else "finetune") if is_hub_id else None,
        tags=[*tags, "lora"] if is_lora else tags,
        **more,
    )
    guidance = config.run.validation_guidance_scale or 1.0
    skips = family.clip_skip == "recorded"  # its files cannot say what to skip
    adapter = _PEFT_USE if family.uses_peft_only else _LORA_USE
    place = public_path(folder)
    use = (adapter if is_lora else _FULL_USE).format(
        folder=place,
        quoted=quote(place),
        name=folder.name,
        guidance=guidance,
        sampler=method.sampler,
        call=_image(method, guidance, (config.teacher.clip_skip or 0) if skips else 0),
        loaded=loading_code(config.teacher.model, type(teacher.pipeline).__name__, method.scheduler),
    )
    where = guidance_of(teacher, config.student, objective.omega)
    as_started = where == "baked" and objective.omega == "teacher"  # nobody told it an omega, and its start has its own
    use += _AS_STARTED if as_started else _GUIDANCE[where]
    if teacher.in_pixels:
        use = _pixel_use(folder, teacher)
    settings = redact_paths(flatten(config))
    omegas = omega_range(config)
    of_omega = (
        f"{omegas.omega}, which is diffusers' `guidance_scale` {omegas.scale} (omega + 1)"
        if omegas
        else "trained without guidance"
    )
    kind = method.lora_title if is_lora else method.title
    article = "An" if kind.startswith(("LCM", "LoRA")) else "A"
    size = f" of rank {config.student.rank}, alpha {config.student.alpha:g}" if is_lora else ""
    called = license_name(licence)
    terms = (
        f"The licence is the\nteacher's: {called}."
        if called
        else "The licence is the\nteacher's; see its own model card."
    )
    return f"""---
{data.to_yaml()}
---

# {folder.name}: {name} in 1 to 8 steps

{article} {kind}{size} ({method.paper}), {method.relation} `{name}` with lcmdistill. {terms}

- {"guidance as its start had it" if as_started else of_omega}
- {config.optim.max_train_steps} optimiser steps, {method.describe(objective)}, {config.data.resolution} px
- weights of the {"EMA" if config.student.target == "ema" else "live student"}; the teacher predicts {teacher.prediction_type}
{_pieces(config, family)}{f"{chr(10)}![Validation grid]({picture}){chr(10)}" if picture else ""}
## Use

{use}

## Configuration

```toml
{settings_to_toml(settings).strip()}
```
"""


def _pieces(config: RunConfig, family: TeacherFamily) -> str:
    """What was changed of the teacher's parts, a line each."""
    skip, vae = config.teacher.clip_skip, config.teacher.vae
    in_files = family.clip_skip == "baked" and config.student.kind == "full"
    how = "the text encoder's files are made so" if in_files else "draw with as many"
    told = ""
    if skip:
        theirs = family.a1111_clip_skip(skip)
        told = f"- {skip} of CLIP's last layers skipped (`clip_skip={skip}`, A1111's clip skip {theirs}): {how}\n"
    told += f"- the VAE is `{public_name(vae)}`, in place of the teacher's\n" if vae else ""
    return told + (
        "- without the teacher's safety checker\n" if "safety_checker" in (config.teacher.drop or ()) else ""
    )


def _pixel_use(folder: Path, teacher: Teacher) -> str:
    names, place = teacher.own_prompts, public_path(folder)
    use = partial(_PIXEL_USE.format, folder=place, quoted=quote(place))
    if not names:
        return use(label="", prompt="", classes="It takes no prompt.")
    classes = f"Its classes, from 0: {', '.join(names)}."
    return use(label=", class_labels=0", prompt=f' --prompt "{names[0]}"', classes=classes)


def write_run_card(config: RunConfig, folder: Path, teacher: Teacher) -> None:
    """The run's own README.md: the card, with the newest validation's pictures; and a LoRA's beside its file."""
    grids = sorted((folder / "samples").glob("step-*.png"))
    picture = f"samples/{grids[-1].name}" if grids else None
    samples = {} if teacher.in_pixels else _samples(sorted((folder / "samples").glob("sample-*.png")))
    card = model_card(config, folder, teacher, picture, samples)
    write_text(folder / "README.md", card)
    if config.student.kind == "lora":
        put_card(card, folder, folder / "lora")


def _samples(files: Sequence[Path]) -> dict[str, str]:
    """{place beside the card: prompt} of pictures that carry their prompt."""
    found = {}
    for path in files:
        with Image.open(path) as image:
            found[f"samples/{path.name}"] = str(image.info.get("prompt", ""))
    return found


def pictures_of(card: str, run: Path) -> dict[str, Path]:
    """{place beside the card: file} of what a card shows from its run's folder."""
    shown = re.findall(r"(?:!\[[^\]]*\]\(|url: )(samples/[^)/\s]+)", card)
    return {place: run / place for place in shown if (run / place).is_file()}


def put_card(card: str, run: Path, folder: Path) -> None:
    """Write a run's card into another folder, its pictures with it."""
    for place, path in pictures_of(card, run).items():
        (folder / place).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / place)
    write_text(folder / "README.md", card)


def export_card(run: Path, name: str, place: str, file: str = "") -> str:
    """The run's card, telling how an export is used. place: its folder, or the hub's repository; file: see card_for."""
    return _export_card(load_trained_student(run), name, place, file)


def _export_card(product: TrainedStudent, name: str, place: str, file: str = "") -> str:
    path = product.run / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    free = omega_range(product.config) is None
    has_omega = product.lora is None and name in ("pipeline", "onnx") and not free
    loaded_as = "pipeline" if name == "fused" else name
    model, method = product.config.teacher.model, product.method
    guidance = product.guidance_scale if has_omega or free else 1.0
    about = {"method": method, "guidance": guidance, "has_omega_input": has_omega, "family": product.family}
    return card_for(card, loaded_as, place, file, model, **about)


def put_export_card(product: TrainedStudent, name: str, output: Path, folder: Path) -> None:
    put_card(_export_card(product, name, public_path(output)), product.run, folder)
