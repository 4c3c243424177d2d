"""Rows that copy engines send before anybody knows their routing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ep_comm.errors import EPArgumentError


def _version(x: Tensor | None) -> int:
    """Return what changes when `x` is written in place, where torch counts it."""
    return 0 if x is None or x.is_inference() else x._version


def _is_same(x: Tensor | None, other: Tensor | None) -> bool:
    """Return whether both are the same memory in the same shape, or there is neither."""
    if x is None or other is None:
        return x is other
    return (x.data_ptr(), x.shape, x.dtype) == (other.data_ptr(), other.shape, other.dtype)


class Ahead(NamedTuple):
    """What `Buffer.begin_dispatch` has begun, until its dispatch.

    Attributes:
        x, x_scales: The rows that were passed, and their scales.
        versions: Of the content of both.
        wire_dtype: The type that travels.
        rows, scales: What travels, if anything does: what was passed, or was quantised to.
        number: Of the operation on its buffer, from 1; None where there is nobody to send to.
        record: Address of its record.
        is_captured: In a CUDA graph.
        stream: The caller's, to which `rows` and `scales` belong.
    """

    x: Tensor
    x_scales: Tensor | None
    versions: tuple[int, int]
    wire_dtype: torch.dtype
    rows: Tensor
    scales: Tensor | None
    number: int | None
    record: int
    is_captured: bool
    stream: int

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """What copies and kernels read."""
        return (self.rows,) if self.scales is None else (self.rows, self.scales)

    @classmethod
    def of(
        cls,
        x: Tensor,
        x_scales: Tensor | None,
        wire_dtype: torch.dtype,
        sent: tuple[Tensor, Tensor | None],
        number: int | None,
        record: int,
        stream: int,
    ) -> Ahead:
        """Describe rows whose dispatch begins now."""
        is_captured = torch.cuda.is_current_stream_capturing()
        versions = _version(x), _version(x_scales)
        return cls(x, x_scales, versions, wire_dtype, *sent, number, record, is_captured, stream)

    def is_of(self, x: Tensor, scales: Tensor | None) -> bool:
        """Return whether these are the same memory in the same shape."""
        return _is_same(self.x, x) and _is_same(self.x_scales, scales)

    def check(self, x: Tensor, scales: Tensor | None, wire_dtype: torch.dtype) -> None:
        """Refuse a dispatch that is not the one that was begun.

        Raises:
            EPArgumentError: Says what is different.
        """
        problem = None
        if not _is_same(self.x, x):
            problem = f"x is another tensor, {tuple(x.shape)} {x.dtype}"
        elif not _is_same(self.x_scales, scales):
            problem = "the scales of x are another tensor"
        elif _version(x) != self.versions[0]:
            problem = "x was written to since then"
        elif _version(scales) != self.versions[1]:
            problem = "the scales of x were written to since then"
        elif wire_dtype != self.wire_dtype:
            problem = f"wire_dtype is {wire_dtype}, and was {self.wire_dtype}"
        elif torch.cuda.is_current_stream_capturing() != self.is_captured:
            problem = "one of the two is captured in a CUDA graph"
        if problem is not None:
            raise EPArgumentError(
                f"begin_dispatch has begun to send {tuple(self.x.shape)} {self.x.dtype}: dispatch "
                f"them before anything else is dispatched ({problem})"
            )
