"""Rows that copy engines send before anybody knows their routing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ep_comm.errors import EPArgumentError


def _version(x: Tensor) -> int:
    """Return what changes when `x` is written in place, where torch counts it."""
    return 0 if x.is_inference() else x._version


class Ahead(NamedTuple):
    """What `Buffer.begin_dispatch` has begun, until its dispatch.

    Attributes:
        x: The rows that were passed.
        version: Of their content.
        wire_dtype: The type that travels.
        rows, scales: What travels: `x`, or what it was quantised to.
        number: Of the operation on its buffer, from 1; None where there is nobody to send to.
        record: Address of its record.
        is_captured: In a CUDA graph.
        stream: The caller's, to which `rows` and `scales` belong.
    """

    x: Tensor
    version: int
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
        wire_dtype: torch.dtype,
        sent: tuple[Tensor, Tensor | None],
        number: int | None,
        record: int,
        stream: int,
    ) -> Ahead:
        """Return the one of an operation that begins now."""
        is_captured = torch.cuda.is_current_stream_capturing()
        return cls(x, _version(x), wire_dtype, *sent, number, record, is_captured, stream)

    def is_of(self, x: Tensor) -> bool:
        """Return whether `x` is the same memory in the same shape."""
        mine = self.x
        return (mine.data_ptr(), mine.shape, mine.dtype) == (x.data_ptr(), x.shape, x.dtype)

    def check(self, x: Tensor, wire_dtype: torch.dtype) -> None:
        """Refuse a dispatch that is not the one that was begun.

        Raises:
            EPArgumentError: Says what is different.
        """
        problem = None
        if not self.is_of(x):
            problem = f"x is another tensor, {tuple(x.shape)} {x.dtype}"
        elif _version(x) != self.version:
            problem = "x was written to since then"
        elif wire_dtype != self.wire_dtype:
            problem = f"wire_dtype is {wire_dtype}, and was {self.wire_dtype}"
        elif torch.cuda.is_current_stream_capturing() != self.is_captured:
            problem = "one of the two is captured in a CUDA graph"
        if problem is not None:
            raise EPArgumentError(
                f"begin_dispatch has begun to send {tuple(self.x.shape)} {self.x.dtype}: dispatch "
                f"them before anything else is dispatched ({problem})"
            )
