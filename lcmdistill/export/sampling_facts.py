"""How a run's student is sampled, from the teacher at hand or from the files of a finished run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from lcmdistill.config.guidance import omega_range
from lcmdistill.config.recorded import run_takes_omega
from lcmdistill.config.schema import RunConfig
from lcmdistill.diffusion.parameterization import FLOW
from lcmdistill.diffusion.schedules import vp_schedule
from lcmdistill.students.lora_files import family_of_lora, read_scheduler_options, run_takes_guidance
from lcmdistill.students.student import guidance_of
from lcmdistill.teachers.base import Teacher
from lcmdistill.teachers.family import TeacherFamily, with_tokenizers
from lcmdistill.teachers.pipelines import absent_parts
from lcmdistill.teachers.registry import FAMILIES, family_of, family_of_folder
from lcmdistill.teachers.schedulers import flow_denoiser, is_flow
from lcmdistill.utils.json_text import parse_json
from lcmdistill.utils.run_dir import lora_file

ZERO_SNR_KEY = "lcmdistill.zero_terminal_snr"
"the header entry of a LoRA whose base has zero-terminal SNR"

BETAS_KEY = "lcmdistill.betas"
"the header entry of a LoRA whose base has other betas than programs assume, as JSON"

SHIFT_KEY = "lcmdistill.shift"
"the header entry of a LoRA whose base was trained with flow matching: its shift"

KNOWN_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
"Stable Diffusion's betas, which ComfyUI and A1111 assume for every model"


class Betas(NamedTuple):
    """Betas that are not Stable Diffusion's.

    Attributes:
        schedule: diffusers' `beta_schedule`, or "trained_betas" for a table.
        start: The first beta.
        end: The last beta.
        num_steps: The number of time steps.
    """

    schedule: str
    start: float
    end: float
    num_steps: int

    def __str__(self) -> str:
        has_ends = self.schedule in ("linear", "scaled_linear")
        ends = f" {self.start:g} to {self.end:g}" if has_ends else ""
        return f"{self.schedule}{ends}, {self.num_steps} time steps"


class ScheduleFacts(NamedTuple):
    """A noise schedule as other programs see it: see the attributes of SamplingFacts."""

    zero_snr: bool = False
    betas: Betas | None = None
    shift: float | None = None


def schedule_facts(scheduler: Mapping[str, Any]) -> ScheduleFacts:
    """Return what a diffusers scheduler config says about the noise schedule; nothing for an empty config."""
    if is_flow(scheduler):
        is_dynamic = scheduler.get("use_dynamic_shifting")
        return ScheduleFacts(shift=None if is_dynamic else flow_denoiser(scheduler)[0].shift)
    if not scheduler:
        return ScheduleFacts()
    alpha = vp_schedule(scheduler).alphas_cumprod.sqrt()
    for zero_snr in (False, True):
        known = vp_schedule({**KNOWN_BETAS, "rescale_betas_zero_snr": zero_snr}).alphas_cumprod.sqrt()
        if len(alpha) == len(known) and float((alpha - known).abs().max()) < 1e-3:
            return ScheduleFacts(zero_snr)
    kind = "trained_betas" if scheduler.get("trained_betas") is not None else scheduler.get("beta_schedule", "linear")
    betas = Betas(kind, scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02), len(alpha))
    return ScheduleFacts(bool(scheduler.get("rescale_betas_zero_snr")), betas)


@dataclass(frozen=True, kw_only=True)
class SamplingFacts:
    """What instructions depend on besides a run's settings.

    Attributes:
        family_key: The key of the teacher's family.
        layout: The key of the single-file layout; "" for networks without one.
        prediction_type: What the network predicts.
        zero_snr: Whether the noise schedule ends in pure noise (`rescale_betas_zero_snr`).
        betas: The betas that the schedule is made from, if they are not Stable Diffusion's.
        shift: The shift of a flow-matching schedule; None if it depends on the image size.
        scheduler_options: Options of the student's scheduler besides the teacher's betas.
        has_omega_input: Whether the trained network takes guidance as an input.
        guidance: Where guidance ends up: "input", "baked" or "free".
        classes: The names of the classes of a class-conditional network.
        absent_parts: The text encoders that the teacher works without, and their tokenizers, as in `pipelines.absent_parts`.
    """

    family_key: str = "sd"
    layout: str = "sd1"
    prediction_type: str = "epsilon"
    zero_snr: bool = False
    betas: Betas | None = None
    shift: float | None = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    has_omega_input: bool = False
    guidance: str = "baked"
    classes: tuple[str, ...] = ()
    absent_parts: tuple[str, ...] = ()

    @property
    def family(self) -> TeacherFamily:
        """The teacher's family."""
        return FAMILIES[self.family_key]

    @property
    def is_flow(self) -> bool:
        """Whether the network was trained with flow matching."""
        return self.prediction_type == FLOW

    @property
    def has_single_file(self) -> bool:
        """Whether a checkpoint of the layout can hold a model with the prediction type."""
        return any(
            self.prediction_type in each.architectures for each in self.family.layouts if each.key == self.layout
        )

    @property
    def has_prediction_keys(self) -> bool:
        """Whether checkpoints of the layout state the prediction type by keys."""
        return any(each.has_prediction_keys for each in self.family.layouts if each.key == self.layout)

    @property
    def has_a1111_config(self) -> bool:
        """Whether A1111 reads a configuration file next to checkpoints of the layout."""
        return any(each.has_a1111_config for each in self.family.layouts if each.key == self.layout)


