"""What other programs call our settings and options: kohya's scripts, OneTrainer, diffusers' scripts, A1111. No torch here.

Words are written with underscores; the command line accepts hyphens and underscores alike. A word that means the same, with
the same values, is accepted in place of the option. A word that means something close is explained.
"""

import difflib
from collections.abc import Collection

SETTINGS: dict[str, str] = {
    "lr": "optim.learning_rate",
    "unet_lr": "optim.learning_rate",
    "max_steps": "optim.max_train_steps",
    "num_train_steps": "optim.max_train_steps",
    "train_steps": "optim.max_train_steps",
    "train_batch_size": "optim.batch_size",
    "per_device_train_batch_size": "optim.batch_size",
    "bs": "optim.batch_size",
    "gradient_accumulation": "optim.gradient_accumulation_steps",
    "accumulation_steps": "optim.gradient_accumulation_steps",
    "grad_accum": "optim.gradient_accumulation_steps",
    "accumulate": "optim.gradient_accumulation_steps",
    "accumulate_grad_batches": "optim.gradient_accumulation_steps",
    "lr_warmup_steps": "optim.warmup_steps",
    "lr_schedule": "optim.lr_scheduler",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_weight_decay": "optim.weight_decay",
    "adam_epsilon": "optim.adam_eps",
    "optimizer_type": "optim.optimizer",
    "gradient_clipping": "optim.max_grad_norm",
    "model": "teacher.model",
    "teacher_model": "teacher.model",
    "base_model": "teacher.model",
    "pretrained_model_name_or_path": "teacher.model",
    "pretrained_teacher_model": "teacher.model",
    "pretrained_vae_model_name_or_path": "teacher.vae",
    "base_lora": "teacher.loras",
    "teacher_loras": "teacher.loras",
    "train_data_dir": "data.sources",
    "instance_data_dir": "data.sources",
    "train_data": "data.sources",
    "dataset": "data.sources",
    "train_shards_path_or_url": "data.sources",
    "dataset_name": "data.sources",
    "size": "data.resolution",
    "image_size": "data.resolution",
    "max_train_samples": "data.max_samples",
    "random_flip": "data.flip",
    "flip_aug": "data.flip",
    "proportion_empty_prompts": "data.caption_drop",
    "caption_dropout_rate": "data.caption_drop",
    "enable_bucket": "data.buckets",
    "output_dir": "run.output",
    "out": "run.output",
    "out_dir": "run.output",
    "vram": "run.memory",
    "max_memory": "run.memory",
    "mixed_precision": "run.precision",
    "logging_with": "run.report_to",
    "log_with": "run.report_to",
    "tracker": "run.report_to",
    "hub_model_id": "run.push_to_hub",
    "checkpointing_steps": "run.checkpoint_every",
    "save_every_n_steps": "run.checkpoint_every",
    "save_steps": "run.checkpoint_every",
    "checkpoints_total_limit": "run.keep_checkpoints",
    "save_total_limit": "run.keep_checkpoints",
    "validation_steps": "run.validate_every",
    "val_steps": "run.validate_every",
    "eval_steps": "run.validate_every",
    "sample_every_n_steps": "run.validate_every",
    "validation_prompt": "run.validation_prompts",
    "torch_compile": "run.compile",
    "fsdp": "run.shard",
    "sharding_strategy": "run.shard",
    "network_dim": "student.rank",
    "network_rank": "student.rank",
    "lora_rank": "student.rank",
    "lora_r": "student.rank",
    "network_alpha": "student.alpha",
    "lora_alpha": "student.alpha",
    "network_weights": "student.start",
    "images": "data.sources",
    "network_dropout": "student.dropout",
    "lora_dropout": "student.dropout",
    "lora_target_modules": "student.target_modules",
    "method": "objective.name",
    "loss_type": "objective.distance",
    "k": "objective.skip",
    "ema": "objective.ema_decay",
}
"word -> the setting that it means"

