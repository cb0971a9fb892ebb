"""The model card of a run: what it was distilled from and with, and how its files are used."""

from pathlib import Path
from typing import Any

from lcmdistill.config import to_toml
from lcmdistill.export.pipeline import STEPS
from lcmdistill.settings import RunConfig
from lcmdistill.teachers.base import Teacher


def model_card(config: RunConfig, folder: Path, teacher: Teacher) -> str:
    """Markdown with the hub's metadata on top. Guidance is told in both conventions."""
    from huggingface_hub import ModelCardData

    model, guidance = config.teacher.model, config.run.validation_guidance_scale or 1.0
    is_hub_id = model.count("/") == 1 and not Path(model).exists()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=model if is_hub_id else None,
        base_model_relation="finetune" if is_hub_id else None,
        tags=["text-to-image", "stable-diffusion", "lcm", "latent-consistency-model", "lcmdistill"],
    )
    objective = config.objective
    return f"""---
{data.to_yaml()}
---

# {folder.name}: {model} in 1 to 8 steps

A Latent Consistency Model (Luo et al. 2023, arXiv:2310.04378) distilled from `{model}` with lcmdistill. The licence is
the teacher's; see its own model card.

- omega drawn from {objective.w_min:g} to {objective.w_max:g}, which is diffusers' `guidance_scale` from
  {objective.w_min + 1:g} to {objective.w_max + 1:g} (`guidance_scale` = omega + 1); {guidance:g} is a fair start
- {config.optim.max_train_steps} optimiser steps, {objective.solver} solver, k = {objective.skip}, {config.data.resolution} px
- the weights are those of the EMA target; the teacher predicts {teacher.prediction_type}

## Use

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}/pipeline")
image = pipeline("a prompt", num_inference_steps={STEPS}, guidance_scale={guidance:g}).images[0]
```

or `lcmdistill sample {folder} --steps {STEPS} --prompt "a prompt"`. Guidance is an input of the network: images cost one
forward a step, and negative prompts have no effect.

## Configuration

```toml
{to_toml(config).strip()}
```
"""


def write_run_card(config: RunConfig, folder: Path, teacher: Teacher) -> Any:
    """The run's own README.md: the card, with the newest validation grid."""
    grids = sorted((folder / "samples").glob("step-*.png"))
    picture = f"\n![Validation grid](samples/{grids[-1].name})\n" if grids else ""
    text = model_card(config, folder, teacher).replace("\n## Use\n", f"{picture}\n## Use\n", 1)
    (folder / "README.md").write_text(text, encoding="utf-8")
