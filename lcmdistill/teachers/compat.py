"""Differences between the supported versions of diffusers."""

from importlib.metadata import version
from typing import Any


def dtype_option(dtype: Any) -> dict[str, Any]:
    """Return the argument that makes diffusers load weights in a dtype: `dtype` since 0.40, `torch_dtype` before."""
    major, minor = (int(part) for part in version("diffusers").split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 40) else "torch_dtype": dtype}
