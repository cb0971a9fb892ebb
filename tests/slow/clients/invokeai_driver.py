"""Ask InvokeAI what it takes files and folders for: `python invokeai_driver.py OUTPUT.json PATH...`.

It imports nothing of lcmdistill. The stand-ins come after diffusers, which looks for the real packages.
"""

import json
import sys
from pathlib import Path

import diffusers
import diffusers.models.autoencoders.autoencoder_kl
import diffusers.models.unets.unet_2d_condition
from stand_ins import Anything, Finder  # pyright: ignore[reportMissingImports]

FIELDS = ("type", "base", "format", "variant", "prediction_type")


def main(output: str, paths: list[str]) -> None:
    """Write {path: its configuration's class and FIELDS}."""
    assert diffusers.ModelMixin
    sys.meta_path.insert(0, Finder())  # pyright: ignore[reportArgumentType]
    sys.modules["invokeai.backend.spandrel_image_to_image_model"] = Anything("spandrel")
    from invokeai.backend.model_manager.configs.factory import (  # pyright: ignore[reportMissingImports]
        ModelConfigFactory,
    )

    found = {}
    for path in paths:
        config = ModelConfigFactory.from_model_on_disk(path).config
        values = {name: getattr(config, name, None) for name in FIELDS}
        found[path] = {"class": type(config).__name__} | {
            name: getattr(value, "value", value) for name, value in values.items()
        }
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