def facts_from_teacher(config: RunConfig, teacher: Teacher) -> SamplingFacts:
    """Return the facts of a run whose teacher is loaded."""
    scheduler, objective, family = teacher.pipeline.scheduler.config, config.objective, teacher.family
    guidance = guidance_of(teacher, config.student, objective.omega)
    return SamplingFacts(
        family_key=family.key,
        layout=family.layout_of(teacher.network.config).key if family.layout_of else "",
        prediction_type=teacher.prediction_type,
        **({} if family.in_pixels else schedule_facts(scheduler)._asdict()),
        scheduler_options=_scheduler_options(config, family, teacher.schedule.num_steps, flow=teacher.is_flow),
        has_omega_input=config.student.kind == "full" and guidance == "input",
        guidance=guidance,
        classes=tuple(teacher.own_prompts) if family.in_pixels else (),
        absent_parts=absent_parts(teacher.pipeline),
    )


def facts_from_pipeline(pipeline: Any, layout: str) -> SamplingFacts:
    """Return the facts about the schedule and the prediction type of a pipeline.

    Args:
        pipeline: A diffusers pipeline.
        layout: The key of its single-file layout, or "".
    """
    family, scheduler = family_of(pipeline), pipeline.scheduler.config
    _, prediction_type = family.denoiser(scheduler)
    return SamplingFacts(
        family_key=family.key,
        layout=layout,
        prediction_type=prediction_type,
        **schedule_facts(scheduler)._asdict(),
    )


def facts_from_run(run: Path, config: RunConfig) -> SamplingFacts:
    """Return the facts that the files of a run record; the defaults where a file is missing."""
    guidance = "free" if omega_range(config) is None else "input" if run_takes_guidance(run) else "baked"
    if config.student.kind == "lora":
        return _from_lora(run, guidance, config.teacher.drop or ())
    folder = run / "pipeline"
    family = family_of_folder(folder) or FAMILIES["sd"]
    network = _json(folder / family.network / "config.json")
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    names = network.get("_labels") or map(str, range(network.get("num_class_embeds") or 0))
    return SamplingFacts(
        family_key=family.key,
        layout=family.layout_of(network).key if family.layout_of and network else "sd1" if family.layouts else "",
        prediction_type=FLOW if is_flow(scheduler) else scheduler.get("prediction_type", "epsilon"),
        **({} if family.in_pixels else schedule_facts(scheduler)._asdict()),
        scheduler_options=_scheduler_options(
            config, family, scheduler.get("num_train_timesteps", 1000), flow=is_flow(scheduler)
        ),
        has_omega_input=run_takes_omega(run),
        guidance=guidance,
        classes=tuple(names) if family.in_pixels else (),
        absent_parts=with_tokenizers(
            part for part in family.optional_encoders if network and not (folder / part / "config.json").is_file()
        ),
    )


def _from_lora(run: Path, guidance: str, dropped: Sequence[str]) -> SamplingFacts:
    family, header = family_of_lora(run / "lora"), dict[str, str]()
    if any((run / "lora").glob("*.safetensors")):
        with safe_open(lora_file(run), framework="pt") as file:
            header = file.metadata() or {}
    version = header.get("ss_base_model_version")
    keys = [layout.key for layout in family.layouts if version in layout.base_versions.values()]
    prediction = header.get("modelspec.prediction_type", "epsilon")
    return SamplingFacts(
        family_key=family.key,
        layout=keys[0] if keys else "sd1" if family.layouts else "",
        prediction_type={"v": "v_prediction", "flow": FLOW}.get(prediction, prediction),
        zero_snr=header.get(ZERO_SNR_KEY) == "true",
        betas=Betas(*parse_json(header[BETAS_KEY])) if BETAS_KEY in header else None,
        shift=float(header[SHIFT_KEY]) if SHIFT_KEY in header else None,
        scheduler_options=read_scheduler_options(header),
        guidance=guidance,
        absent_parts=with_tokenizers(part for part in family.optional_encoders if part in dropped),
    )


def _scheduler_options(config: RunConfig, family: TeacherFamily, num_steps: int, *, flow: bool) -> Mapping[str, Any]:
    return {} if family.in_pixels or flow else config.objective.info.scheduler_options(config.objective, num_steps)


def _json(path: Path) -> dict[str, Any]:
    return parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
