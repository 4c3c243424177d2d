"""Rows and scales, as DeepEP's callers pass them and take them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ep_comm.errors import EPArgumentError
from ep_comm.fp8 import BLOCK, FP8_DTYPE, Payload
from ep_comm.numeric import round_up

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
_TMA_BYTES = 16


def without_grad(tensor: MaybeTensor) -> MaybeTensor:
    """Return the values of `tensor` alone: there is no autograd in DeepEP."""
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def payload(x: Payload) -> Payload:
    """Return rows to dispatch; scales may have had any strides."""
    if isinstance(x, tuple):
        return x[0], x[1].contiguous()
    return x.detach() if x.requires_grad else x  # as `without_grad`, in one call


def sizes_of(x: Payload) -> tuple[int, int, torch.dtype]:
    """Return T and hidden of [T, hidden], and the type of a buffer for such rows.

    Raises:
        EPArgumentError: There are not two dimensions.
    """
    rows = x[0] if isinstance(x, tuple) else x
    if rows.dim() != 2:
        raise EPArgumentError(f"x must be [num_tokens, hidden], got {list(rows.shape)}")
    return *rows.shape, torch.bfloat16 if rows.dtype == FP8_DTYPE else rows.dtype


def empty_scales(rows: Tensor, column_major: bool) -> Tensor:
    """Return memory for the scales of FP8 rows: [M, hidden / 128] FP32.

    Args:
        rows: [M, hidden].
        column_major: Each column begins on a multiple of 16 bytes, as TMA needs it.
    """
    num_rows, blocks = rows.shape[0], rows.shape[1] // BLOCK
    if not column_major:
        return rows.new_empty(num_rows, blocks, dtype=torch.float32)
    stride = round_up(num_rows, _TMA_BYTES // torch.float32.itemsize)
    return rows.new_empty(blocks, stride, dtype=torch.float32).t()[:num_rows]


def scales_by_row(scales: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """Return scales of the expert layout a row each, [M, B]; the host does not wait.

    `ep_comm.fp8.split_scales` says how they stand in the expert layout.

    Args:
        scales: [M B].
        offsets: [E_local + 1] int32, where groups begin, and where the last one ends.
        num_rows: M.
    """
    rows = torch.arange(num_rows, device=scales.device)
    begins = offsets.long()
    ends = torch.cat([begins[1:], begins.new_full((1,), num_rows)])  # room behind is one group more
    group = torch.searchsorted(begins[1:].contiguous(), rows, right=True)
    first, size = begins[group], (ends - begins)[group]
    blocks = torch.arange(scales.numel() // max(num_rows, 1), device=scales.device)
    place = first * len(blocks) + (rows - first)
    return scales[place.unsqueeze(1) + size.unsqueeze(1) * blocks]
