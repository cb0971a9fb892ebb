"""Words of other programs that have no option of ours, and what to do instead. No torch here.

Words are spelled as in `synonyms.py`: with underscores, in lower case.
"""

from collections.abc import Mapping


def _by_word(groups: Mapping[str, str]) -> dict[str, str]:
    """Return {word: explanation} of {explanation: words, separated by spaces}."""
    return {word: text for text, words in groups.items() for word in words.split()}


TRAINING = _by_word(
    {
        "--max-train-steps sets the length of the training; a student generates in any of 1 to 8 steps (sample --steps)": (
            "steps num_inference_steps inference_steps sampling_steps"
        ),
        "it is for lcmdistill sample, after the run; what a run shows meanwhile is --set run.validation_prompts": (
            "prompt negative_prompt sampler"
        ),
        "use --resolution N for squares, or --buckets HEIGHTxWIDTH": "width height",
        "images are visited in turn until --max-train-steps; remove this option": "num_repeats repeats dataset_repeats",
        "a run counts steps: --max-train-steps; --dry-run states how many passes over the data that makes": (
            "num_train_epochs max_train_epochs num_epochs epochs epoch validation_epochs "
            "sample_every_n_epochs save_last_n_epochs"
        ),
        "checkpoints are counted in steps: --set run.checkpoint_every=N": "save_every_n_epochs",
        "the solver's grid has T / k points: 50 points of 1000 time steps are --skip 20": "num_ddim_timesteps",
        "checkpoints are written anyway; run the same command again to resume": (
            "resume resume_from_checkpoint continue save_state"
        ),
        "the trained range is --set objective.w_min=W and objective.w_max=W, each the guidance scale minus 1": (
            "guidance_scale cfg cfg_scale omega w"
        ),
        "--memory turns it on where it is needed; to force it, use --set run.gradient_checkpointing=true": (
            "gradient_checkpointing"
        ),
        "--memory turns it on where it is needed; to force it, use --set optim.optimizer=adamw8bit": "use_8bit_adam",
        "the optimizer is AdamW, with --set optim.beta1, beta2, weight_decay, adam_eps, lr_scheduler, warmup_steps": (
            "use_lion_optimizer optimizer_args lr_scheduler_args lr_scheduler_num_cycles lr_scheduler_power "
            "optimizer_config use_prodigy"
        ),
        "attention uses PyTorch's own fused kernels; remove this option": (
            "xformers enable_xformers_memory_efficient_attention sdpa mem_eff_attn flash_attn use_flash_attention"
        ),
        "products are computed in --precision; remove this option": "allow_tf32 cast_teacher_unet",
        "latents and encoded captions are cached unless data.cache is off; remove this option": (
            "cache_latents cache_latents_to_disk latent_caching cache_text_encoder_outputs "
            "cache_text_encoder_outputs_to_disk vae_batch_size vae_encode_batch_size"
        ),
        "distill-lora trains a LoRA of the network's --target-modules; remove this option": (
            "network_module network_train_unet_only network_args"
        ),
        "the text encoders are not trained, so that the student reads prompts as its teacher; remove this option": (
            "text_encoder_lr text_encoder_learning_rate learning_rate_te train_text_encoder network_train_text_encoder_only"
        ),
        "weights are trained in fp32, and the networks compute in --precision; use that": "full_fp16 full_bf16",
        "the VAE computes in fp32 by default; remove this option": "no_half_vae",
        "use lcmdistill distill-lora with --quantize-base fp8": "fp8_base",
        "the number of checkpoints that are kept is --set run.keep_checkpoints=N": "save_last_n_steps",
        "use lcmdistill distill-lora to train a LoRA": "use_lora",
        "use lcmdistill distill-lora to train a LoRA, and --teacher-lora FILE to fuse one into the teacher": "lora",
        "start one process per GPU: torchrun --nproc-per-node N -m lcmdistill ...": (
            "num_gpus num_processes gpus nproc_per_node num_machines multi_gpu"
        ),
        "metrics and the tracker's files are in the run folder; use --output for that": "logging_dir log_dir tensorboard_dir",
        "the last part of --output is the name of the run, of its LoRA file and in the tracker: --output runs/NAME": (
            "output_name name run_name wandb_run_name log_tracker_name exp_name"
        ),
        "wandb reads its own variables: WANDB_PROJECT=NAME in front of the command": (
            "tracker_project_name wandb_project project"
        ),
        "wandb reads its own variables: WANDB_ENTITY=NAME in front of the command": "wandb_entity",
        "log in once with: wandb login": "wandb_api_key",
        "log in once with: hf auth login": "hub_token huggingface_token hf_token",
        "latents are cached and read ahead by a thread; remove this option": (
            "dataloader_num_workers max_data_loader_n_workers num_workers persistent_data_loader_workers"
        ),
        "the noise is the one that the teacher was trained with; remove this option": (
            "noise_offset multires_noise_iterations multires_noise_discount adaptive_noise_scale "
            "ip_noise_gamma offset_noise_weight zero_terminal_snr"
        ),
        "the method weights its own loss; remove this option": (
            "min_snr_gamma snr_gamma debiased_estimation_loss v_pred_like_loss "
            "scale_v_pred_loss_like_noise_pred loss_weight_fn"
        ),
        "the method chooses its time steps; remove this option": (
            "min_timestep max_timestep timestep_sampling timestep_distribution"
        ),
        "captions are encoded once, as they are, and cached; remove this option, or edit the captions": (
            "shuffle_caption caption_tag_dropout_rate keep_tokens caption_prefix caption_suffix weighted_captions "
            "max_token_length"
        ),
        "images are cropped at the center by default, see data.crop; remove this option": "center_crop",
        "--buckets auto chooses the sizes; to list them, use --buckets HEIGHTxWIDTH, repeated": (
            "min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale"
        ),
        "--memory N plans for a GPU of N GiB, and auto for what is free; remove this option": (
            "lowram lowvram medvram highvram low_vram"
        ),
        "use another --output, or remove the run first: lcmdistill runs remove NAME": "overwrite force overwrite_output_dir",
        "choose it after the run: lcmdistill export RUN --format kohya or single-file --dtype fp16": (
            "save_model_as save_precision output_dtype output_model_format"
        ),
        "captions are read from .txt and .caption files and metadata.jsonl; remove this option": (
            "caption_extension caption_extention image_column caption_column in_json"
        ),
        "each image has a caption of its own, in a .txt file of the same name; remove this option": (
            "instance_prompt class_prompt caption"
        ),
        "the teacher itself keeps the student to what it knows; remove this option": (
            "reg_data_dir class_data_dir with_prior_preservation prior_loss_weight"
        ),
        "specify the images with --data FOLDER, repeated for several": "dataset_config dataset_class",
        "use --config FILE with our settings, see --config list and --dry-run --full": "config_file config_path",
        "use --dry-run --full to print all settings": "output_config print_config",
        "use --dry-run, which counts the usable samples and why others are not": "debug_dataset check validate",
        "validation has one image per prompt and number of steps; see run.validation_prompts": (
            "num_validation_images sample_at_first"
        ),
        "set --learning-rate to the value that is to be used; remove this option": "scale_lr",
        "the target is set with --set student.target=ema or live, and its decay with --set objective.ema_decay=D": (
            "ema use_ema offload_ema"
        ),
        "masks of the data are not read; remove this option": "masked_training",
        "cached latents of other settings are never used; to delete them, use lcmdistill cache clear": (
            "clear_cache_before_training clear_cache"
        ),
        "the version is read from the teacher's files; remove this option": "v2",
        "torchrun sets up the processes; remove this option": "local_rank ddp_timeout dynamo_backend",
        "training asks no questions; remove this option": "yes y",
    }
)
"for the commands that train"