OPTIONS: dict[str, str] = {
    "num_inference_steps": "steps",
    "inference_steps": "steps",
    "sampling_steps": "steps",
    "num_steps": "steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "scale": "guidance_scale",
    "negative": "negative_prompt",
    "neg": "negative_prompt",
    "num_images_per_prompt": "num_images",
    "num_samples": "num_images",
    "num": "num_images",
    "count": "num_images",
    "batch_count": "num_images",
    "n": "num_images",
    "n_iter": "num_images",
    "size": "resolution",
    "image_size": "resolution",
    "init_image": "image",
    "init_img": "image",
    "w": "width",
    "h": "height",
    "sampler": "scheduler",
    "sampling_method": "scheduler",
    "sampler_name": "scheduler",
    "denoising_strength": "strength",
    "mask_image": "mask",
    "lora_weight": "lora_scale",
    "base_model": "model",
    "pretrained_model_name_or_path": "model",
    "ckpt": "model",
    "prompt_file": "prompts",
    "prompts_file": "prompts",
    "output_dir": "output",
    "outdir": "output",
    "out": "output",
    "mixed_precision": "precision",
    "save_precision": "dtype",
    "precision": "dtype",
    "omega": "guidance_scale",
}
"word -> the option that it means, of commands that do not train"

FLAGS: dict[str, tuple[str, str]] = {
    "fp16": ("precision", "fp16"),
    "bf16": ("precision", "bf16"),
    "fp32": ("precision", "fp32"),
    "no_half": ("precision", "fp32"),
    "cpu": ("device", "cpu"),
    "cuda": ("device", "cuda"),
    "tensorboard": ("report-to", "tensorboard"),
    "wandb": ("report-to", "wandb"),
}
"a flag -> the option and the value that it stands for"

VALUES: dict[tuple[str, str], str] = {("precision", "no"): "fp32", ("precision", "float16"): "fp16"}
VALUES |= {("precision", "bfloat16"): "bf16", ("precision", "float32"): "fp32"}
VALUES |= {("format", "lora"): "kohya", ("format", "checkpoint"): "single-file", ("format", "ckpt"): "single-file"}
"(option, another program's value) -> our value"

EXPLAINED: dict[str, str] = {
    "steps": "--max-train-steps sets the length of the training; a student generates in any of 1 to 8 steps (sample --steps)",
    "num_train_epochs": "the length of a run is --max-train-steps; --dry-run states how many passes over the data that makes",
    "max_train_epochs": "the length of a run is --max-train-steps; --dry-run states how many passes over the data that makes",
    "epochs": "the length of a run is --max-train-steps; --dry-run states how many passes over the data that makes",
    "num_ddim_timesteps": "the solver's grid has T / k points: 50 points of 1000 time steps are --set objective.skip=20",
    "resume": "run the same command again to resume",
    "resume_from_checkpoint": "run the same command again to resume",
    "guidance_scale": "the trained range is --set objective.w_min=W and objective.w_max=W, each the guidance scale minus 1",
    "cfg": "the trained range is --set objective.w_min=W and objective.w_max=W, each the guidance scale minus 1",
    "cfg_scale": "the trained range is --set objective.w_min=W and objective.w_max=W, each the guidance scale minus 1",
    "gradient_checkpointing": "--memory turns it on where it is needed; to force it, use --set run.gradient_checkpointing=true",
    "use_8bit_adam": "--memory turns it on where it is needed; to force it, use --set optim.optimizer=adamw8bit",
    "xformers": "attention uses PyTorch's own fused kernels; remove this option",
    "enable_xformers_memory_efficient_attention": "attention uses PyTorch's own fused kernels; remove this option",
    "allow_tf32": "products are computed in --precision; remove this option",
    "cache_latents": "latents are always cached, see data.cache_dir; remove this option",
    "cache_latents_to_disk": "latents are always cached, see data.cache_dir; remove this option",
    "network_module": "distill-lora trains a LoRA of --target-modules; remove this option",
    "use_lora": "use lcmdistill distill-lora to train a LoRA",
    "lora": "use lcmdistill distill-lora to train a LoRA, and --teacher-lora FILE to fuse one into the teacher",
    "num_gpus": "start one process per GPU: torchrun --nproc-per-node N -m lcmdistill ...",
    "num_processes": "start one process per GPU: torchrun --nproc-per-node N -m lcmdistill ...",
    "logging_dir": "metrics and the tracker's files are in the run folder; use --output for that",
    "output_name": "the last part of --output is the name of the run and of its LoRA file",
    "name": "the last part of --output is the name of the run: --output runs/NAME",
    "run_name": "the last part of --output is the name of the run: --output runs/NAME",
    "wandb_run_name": "the last part of --output is the name of the run: --output runs/NAME",
    "num_epochs": "the length of a run is --max-train-steps; --dry-run states how many passes over the data that makes",
    "save_every_n_epochs": "checkpoints are counted in steps: --set run.checkpoint_every=N",
    "dataloader_num_workers": "latents are cached and read ahead by a thread; remove this option",
    "max_data_loader_n_workers": "latents are cached and read ahead by a thread; remove this option",
    "noise_offset": "the teacher's own noise is used; remove this option",
    "min_snr_gamma": "the method weights its own loss; remove this option",
    "snr_gamma": "the method weights its own loss; remove this option",
    "shuffle_caption": "captions are encoded once and cached; remove this option",
    "center_crop": "images are cropped at the center by default, see data.crop; remove this option",
    "sdpa": "attention uses PyTorch's own fused kernels; remove this option",
    "mem_eff_attn": "attention uses PyTorch's own fused kernels; remove this option",
    "lowram": "--memory N plans for a GPU of N GiB; remove this option",
    "overwrite": "use another --output, or remove the run first: lcmdistill runs remove NAME",
    "force": "use another --output, or remove the run first: lcmdistill runs remove NAME",
    "gpus": "start one process per GPU: torchrun --nproc-per-node N -m lcmdistill ...",
    "gpu_ids": "select GPUs with CUDA_VISIBLE_DEVICES, or one with --device cuda:1",
    "save_model_as": "use lcmdistill export RUN --format kohya or single-file after the run",
    "caption_extension": "captions are read from .txt and .caption files and metadata.jsonl; remove this option",
}
"a word without an option of the same meaning -> what to do instead"

