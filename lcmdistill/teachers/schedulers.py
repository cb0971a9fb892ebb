"""Schedulers: the noise schedule that a diffusers config describes, and a student's scheduler on the same one."""

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

from lcmdistill.utils.errors import UsageError

if TYPE_CHECKING:
    from lcmdistill.diffusion.flow import FlowSchedule
    from lcmdistill.diffusion.schedules import NoiseSchedule

COPIED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"what a scheduler of other students and samplers takes over from a config: the noise levels"


DYNAMIC_SHIFT = (
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
)
"what decides a shift that depends on the image size, which pipelines pass to their scheduler as `mu`"


FLOW_SAMPLER = "FlowMatchEulerDiscreteScheduler"
"the sampler of flow-matching teachers: Euler's method, which is DDIM there"


def is_flow(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler config belongs to flow matching: a velocity and shifted sigmas instead of betas."""
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":  # of DPM-Solver and UniPC
        return True
    name = config.get("_class_name")  # only in configs that were read from a file
    return "base_image_seq_len" in config if name is None else str(name).startswith("FlowMatch")


def static_shift(config: Mapping[str, Any]) -> float:
    """Return the shift in a scheduler config. DPM-Solver and UniPC call it `flow_shift`; flow-matching classes, `shift`."""
    is_flow_match = str(config.get("_class_name")).startswith("FlowMatch")
    by_solver = config.get("prediction_type") == "flow_prediction" and not is_flow_match
    return config.get("flow_shift" if by_solver else "shift", 1.0)


def student_scheduler(config: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> Any:
    """Return a student's scheduler on the teacher's noise schedule.

    Args:
        config: The teacher's scheduler config.
        name: The scheduler class for a variance-preserving teacher, or for a flow-matching one.
        options: Options of the class that the student's method sets; flow matching has none.
    """
    if not is_flow(config):
        return vp_scheduler(config, name, options)
    import diffusers

    from lcmdistill.objectives import flow_scheduler_of

    schedule, _ = flow_denoiser(config)
    kind = getattr(diffusers, flow_scheduler_of(name))
    shift: dict[str, Any] = {"shift": schedule.shift}
    if config.get("use_dynamic_shifting"):  # sampled at another size, a student follows its teacher
        shift = {key: config[key] for key in DYNAMIC_SHIFT if key in config}
    return prepare_flow(kind(num_train_timesteps=schedule.num_steps, **shift))


def prepare_flow(scheduler: Any) -> Any:
    """Return a flow-matching scheduler that every pipeline can call. Other schedulers stay as they are.

    DPM-Solver and UniPC, which step from rounded times, become Euler's method with the same shift. Pipelines of U-Nets
    multiply the start noise by `init_noise_sigma` and scale the network's input; flow matching starts at sigma = 1 and scales
    nothing, and its schedulers in diffusers say neither.
    """
    if is_flow(scheduler.config):
        if not type(scheduler).__name__.startswith("FlowMatch"):
            import diffusers

            schedule, _ = flow_denoiser(scheduler.config)
            kind = getattr(diffusers, FLOW_SAMPLER)
            scheduler = kind(num_train_timesteps=schedule.num_steps, shift=schedule.shift)
        scheduler.init_noise_sigma = 1.0
        scheduler.scale_model_input = _unscaled
    return scheduler


def _unscaled(sample: Any, timestep: Any = None) -> Any:
    return sample


def vp_scheduler(config: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> Any:
    """Return a student's scheduler with the teacher's betas and prediction type.

    Args:
        config: The teacher's scheduler config.
        name: The scheduler class.
        options: Options of the class that the student's method sets.
    """
    import diffusers

    copied = {key: config[key] for key in COPIED if key in config}
    usual = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    return getattr(diffusers, name)(**{**usual, **copied, **options})


def ends_in_noise(schedule: "NoiseSchedule") -> bool:
    """Return whether the last time step is pure noise (zero-terminal SNR)."""
    import torch

    return float(schedule.alpha(torch.tensor([schedule.num_steps - 1]))) == 0.0


def denoiser(config: Mapping[str, Any]) -> "tuple[NoiseSchedule, str]":
    """Return the schedule and the prediction type of a teacher, whose scheduler decides between flow matching and VP."""
    return flow_denoiser(config) if is_flow(config) else vp_denoiser(config)


def flow_denoiser(config: Mapping[str, Any], tokens: int | None = None) -> "tuple[FlowSchedule, str]":
    """Return the schedule of a flow-matching scheduler config, and the velocity as the prediction type.

    Args:
        config: The scheduler config.
        tokens: The number of image tokens that decides a dynamic shift; by default that of the native resolution.

    Raises:
        UsageError: The schedule is not supported.
    """
    from lcmdistill.diffusion.flow import flow_schedule
    from lcmdistill.diffusion.parameterization import FLOW

    try:
        return flow_schedule({**config, "shift": static_shift(config)}, tokens), FLOW
    except ValueError as error:
        raise UsageError(str(error)) from error


def vp_denoiser(config: Mapping[str, Any]) -> "tuple[NoiseSchedule, str]":
    """Return the schedule and the prediction type that a diffusers scheduler config describes.

    Raises:
        UsageError: The schedule or the prediction type is not supported.
    """
    import diffusers

    from lcmdistill.diffusion.parameterization import PREDICTION_TYPES
    from lcmdistill.diffusion.schedules import vp_schedule

    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UsageError(f"the teacher predicts {prediction_type!r}; supported are {', '.join(PREDICTION_TYPES)}")
    # A config file keeps the values of schedulers that it was loaded as before, so the class decides what is read.
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if "beta_schedule" not in (signature(kind.__init__).parameters if kind else config):
        raise UsageError(
            f"the teacher's scheduler is a {config.get('_class_name')}, which has no betas: the model was trained with EDM, "
            "which is not supported here; use a teacher with a variance-preserving schedule or with flow matching"
        )
    try:
        schedule = vp_schedule(config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if prediction_type == "epsilon" and ends_in_noise(schedule):
        raise UsageError(
            "the teacher's schedule ends at alpha = 0 (zero-terminal SNR), where students start sampling and an epsilon "
            "prediction carries no information; if the teacher predicts v, pass --prediction-type v_prediction"
        )
    return schedule, prediction_type