ELSEWHERE = _by_word(
    {
        "attention uses PyTorch's own fused kernels; remove this option": (
            "xformers enable_xformers_memory_efficient_attention sdpa opt_sdp_attention"
        ),
        "lower --batch-size, or use --precision fp16": "lowvram medvram lowram low_vram",
        "sample first, then again with --image FILE, --width, --height and --strength": "hires_fix enable_hr upscale",
        "no file is overwritten; use another --output": "overwrite force",
        "what is finished is kept; run the same command again": "resume continue",
        "the run records its method; remove this option": "objective method",
        "the file of a LoRA records its rank; remove this option": "rank lora_rank network_dim",
        "the learning rate is an option of lcmdistill distill and distill-lora": "lr learning_rate",
    }
)
"for the commands that do not train"

EVERYWHERE = _by_word(
    {
        "RUN/log.txt has the details, and --debug shows tracebacks; remove this option": "verbose v",
        "redirect the output instead: > FILE": "quiet silent q",
        "select GPUs with CUDA_VISIBLE_DEVICES, or one with --device cuda:1": "gpu_ids gpu gpu_id device_id",
    }
)
"for all commands"

FORMATS = _by_word(
    {
        "use kohya for the LoRA of distill-lora, or single-file for a checkpoint of distill": (
            "comfyui comfy a1111 automatic1111 webui forge sdnext invokeai fooocus civitai safetensors "
            "safetensor drawthings swarmui"
        ),
        "use pipeline for a student of distill, or diffusers-lora for the LoRA of distill-lora": (
            "diffusers huggingface hf folder"
        ),
        "it is not written here; programs that write it read --format single-file (a checkpoint) or pipeline (a folder)": (
            "gguf tensorrt trt coreml openvino tflite torchscript pt bin"
        ),
    }
)
"values of --format"

VALUES: dict[tuple[str, str], str] = {("format", word): text for word, text in FORMATS.items()} | {
    ("report_to", "all"): "choose tensorboard or wandb",
    ("report_to", "mlflow"): "choose tensorboard or wandb; RUN/metrics.jsonl has the same numbers",
    ("report_to", "comet_ml"): "choose tensorboard or wandb; RUN/metrics.jsonl has the same numbers",
    ("precision", "fp8"): "networks compute in fp32, bf16 or fp16; for a LoRA, see --quantize-base fp8",
}
"(option, value) -> what to do instead"
