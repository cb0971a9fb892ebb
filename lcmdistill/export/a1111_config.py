"""The configuration file that A1111 reads next to a checkpoint, `NAME.yaml`: prediction type and betas of an SD 1 model.

A1111 takes SD 1 checkpoints for epsilon models with Stable Diffusion's betas unless such a file says otherwise. The format is
the original one of latent diffusion, which diffusers reads as `original_config` as well.
"""

from typing import Any

import yaml

from lcmdistill.export.sampling_facts import SamplingFacts

BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
"diffusers' name of a schedule of betas -> the name in these files; a table of betas has none"


def needs_config(facts: SamplingFacts) -> bool:
    """Return whether A1111 would sample a student's checkpoint wrongly without a configuration file."""
    if not facts.has_a1111_config or (facts.betas and facts.betas.schedule not in BETA_SCHEDULES):
        return False
    return facts.prediction_type == "v_prediction" or facts.betas is not None


def config_text(pipeline: Any, latent_scale: float) -> str:
    """Return the configuration of an SD 1 pipeline in YAML. latent_scale: the scaling factor of the file's VAE."""
    unet, vae, scheduler = pipeline.unet.config, pipeline.vae.config, pipeline.scheduler.config
    channels, heads = unet.block_out_channels, unet.num_attention_heads or unet.attention_head_dim
    levels = range(len(channels))
    multipliers = [width // channels[0] for width in channels]
    with_attention = [2**level for level in levels if "CrossAttn" in unet.down_block_types[level]]
    unet_params = {
        "image_size": unet.sample_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": channels[0],
        "attention_resolutions": with_attention[::-1],
        "num_res_blocks": unet.layers_per_block,
        "channel_mult": multipliers,
        "num_heads": heads if isinstance(heads, int) else heads[0],
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": unet.cross_attention_dim,
        "use_checkpoint": True,
        "legacy": False,
    }
    vae_params = {
        "double_z": True,
        "z_channels": vae.latent_channels,
        "resolution": 256,
        "in_channels": vae.in_channels,
        "out_ch": vae.out_channels,
        "ch": vae.block_out_channels[0],
        "ch_mult": [width // vae.block_out_channels[0] for width in vae.block_out_channels],
        "num_res_blocks": vae.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {
        "parameterization": "v" if scheduler.prediction_type == "v_prediction" else "eps",
        "beta_schedule": BETA_SCHEDULES[scheduler.beta_schedule],
        "linear_start": scheduler.beta_start,
        "linear_end": scheduler.beta_end,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": scheduler.num_train_timesteps,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": unet.sample_size,
        "channels": vae.latent_channels,
        "cond_stage_trainable": False,
        "conditioning_key": "hybrid" if unet.in_channels > vae.latent_channels else "crossattn",
        "scale_factor": latent_scale,
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet_params},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": vae.latent_channels,
                "ddconfig": vae_params,
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    }
    model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    return yaml.safe_dump({"model": model}, sort_keys=False)
