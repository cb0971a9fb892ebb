"""`lcmdistill export`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lcmdistill.cli._options import Debug, Private, PushToHub, finite, one_of, run_folder
from lcmdistill.export import EXPORTERS
from lcmdistill.utils.errors import UsageError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    ExportFormat = str
else:
    ExportFormat = one_of(EXPORTERS)


def export(
    run: Annotated[Path, typer.Argument(help="Finished run: its folder, or its name under runs/.")],
    format_: Annotated[ExportFormat, typer.Option("--format", help="Output format.")],
    output: Annotated[Path, typer.Option(help="File (.safetensors) or folder to write, as the format requires.")],
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"],
        typer.Option(help="Data type of the written weights, for formats that have a choice; the others are fp32."),
    ] = "fp16",
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Guidance baked into a file whose format has no guidance input (omega + 1).  [default: the run's value]",
            callback=finite,
        ),
    ] = None,
    quantize: Annotated[
        Literal["int8"] | None,
        typer.Option(help="Dynamic int8 quantization of the weights and activations of matrix products, for graphs."),
    ] = None,
    weights: Annotated[
        Literal["last", "best"], typer.Option(help="Final weights, or those of the best validation.")
    ] = "last",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reload the written files as their consumer does, and compare.")
    ] = True,
    push_to_hub: PushToHub = None,
    private: Private = False,
    debug: Debug = False,
) -> Path:
    """Export a run to diffusers, ComfyUI, A1111, peft or ONNX, and verify the written files."""
    from lcmdistill.export.registry import export as write_export
    from lcmdistill.hub import client as hub
    from lcmdistill.hub import publish
    from lcmdistill.hub.model_card import put_export_card

    run = run_folder(run)
    if private and not push_to_hub:
        raise UsageError("--private is for --push-to-hub; remove this option, or add --push-to-hub OWNER/NAME")
    if push_to_hub:
        hub.check_login(push_to_hub)
    options: dict[str, Any] = {
        "dtype": dtype,
        "guidance_scale": guidance_scale,
        "quantize": quantize,
        "weights": weights,
    }
    for line in write_export(run, format_, output, **options, verify=verify, write_card=put_export_card).splitlines():
        logger.info(line)
    if push_to_hub:
        publish.publish_export(run, format_, output, push_to_hub, private=private)
    return output
