"""The contract of an objective.

Each objective is a frozen dataclass in a file of its own. Its fields are the paper's hyperparameters and the [objective]
section of the configuration. Its methods are the paper's algorithm box, written on the pair (x0, eps).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from lcmdistill.diffusion.flow import sampled_sigmas
from lcmdistill.diffusion.random import Rng
from lcmdistill.diffusion.schedules import NoiseSchedule
from lcmdistill.diffusion.types import Batch, Conditioning, Network, TeacherNetwork
from lcmdistill.objectives.common import skipping_grid_options

Omega = Literal["input", "teacher", "baked", "none"]
"how guidance reaches a full student: by an omega input of its own, as it reaches its teacher, in its weights, or never"


class StepCounts(NamedTuple):
    """The numbers of sampling steps that a student is made for."""

    recommended: int
    low: int
    high: int

    @property
    def span(self) -> str:
        """All numbers in words, such as "2 to 8 steps"."""
        numbers = str(self.low) if self.low == self.high else f"{self.low} to {self.high}"
        return f"{numbers} step{'s' * (self.high > 1)}"

    @property
    def text(self) -> str:
        """The numbers in words, such as "4 steps (2 to 8)"."""
        others = "" if self.low == self.high else f" ({self.low} to {self.high})"
        return f"{self.recommended} step{'s' * (self.recommended > 1)}{others}"


EMPTY_PROMPTS: Mapping[str, Any] = MappingProxyType({"data.caption_drop": 0.1})
"for a student without guidance of its own: the empty prompt is trained too, for CFG to pull away from"


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """What every program and page needs to know about a method. It lives on the objective's class, in its one file.

    Attributes:
        key: The name in OBJECTIVES and in `objective.name`.
        title: What a full student is called, such as "LCM".
        lora_title: What a LoRA student is called, such as "LCM-LoRA".
        paper: Authors, year and arXiv number.
        algorithm: The algorithm box or section of the paper.
        scheduler: The diffusers scheduler class that samples a latent student.
        scheduler_options: (objective, T) -> options of that class besides the teacher's betas.
        deterministic: Whether the sampler is a plain ODE sampler, which teachers have as well, instead of one for few-step
            models.
        sampler: The scheduler's name in A1111.
        comfyui_sampler: The `sampler` of ComfyUI's KSampler.
        sampling_options: Options that the method adds to a pipeline call, with their defaults, such as {"eta": 0.3}.
        is_flow: Whether these fields are those of students of flow-matching teachers.
        flow: The fields from `scheduler` to here that differ for students of flow-matching teachers; see `on_flow`.
        steps: (objective) -> the numbers of sampling steps that a student is made for.
        relation: How the student relates to its start: "distilled from", "fine-tuned from", "trained from".
        spaces: Where the method works: "latent", "pixel" or both.
        student_kinds: What it trains: "full", "lora" or both.
        start: What it starts from: "teacher" (a diffusion model) or "student" (a finished few-step model).
        needs_images: Whether it cannot learn from latents that the teacher generates.
        prompts_only: Whether it learns from prompts alone: nothing is generated or encoded but the captions of its data.
        may_collapse: Whether its runs are watched for collapse, which its loss does not show.
        train_step: The kind of training step, a key of `training.step_kinds`.
        tags: Tags of the model card.
        summary: A format string over the objective's fields that states how it steps, such as "k = {skip}".
        defaults: Defaults that the method sets outside [objective], {"section.key": value}.
        lora_defaults: Further ones of a LoRA student.
        alias_defaults: Further ones of a teacher known by name, {"tiny": {...}}.
        free_guidance_defaults: Further ones where `objective.guidance` is free.
        mutable_on_resume: Fields of the objective that a resumed run may be given differently.
        decided_by_teacher: Fields of the objective that the teacher's files decide unless they are set.
    """

    key: str
    title: str
    lora_title: str
    paper: str
    algorithm: str
    scheduler: str = "LCMScheduler"
    scheduler_options: Callable[[Any, int], Mapping[str, Any]] = skipping_grid_options
    deterministic: bool = False
    sampler: str = "LCM"
    comfyui_sampler: str = "lcm"
    sampling_options: Mapping[str, float] = field(default_factory=dict)
    is_flow: bool = False
    flow: Mapping[str, Any] = field(default_factory=lambda: {"scheduler": "FlowMatchLCMScheduler"})
    steps: Callable[[Any], StepCounts] = lambda objective: StepCounts(4, 2, 8)
    relation: str = "distilled from"
    spaces: tuple[str, ...] = ("latent",)
    student_kinds: tuple[str, ...] = ("full", "lora")
    start: Literal["teacher", "student"] = "teacher"
    needs_images: bool = False
    prompts_only: bool = False
    may_collapse: bool = False
    train_step: str = "consistency"
    tags: tuple[str, ...] = ("consistency-model",)
    summary: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    lora_defaults: Mapping[str, Any] = field(default_factory=dict)
    alias_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    free_guidance_defaults: Mapping[str, Any] = field(default_factory=lambda: EMPTY_PROMPTS)
    mutable_on_resume: tuple[str, ...] = ()
    decided_by_teacher: tuple[str, ...] = ()

    def describe(self, objective: Any) -> str:
        """Return how an objective steps, in words: "ddim solver, k = 20"."""
        return self.summary.format_map(vars(objective))

    def on_flow(self) -> "MethodInfo":
        """Return how the method's students of flow-matching teachers are sampled: with schedulers that have no options."""
        return replace(self, is_flow=True, scheduler_options=lambda objective, num_steps: {}, **self.flow)

    def for_teacher(self, *, is_flow: bool) -> "MethodInfo":
        """Return how the method's students are sampled, given whether their teacher is one of flow matching."""
        return self.on_flow() if is_flow else self

    def pipeline_call(self, steps: int, guidance_scale: float) -> str:
        """Return the Python code that generates an image with a pipeline of this method's students."""
        options = "".join(f", {name}={value:g}" for name, value in self.sampling_options.items())
        times = f", sigmas={[round(sigma, 4) for sigma in sampled_sigmas(steps)]}" if self.is_flow else ""
        return f'pipeline("a prompt", num_inference_steps={steps}{times}, guidance_scale={guidance_scale:g}{options})'


