"""Every kind of LyCORIS layer is merged as lycoris-lora computes it."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcmdistill.teachers.lora.files import load_lora
from tests.support.lycoris import ALPHA, LAYERS, RANK, layers_of, lycoris_file
from tests.support.models import opened

pytestmark = pytest.mark.slow

# merge_to of lycoris-lora 4.1.3 scales LoHa and LoKr twice, and takes the rank of LoKr's Tucker layers from the wrong side. Its
# training scales once: hence its functions instead of its modules, with the scale passed.
SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
from lycoris.functional import loha, lokr
from lycoris.modules import get_module, make_module
kind, alpha, rank, file, weights, output = sys.argv[1:]
file, weights, scale, after = load_file(file), load_file(weights), float(alpha) / float(rank), {}
for stem, weight in weights.items():
    part = lambda name: file.get(f"{stem}.{name}")
    if kind.startswith("LoHa"):
        names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
        update = loha.diff_weight(*map(part, names), gamma=scale)
    elif kind.startswith("LoKr"):
        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        parts = [part(f"lokr_{name}") for name in names]
        update = lokr.kron_weight(*parts, scale=1.0 if kind == "LoKr full" else scale)
    else:
        shape = weight.shape
        if kind == "norm":
            layer = torch.nn.GroupNorm(1, len(weight))
        elif weight.ndim == 2:
            layer = torch.nn.Linear(shape[1], shape[0])
        else:
            layer = torch.nn.Conv2d(shape[1], shape[0], shape[2:], padding=shape[2] // 2)
        layer.requires_grad_(False).weight.copy_(weight)
        module, tensors = get_module(file, stem)
        after[stem] = make_module(module, tensors, stem, layer).get_merged_weight(1.0, shape)[0].detach().contiguous()
        continue
    after[stem] = (weight + update.reshape(weight.shape)).contiguous()
save_file(after, output)
"""


@pytest.mark.parametrize("kind", list(LAYERS))
def test_merged_weights_are_lycoris_s(kind: str, clients_python: str, small_teacher: Path, tmp_path: Path) -> None:
    pipeline = opened(small_teacher)
    layers = layers_of(pipeline.unet, LAYERS[kind][1])
    stems = {path: f"lora_unet_{path.replace('.', '_')}" for path in layers}
    save_file(lycoris_file(pipeline.unet, kind), tmp_path / "lora.safetensors")
    save_file({stems[path]: layer.weight.detach() for path, layer in layers.items()}, tmp_path / "weights.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("lora", "weights", "after")]
    words = [clients_python, "-c", SCRIPT, kind, str(ALPHA), str(RANK), *files]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    load_lora(pipeline, files[0], "it")
    after, expected = dict(pipeline.unet.named_modules()), load_file(files[2])
    for path, stem in stems.items():
        torch.testing.assert_close(after[path].weight.detach(), expected[stem], atol=1e-6, rtol=1e-5)
