"""The contract of a teacher family: everything the package knows about one kind of diffusers pipeline.

Neither this module nor a family's file imports torch, diffusers or transformers at the top: `lcmdistill info` and model names
need a family's description only. The functions of a family import them when they run.

Shapes: B batch, C latent channels, h w latent size, H W pixels, L tokens, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lcmdistill.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lcmdistill.diffusion.schedules import NoiseSchedule
    from lcmdistill.diffusion.types import Conditioning

Call = Callable[[Any, "Tensor", "Tensor", Mapping[str, "Tensor"], "Tensor | None"], "Tensor"]
"""(network, z, t, c, w) -> raw output: how a family's network is called. `c` is a Conditioning's values; a network without
an omega input ignores `w`."""

Frame = tuple[int, int, int, int, int, int]
"""The original's height and width, the crop's top and left in the resized image, the crop's height and width; in pixels."""

U_NET_LORA_PREFIXES = {"lora_unet_": "unet", "unet.": "unet"}
"the prefixes of U-Net keys in kohya's and in diffusers' LoRA files"


@dataclass(frozen=True)
class Alias:
    """A short name for a model.

    Attributes:
        model: The hub id or the folder of the model.
        license: The license on its hub card; None if the model's own files state it.
    """

    model: str
    license: str | None = None


@dataclass(frozen=True, kw_only=True)
class SingleFileLayout:
    """One of the checkpoint layouts of A1111 and ComfyUI.

    Attributes:
        key: The layout's name, and the folder of its configs in the package's assets.
        title: The model that has this layout, such as "Stable Diffusion 1".
        text_title: What its text encoders are called in messages.
        marker: A key prefix that only this layout has.
        text_encoders: {component: (key prefix, key style)}; the styles are those of export/single_file.py.
        width: The width of the cross-attention's context in published models.
        architectures: {prediction type: ModelSpec architecture}; a type that is absent cannot be stored.
        base_versions: {prediction type: sd-scripts' `ss_base_model_version`}, by which UIs match a LoRA to a base.
        is_v2: sd-scripts' `ss_v2`.
        default_prediction: The prediction type of a file that does not specify it.
        prediction_marks: {part of a ModelSpec architecture: the prediction type that it implies}.
        sample_sizes: {prediction type: latent size}, where it differs from the bundled config's.
        takes_sizes: Whether the U-Net takes pooled embeddings and image sizes.
        has_linear_projections: Whether the U-Net's attention blocks begin and end with linear layers, not with convolutions.
        has_prediction_keys: Whether checkpoints state v-prediction and zero-terminal SNR by the keys `v_pred` and `ztsnr`.
        has_a1111_config: Whether A1111 reads a configuration file next to a checkpoint.
        latent_scale: The factor that programs multiply the VAE's latents by, whatever file they read.
        latent_shift: What they subtract before.
        network_marker: For a transformer: a key of the network, without its prefix, that only this layout has.
        optional_encoders: The text encoders that a pipeline works without. Their tokenizers are not bundled: only --base
            supplies them.
    """

    key: str
    title: str
    text_title: str
    marker: str
    text_encoders: Mapping[str, tuple[str, str]]
    width: int
    architectures: Mapping[str, str]
    base_versions: Mapping[str, str]
    is_v2: bool = False
    default_prediction: str = "epsilon"
    prediction_marks: Mapping[str, str] = field(default_factory=dict)
    sample_sizes: Mapping[str, int] = field(default_factory=dict)
    takes_sizes: bool = False
    has_linear_projections: bool = False
    has_prediction_keys: bool = False
    has_a1111_config: bool = False
    latent_scale: float = 0.18215
    latent_shift: float = 0.0
    network_marker: str = ""
    optional_encoders: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleInfo:
    """What a network may need to know about samples besides their prompts.

    Attributes:
        frames: (B, 6) fp32, a Frame per sample.
        pixels: () -> (B, 3, H, W) in [-1, 1], computed when called.
        encode: Pixels -> scaled latents (B, C, h, w).
        seeds: A seed per sample, for what is random.
    """

    frames: Tensor
    pixels: Callable[[], Tensor]
    encode: Callable[[Tensor], Tensor]
    seeds: Sequence[int]


def whole_frame(height: int, width: int) -> Frame:
    """Return the frame of an uncropped image, such as one that a teacher generates."""
    return (height, width, 0, 0, height, width)