TRAILING_DDIM: Mapping[str, Any] = MappingProxyType(
    {
        "scheduler": "DDIMScheduler",
        # At the last step diffusers then returns x0, as ComfyUI and A1111 do.
        "scheduler_options": lambda objective, num_steps: {"timestep_spacing": "trailing", "set_alpha_to_one": True},
        "deterministic": True,
        "sampler": "Euler",
        "comfyui_sampler": "euler",
        "flow": {"scheduler": "FlowMatchEulerDiscreteScheduler"},
    }
)
"the MethodInfo of students that plain DDIM samples from edge to edge of `schedules.phase_edges`"


@dataclass(frozen=True, kw_only=True)
class State:
    """One micro-batch as the teacher's part leaves it, without gradients. A method adds what else its loss needs.

    The student is evaluated at (z_t, t, w), the target network at (z_s, s, w).

    Attributes:
        t: The noisier time of each pair, (B,).
        s: The cleaner time, s < t, (B,).
        z_t: The noised latents at t, (B, C, h, w) fp32.
        z_s: The latents at s that belong to the same trajectory.
        w: Omega, (B,) fp32; None where guidance is free or absent.
    """

    t: Tensor
    s: Tensor
    z_t: Tensor
    z_s: Tensor
    w: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class EndState(State):
    """A State and the time to which the student's map leads. end: (B,), at most s."""

    end: Tensor


class Objective(Protocol):
    """A method as two functions and an identity.

    `teacher_step` never sees the student, so it may run ahead in a thread or a stream, on another device, or on cached
    teacher outputs. `loss` sees the student and the target network only. Both are free to look at shapes and channels and
    to draw from any stream of `rng`; draws that no teacher output depends on are requested as `fresh`.
    """

    info: ClassVar[MethodInfo]

    @property
    def omega(self) -> Omega:
        """How guidance reaches a full student."""
        ...

    @property
    def same_dropout(self) -> bool:
        """Whether the target network has the student's dropout with the same mask, or none."""
        ...

    @property
    def num_forwards(self) -> Mapping[str, int]:
        """Forwards per sample: {"teacher": 2, "target": 1, "student": 1}. Declared, and checked by a test that counts."""
        ...

    def ema_decay_at(self, step: int) -> float:
        """Return mu, the rate of the target's EMA after a step; 0 makes the target the live student."""
        ...

    def check(self, num_steps: int) -> None:
        """Raise ValueError, in one sentence, if the fields are impossible for a teacher of T = num_steps."""
        ...

    def sample_timesteps(self, schedule: NoiseSchedule, rng: Rng) -> tuple[Tensor, Tensor]:
        """Draw the times (t, s), s < t, each (B,): the same ones whenever it is called with the same rng."""
        ...

    def teacher_step(self, teacher: TeacherNetwork, schedule: NoiseSchedule, batch: Batch, rng: Rng) -> Any:
        """Draw times, noise and omega, and let the teacher take its step. Runs without gradients; returns a State."""
        ...

    def loss(self, student: Network, target: Network, schedule: NoiseSchedule, batch: Batch, state: Any) -> Tensor:
        """Return the loss of each sample, (B,) fp32, with gradients to the student only.

        The student comes first: the target network may still be at work in another thread.
        """
        ...


