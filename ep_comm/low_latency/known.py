"""Calls that are like one before, whose checks need not be made again.

Those of a decoding loop differ in nothing but addresses, and what stands there. To see that takes a
fifth of the time of the checks. torch's compiler knows its inputs again by the same means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]
_ALIGNED_TO = 16  # bytes, see `ep_comm.checks.check_address`


def _private() -> Callable[..., Any] | None:
    """Return what compares tensors with others; None where torch has none."""
    try:
        return torch._C._dynamo.guards.TensorGuards  # type: ignore[attr-defined]
    except AttributeError:
        return None


_guards = _private()


class Known:
    """A call that has passed its checks.

    Args:
        call: Its arguments that are no tensors, and whatever else the checks have looked at.
        given: Its tensors, in the order of the arguments; None for one that was left out.
        checked: What the checks gave for them. Where that is something else, no call is like it.
    """

    __slots__ = ("_call", "_left_out", "_looks_same")

    def __init__(self, call: tuple, given: Tensors, checked: Tensors) -> None:
        self._call = call
        self._left_out = [tensor is None for tensor in given]
        self._looks_same: Callable[..., bool] | None = None
        tensors = [tensor for tensor in given if tensor is not None]
        is_plain = all(a is b for a, b in zip(given, checked, strict=True))
        if _guards is None or not is_plain or any(tensor.requires_grad for tensor in tensors):
            return
        guards = _guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self._looks_same = guards.check

    def is_like(self, call: tuple, given: Tensors) -> bool:
        """Return whether another call passes the same checks, as far as that is seen at once.

        Its tensors then have the same types, dtypes, devices, shapes and strides, none requires
        grad, and all have memory, at addresses that kernels take.
        """
        if self._looks_same is None or call != self._call:
            return False
        if [tensor is None for tensor in given] != self._left_out:
            return False
        tensors = [tensor for tensor in given if tensor is not None]
        if not self._looks_same(*tensors):
            return False
        for tensor in tensors:
            address = tensor.data_ptr()
            if not address or address % _ALIGNED_TO:
                return False
        return True