def needs_caption(caption: str) -> str | None:
    """Return why a text-to-image network cannot use a sample with this caption; None if it can."""
    return None if caption else "no caption"


def usual_denoiser(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """Return the schedule and the prediction type of a scheduler's config, VP or flow matching. Raises UsageError."""
    from lcmdistill.teachers import schedulers

    return schedulers.denoiser(config)


def usual_student_scheduler(
    schedule: NoiseSchedule, config: Mapping[str, Any], name: str, options: Mapping[str, Any]
) -> Any:
    """Return the named student scheduler on the noise schedule of the teacher's scheduler config."""
    from lcmdistill.teachers.schedulers import student_scheduler

    return student_scheduler(config, name, options)


def text_prompt_kwargs(pipeline: Any, prompts: Sequence[str], negative: str | None = None) -> dict[str, Any]:
    """Return prompts as plain strings, with one negative prompt for all of them."""
    kwargs: dict[str, Any] = {"prompt": list(prompts)}
    return kwargs if negative is None else kwargs | {"negative_prompt": [negative] * len(prompts)}


def no_condition(samples: SampleInfo) -> Conditioning:
    """Return the conditioning of a network that sees prompts only: nothing."""
    from lcmdistill.diffusion.types import Conditioning

    return Conditioning({})


def transformer_kwargs(family: TeacherFamily, network: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the keyword arguments of a diffusers transformer, which names the latents `hidden_states`."""
    return {"hidden_states" if name == "sample" else name: value for name, value in inputs.items()}


def published_guidance(scale: float) -> dict[str, Any]:
    """Return `TeacherFamily.published` of a family that was published with one guidance scale.

    It is fixed: the student has no input for another one, and is sampled without CFG.
    """
    omega = scale - 1
    return {
        "data.guidance_scale": scale,
        "objective.w_min": omega,
        "objective.w_max": omega,
        "run.validation_guidance_scale": 1.0,
    }


def with_tokenizers(parts: Iterable[str]) -> tuple[str, ...]:
    """Return parts of a pipeline, and after each text encoder its tokenizer, which is left out with it."""
    found: list[str] = []
    for part in parts:
        found += [part, part.replace("text_encoder", "tokenizer")] if part.startswith("text_encoder") else [part]
    return tuple(found)


def unchanged(latents: Tensor) -> Tensor:
    """Return latents (B, C, h, w) as they are: most pipelines take them so."""
    return latents


def unchanged_of_size(latents: Tensor, height: int, width: int) -> Tensor:
    """Return the latents (B, C, h, w) of a pipeline, which has not packed them."""
    return latents


def no_extra_kwargs(count: int, height: int, width: int, image_and_mask: tuple[Any, Any] | None) -> dict[str, Any]:
    """Return no arguments: the pipeline needs prompts and sizes only."""
    return {}


@dataclass(frozen=True, kw_only=True)
class TeacherFamily:
    """What the package knows about one family of pipelines. There is one instance per family, in the family's file.

    Attributes:
        key: The key in FAMILIES.
        title: The family's name in messages and on the report.
        pipeline_classes: The diffusers pipeline classes in `model_index.json`; the first one opens single files and LoRAs.
        network: The pipeline's component that is distilled: "unet" or "transformer".
        network_class: The diffusers class of that component.
        network_label: What that component is called in messages.
        text_encoders: The pipeline's text encoders, in the order in which prompts pass through them.
        task: The `pipeline_tag` of the model card.
        tags: The tags of the model card, besides those of the method.
        in_pixels: Whether the network denoises pixels and there is no VAE.
        takes_mask: Whether the network also sees a mask and the image around it (inpainting).
        input_channels: The channels of the network's input in published models with 4 latent channels.
        sample_size_is_default: Whether the network's `sample_size` is only the pipeline's default size.
        student_kinds: The kinds of students that can be trained: "full", "lora".
        pipeline_multiple: What the sides of an image must be multiples of for the pipeline, in pixels.
        largest_side: (network config, VAE factor) -> the longest side of an image that the network's table of positions
            covers, in pixels; None if there is no such limit.
        token_side: The side of the square of latents that the pipeline packs into one token, besides the network's own patches.
        pack: (B, C, h, w) -> latents as the pipeline takes them.
        unpack: (latents of the pipeline, h, w) -> (B, C, h, w).
        embeds_guidance: Whether the published networks are distilled to take the guidance scale as an input. There is then no
            classifier-free guidance, and `call` also takes `guidance`, the one scale of a run.
        call: (network, z, t, c, w) -> raw output (B, C, h, w). `c` is a Conditioning's values; a network without an
            omega input ignores `w`.
        example_inputs: (network, generator, batch) -> fixed conditioning inputs for verification, under the names of the
            network's own arguments and of `added_inputs`.
        added_inputs: The inputs that the network takes inside its `added_cond_kwargs`.
        network_kwargs: (family, network, inputs) -> keyword arguments of the network's forward.
        encode_prompts: (pipeline, prompts) -> the part of the Conditioning that prompts decide. The empty prompt is the
            pipeline's own unconditional input.
        condition: (SampleInfo) -> the part of the Conditioning that samples decide.
        condition_is_random: Whether `condition` draws random numbers.
        prompt_kwargs: (pipeline, prompts, negative prompt) -> arguments of a pipeline call.
        extra_call_kwargs: (count, height, width, (image, mask) or None) -> further arguments of a pipeline call.
        default_prompts: (pipeline) -> the prompts to use where none are specified; () for the bundled ones.
        takes_captions: (network config) -> whether training images need captions.
        rejects: (pipeline, caption) -> why a sample with this caption cannot be used; None if it can.
        own_prompts: (pipeline) -> the prompts to generate training data for where the bundled prompts do not apply.
        check: Raise UsageError for a pipeline that has the right class and the wrong parts.
        vae: (pipeline) -> its VAE, whose `encode` returns a posterior; in pixel space, an object that passes pixels through.
        vae_levels: The entry of the VAE's config that has one element per level of resolution.
        denoiser: (scheduler config) -> the schedule and the prediction type that the network was trained with.
        sampler: (pipeline, schedule, prediction type, prompts, noise, steps, guidance scale) -> latents, where no diffusers
            pipeline samples such a network.
        data_scheduler: The diffusers scheduler that generates training latents.
        reference_scheduler: The diffusers scheduler that generates the images a student is compared with.
        student_scheduler: (schedule, the teacher's scheduler config, name, options) -> the scheduler of a student's
            pipeline.
        student_pipeline_class: (has an omega input, has sampling options) -> the pipeline class of a full student;
            None keeps the teacher's.
        published: {"section.key": value} of settings published for the family, used where none are specified.
        lora_modules: The layers that published LoRAs adapt, by name suffix.
        lora_formats: The LoRA export formats; a run writes the first one. () if the family has no LoRA format.
        lora_prefixes: {prefix of a key in a LoRA file: the component it belongs to}.
        layouts: The single-file layouts; () if the family has none.
        layout_of: (network config) -> the layout of a model of this family.
        single_file_options: Pipeline arguments for the components that a single file lacks.
        onnx_classes: {diffusers pipeline class: optimum's ONNX class}; {} if ONNX export is not supported.
        onnx_options: (pipeline) -> entries of an ONNX folder's `model_index.json` besides the components.
        text_layers_read: Whether pipelines read the hidden states of the text encoders' layers.
        clip_skip: How CLIP's last layers are skipped: "baked" into the saved weights, "recorded" in `model_index.json`, or
            None if there is no CLIP.
        clip_skip_offset: A1111's clip skip minus diffusers' `clip_skip`.
        fp32_layers: The text encoder layers, by name suffix, that overflow in half precision.
        aliases: The short names of published models.
        describe: (pipeline class, network config) -> the family's name, as exact as the files allow.
    """

    key: str
    title: str
    pipeline_classes: tuple[str, ...]
    network: str
    network_class: str
    network_label: str
    text_encoders: tuple[str, ...]
    task: str
    tags: tuple[str, ...]
    in_pixels: bool = False
    takes_mask: bool = False
    input_channels: int = 4
    sample_size_is_default: bool = True
    student_kinds: tuple[str, ...] = ("full", "lora")
    pipeline_multiple: int = 8
    largest_side: Callable[[Mapping[str, Any], int], int | None] = lambda config, vae_factor: None
    token_side: int = 1
    pack: Callable[[Tensor], Tensor] = unchanged
    unpack: Callable[[Tensor, int, int], Tensor] = unchanged_of_size
    embeds_guidance: bool = False

    call: Call
    example_inputs: Callable[[Any, Generator, int], dict[str, Tensor]]
    added_inputs: tuple[str, ...] = ()
    network_kwargs: Callable[[TeacherFamily, Any, Mapping[str, Tensor]], dict[str, Any]]
    encode_prompts: Callable[[Any, Sequence[str]], Conditioning]
    condition: Callable[[SampleInfo], Conditioning]
    condition_is_random: bool = False
    prompt_kwargs: Callable[[Any, Sequence[str], str | None], dict[str, Any]] = text_prompt_kwargs
    extra_call_kwargs: Callable[[int, int, int, tuple[Any, Any] | None], dict[str, Any]] = no_extra_kwargs
    default_prompts: Callable[[Any], tuple[str, ...]] = lambda pipeline: ()
    takes_captions: Callable[[Mapping[str, Any]], bool] = lambda config: True

    rejects: Callable[[Any, str], str | None] = lambda pipeline, caption: needs_caption(caption)
    own_prompts: Callable[[Any], tuple[str, ...]] = lambda pipeline: ()

    check: Callable[[Any], None]
    vae: Callable[[Any], Any] = lambda pipeline: pipeline.vae
    vae_levels: str = "block_out_channels"
    denoiser: Callable[[Mapping[str, Any]], tuple[NoiseSchedule, str]] = usual_denoiser
    sampler: Callable[[Any, NoiseSchedule, str, Sequence[str], Tensor, int, float], Tensor] | None = None
    data_scheduler: str = "DPMSolverMultistepScheduler"
    reference_scheduler: str = "DDIMScheduler"
    student_scheduler: Callable[[NoiseSchedule, Mapping[str, Any], str, Mapping[str, Any]], Any] = (
        usual_student_scheduler
    )
    student_pipeline_class: Callable[[bool, bool], str | None] = lambda has_omega_input, has_options: None
    published: Mapping[str, Any]

    lora_modules: tuple[str, ...]
    lora_formats: tuple[str, ...]
    lora_prefixes: Mapping[str, str]
    layouts: tuple[SingleFileLayout, ...]
    layout_of: Callable[[Mapping[str, Any]], SingleFileLayout] | None
    single_file_options: Mapping[str, Any] = field(default_factory=dict)
    onnx_classes: Mapping[str, str]
    onnx_options: Callable[[Any], dict[str, Any]] = lambda pipeline: {}
    text_layers_read: bool = False
    clip_skip: Literal["baked", "recorded"] | None
    clip_skip_offset: int = 1
    fp32_layers: tuple[str, ...] = ()
    aliases: Mapping[str, Alias]
    describe: Callable[[str, Mapping[str, Any]], str]

    def a1111_clip_skip(self, count: int) -> int:
        """Return A1111's clip skip for diffusers' `clip_skip`. A1111 counts from the layer that is read."""
        return count + self.clip_skip_offset

    def vae_factor(self, config: Mapping[str, Any]) -> int:
        """Return the downscale factor of a VAE's config: pixels per latent pixel."""
        levels = config.get(self.vae_levels, [0])
        if not isinstance(levels, list | tuple):
            raise UsageError(
                f"the VAE's config.json states {levels!r} for {self.vae_levels}, and not a list; restore the file"
            )
        return 2 ** (len(levels) - 1)

    def token_pixels(self, config: Mapping[str, Any], vae_factor: int) -> int:
        """Return the side in pixels of what the network takes as one token, or as one latent pixel.

        Args:
            config: The network's config.
            vae_factor: Pixels per latent pixel.
        """
        return vae_factor * config.get("patch_size", 1) * self.token_side

    def size_multiple(self, config: Mapping[str, Any], vae_factor: int) -> int:
        """Return what the sides of an image must be multiples of, in pixels; the arguments are those of `token_pixels`."""
        return math.lcm(self.token_pixels(config, vae_factor), self.pipeline_multiple)

    @property
    def optional_encoders(self) -> tuple[str, ...]:
        """The text encoders that its pipelines work without."""
        return tuple(part for layout in self.layouts for part in layout.optional_encoders)

    @property
    def run_lora_format(self) -> str:
        """The LoRA format that a run writes."""
        return self.lora_formats[0]

    @property
    def uses_peft_only(self) -> bool:
        """Whether peft's is the only LoRA format that programs read for this family."""
        return self.lora_formats == ("peft",)