class CriticOptions(NamedTuple):
    """The network that learns the distribution of the student's own outputs.

    Attributes:
        learning_rate: Of its own optimizer.
        rank: LoRA rank of its adapter; None for the student's.
    """

    learning_rate: float
    rank: int | None = None


class StudentLoss(NamedTuple):
    """The student's loss in distribution matching, and what it is made of; each (B,) fp32, all but the loss without gradient.

    Attributes:
        loss: The loss of each sample.
        tau: The noise level that it was taken at, as a fraction of the schedule.
        numbers: What a run logs about it, such as {"teacher_gap": ...}; see METRICS.
    """

    loss: Tensor
    tau: Tensor
    numbers: Mapping[str, Tensor]


class DistributionMatching(Protocol):
    """A method that matches distributions, as three functions and an identity.

    The teacher knows the distribution of images, a critic learns the distribution of the student's outputs, and the student
    moves along the difference of both. A training step is, for all its micro-batches: `rollout`; an update of the critic by
    `critic_loss`, one or several times; an update of the student by `student_loss`. No image is needed. All draws come from
    `rng`, by stream name.
    """

    info: ClassVar[MethodInfo]

    @property
    def omega(self) -> Omega:
        """How guidance reaches a full student."""
        ...

    @property
    def critic(self) -> CriticOptions:
        """The critic's learning rate and rank."""
        ...

    @property
    def critic_steps(self) -> int:
        """Updates of the critic per update of the student."""
        ...

    @property
    def num_forwards(self) -> Mapping[str, int]:
        """Forwards per sample: {"teacher": 2, "student": 5, "critic": 2}. Declared, and checked by a test that counts."""
        ...

    @property
    def num_backwards(self) -> Mapping[str, int]:
        """Backward passes per sample: {"student": 1, "critic": 1}."""
        ...

    def ema_decay_at(self, step: int) -> float:
        """Return mu, the rate of the EMA that is sampled, after a step."""
        ...

    def check(self, num_steps: int) -> None:
        """Raise ValueError, in one sentence, if the fields are impossible for a teacher of T = num_steps."""
        ...

    def rollout(self, student: Network, schedule: NoiseSchedule, cond: Conditioning, noise: Tensor) -> Any:
        """Return the student's own trajectory from noise, (B, C, h, w). Runs without gradients."""
        ...

    def critic_loss(
        self, critic: Network, schedule: NoiseSchedule, cond: Conditioning, rollout: Any, rng: Rng, draw: int = 0
    ) -> Tensor:
        """Return the critic's loss of each sample, (B,) fp32, with gradients to the critic only.

        Args:
            critic: The critic's network.
            schedule: The teacher's schedule.
            cond: The samples' prompts.
            rollout: What `rollout` returned.
            rng: The draws of the micro-batch.
            draw: Number of the critic's update within the step: each has times and noise of its own.
        """
        ...

    def student_loss(
        self,
        student: Network,
        critic: Network,
        teacher: TeacherNetwork,
        schedule: NoiseSchedule,
        cond: Conditioning,
        rollout: Any,
        rng: Rng,
    ) -> StudentLoss:
        """Return the student's loss, with gradients to the student only.

        The student is the first network that is evaluated. Critic and teacher run without gradients.
        """
        ...


def backward_passes(objective: Any) -> Mapping[str, int]:
    """Return the backward passes per sample, {"student": 1}: of the consistency family one."""
    return getattr(objective, "num_backwards", {"student": 1})


def step_cost(objective: Any, *, cached_teacher: bool = False, adapter: bool = False) -> int:
    """Return the arithmetic of one training sample, in forward passes.

    A backward pass takes twice a forward pass: the gradients of inputs, and those of weights, which the frozen network under
    an adapter does not need. Recomputed activations do not count.

    Args:
        objective: The method.
        cached_teacher: Whether the teacher's outputs are read instead of computed.
        adapter: Whether adapters are trained.
    """
    forwards = {**objective.num_forwards, **({"teacher": 0} if cached_teacher else {})}
    return sum(forwards.values()) + sum(backward_passes(objective).values()) * (1 if adapter else 2)
