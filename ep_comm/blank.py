"""Tensors without content, at about half of the time on the host that ``torch.empty`` takes.

An operation makes several, and they are a good part of what the call takes. They are not filled
where ``torch.use_deterministic_algorithms`` has ``torch.empty`` do so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Blank(NamedTuple):
    """What a tensor without content is to be; size and strides are plain tuples."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


Make = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


def _private() -> Make | None:
    """Return what torch's compiler calls in the code that it makes; None where torch has none."""
    try:
        return torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
    except AttributeError:
        return None


_on_current_gpu = _private()


def _is_allocated_in_order() -> bool:
    """Return whether CUDA allocates torch's memory, for the current stream alone."""
    has_cuda = torch.version.cuda is not None
    return has_cuda and torch.cuda.get_allocator_backend() == "cudaMallocAsync"


_in_order = _is_allocated_in_order()


def comes_in_order() -> bool:
    """Return whether what ``torch.empty`` gives may be written to behind the current stream only.

    It may where torch fills it, or CUDA allocates it, on that stream. Otherwise the memory has been
    free there since its last use: a stream that is ordered behind that may write to it too.
    """
    if _in_order:
        return True
    settings: Any = torch.utils.deterministic  # has properties that mypy does not see
    return torch.are_deterministic_algorithms_enabled() and settings.fill_uninitialized_memory


def maker(device: torch.device) -> Make:
    """Return what makes a tensor on `device`, of the size, strides and type of a `Blank`."""
    if _on_current_gpu is not None and device.type == "cuda":
        if device.index == torch._C._cuda_getDevice():
            return _on_current_gpu
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)