COMMANDS: dict[str, str] = {
    "train": "distill (a full student) or distill-lora (a LoRA)",
    "finetune": "distill (a full student) or distill-lora (a LoRA)",
    "lora": "distill-lora",
    "train-lora": "distill-lora",
    "lcm": "distill",
    "lcm-lora": "distill-lora",
    "generate": "sample",
    "txt2img": "sample",
    "img2img": "sample",
    "inference": "sample",
    "infer": "sample",
    "eval": "evaluate",
    "validate": "evaluate",
    "test": "evaluate",
    "compare": "evaluate",
    "convert": "export",
    "save": "export",
    "merge": "export",
    "show": "info",
    "inspect": "info",
    "describe": "info",
    "list": "runs",
    "ls": "runs",
    "delete": "runs remove",
    "rm": "runs remove",
    "clean": "runs clean or cache clear",
    "resume": "distill or distill-lora, with the same options again",
    "config": "distill --config list",
    "configs": "distill --config list",
    "help": "--help",
    "version": "--version",
}
"a word -> the command that it means"


def normalized(word: str) -> str:
    """Return an option or a setting's name as the tables spell it: without leading hyphens, with underscores, lower case."""
    return word.lstrip("-").replace("-", "_").lower()


def setting_meant(word: str, keys: Collection[str]) -> str | None:
    """Return the setting that a word means: by the table, by its name in another section, by spelling; None if unknown.

    Args:
        word: What was typed, with or without a section.
        keys: All settings, "section.key", those of the more likely sections first.
    """
    section, _, name = normalized(word).rpartition(".")
    names = {key.rpartition(".")[2]: key for key in reversed(list(keys))}
    if name in names:  # a right name in a wrong section is the most common mistake
        return names[name]
    if SETTINGS.get(name) in keys:
        return SETTINGS[name]
    if section and (near := difflib.get_close_matches(f"{section}.{name}", keys, n=1, cutoff=0.5)):
        return near[0]
    near = difflib.get_close_matches(name, names, n=1)
    return names[near[0]] if near else None
