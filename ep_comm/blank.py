"""Tensors without content, at half of the host's time that ``torch.empty`` takes on a GPU.

A low-latency dispatch returns several, and they are a good part of what the call takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Blank(NamedTuple):
    """What a tensor without content is to be; size and strides are plain tuples."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


Make = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]

# What torch's compiler calls for this in the code that it makes; it takes the current GPU.
_on_current_gpu: Make = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]


def maker(device: torch.device) -> Make:
    """Return what makes a tensor on `device`, of the size, strides and type of a `Blank`."""
    if device.type == "cuda" and device.index == torch._C._cuda_getDevice():
        return _on_current_gpu
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)
