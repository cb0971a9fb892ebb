"""Load a checkpoint and a LoRA with sd-scripts: `python sd_scripts_driver.py CHECKOUT CHECKPOINT LORA INPUTS OUTPUT`.

It imports nothing of lcmdistill. A LoRA named - is none.
"""

import sys

from stand_ins import Finder  # pyright: ignore[reportMissingImports]


def main(checkout: str, checkpoint: str, lora: str, inputs: str, output: str) -> None:
    """Write the outputs of the U-Net, the text encoder and the VAE on fixed inputs, and the number of LoRA modules."""
    sys.meta_path.insert(0, Finder())  # pyright: ignore[reportArgumentType]
    sys.path.insert(0, checkout)
    import torch
    from library import model_util  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    from networks import lora as networks  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file, save_file

    torch.set_grad_enabled(False)
    given = load_file(inputs)
    text, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(False, checkpoint)
    text, vae, unet = (part.float().eval() for part in (text, vae, unet))
    count = 0
    if lora != "-":
        network, weights = networks.create_network_from_weights(1.0, lora, vae, text, unet)
        count = len(network.unet_loras) + len(network.text_encoder_loras)
        network.apply_to(text, unet, bool(network.text_encoder_loras), True)
        network.load_state_dict(weights, strict=False)
        network.float().eval()
    result = {
        "unet": unet(given["sample"], given["timestep"], given["embeds"]).sample,
        "text": text(given["ids"])[0],
        "vae": vae.decode(given["latents"]).sample,
        "lora_modules": torch.tensor(count),
    }
    save_file({key: value.contiguous() for key, value in result.items()}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
