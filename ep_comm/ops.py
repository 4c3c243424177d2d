"""Dispatch and combine as torch library ops that are each other's backward.

    ep_comm::dispatch(x, scales?, topk_weights?, wire_dtype, recv_dtype, asynchronous, num_sms?,
                      handle)
        -> (recv_x, recv_scales, recv_topk_weights)
    ep_comm::combine(x, topk_weights?, grad_wire_dtype, asynchronous, num_sms?, handle)
        -> (combined_x, combined_topk_weights)

Optional results that do not exist come back as empty tensors. `Buffer` is the way to call them,
through `dispatch` and `combine` below: it checks arguments and holds the handle, which the ops know
by its id. FP8 on the wire is straight-through: the gradient is that of an unquantised dispatch.
Gradients travel in their own type, except where combine's `grad_wire_dtype` makes those that its
backward dispatches FP8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_comm.backends.base import Backend, Pending, Result
from ep_comm.checks import ROW_DTYPES
from ep_comm.handle import DispatchHandle, handle_by_id
from ep_comm.tracing import plain_tensor

_library = torch.library.Library("ep_comm", "DEF")
_library.define(
    "dispatch(Tensor x, Tensor? scales, Tensor? topk_weights, ScalarType wire_dtype, "
    "ScalarType recv_dtype, bool asynchronous, int? num_sms, int handle)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "combine(Tensor x, Tensor? topk_weights, ScalarType grad_wire_dtype, bool asynchronous, "
    "int? num_sms, int handle) -> (Tensor, Tensor)"
)


def dispatch(
    backend: Backend,
    handle: DispatchHandle,
    x: Tensor,
    scales: Tensor | None,
    topk_weights: Tensor | None,
    wire_dtype: torch.dtype,
    recv_dtype: torch.dtype,
    asynchronous: bool,
    num_sms: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The op, inside `Buffer.guard`; without gradients to record straight to the backend: torch's
    way costs 15 µs. A result that does not exist is None, or empty where the op made it."""
    args = (x, scales, topk_weights, wire_dtype, recv_dtype, asynchronous, num_sms)
    if needs_grad(x, topk_weights):
        return torch.ops.ep_comm.dispatch.default(*args, handle.id)
    return _result(backend.dispatch(handle, *args), handle, asynchronous)


def combine(
    backend: Backend,
    handle: DispatchHandle,
    x: Tensor,
    topk_weights: Tensor | None,
    grad_wire_dtype: torch.dtype,
    asynchronous: bool,
    num_sms: int | None,
) -> tuple[Tensor, Tensor | None]:
    """As `dispatch`."""
    args = (x, topk_weights, grad_wire_dtype, asynchronous, num_sms)
    if needs_grad(x, topk_weights):
        return torch.ops.ep_comm.combine.default(*args, handle.id)
    pending = backend.combine(handle, x, topk_weights, asynchronous, num_sms)
    return _result(pending, handle, asynchronous)


def needs_grad(x: Tensor, topk_weights: Tensor | None) -> bool:
    """Whether the op is called, rather than the backend: gradients are to be recorded."""
    return torch.is_grad_enabled() and (
        x.requires_grad or (topk_weights is not None and topk_weights.requires_grad)
    )


def _dispatch(
    x: Tensor,
    scales: Tensor | None,
    topk_weights: Tensor | None,
    wire_dtype: torch.dtype,
    recv_dtype: torch.dtype,
    asynchronous: bool,
    num_sms: int | None,
    handle_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    handle = handle_by_id(handle_id)
    with handle.buffer.guard() as backend:
        pending = backend.dispatch(
            handle, x, scales, topk_weights, wire_dtype, recv_dtype, asynchronous, num_sms
        )
        received = _result(pending, handle, asynchronous)
    return received.x, _or_empty(received.scales, x), _or_empty(received.topk_weights, x)


def _combine(
    x: Tensor,
    topk_weights: Tensor | None,
    grad_wire_dtype: torch.dtype,
    asynchronous: bool,
    num_sms: int | None,
    handle_id: int,
) -> tuple[Tensor, Tensor]:
    handle = handle_by_id(handle_id)
    with handle.buffer.guard() as backend:
        pending = backend.combine(handle, x, topk_weights, asynchronous, num_sms)
        combined = _result(pending, handle, asynchronous)
    return combined.x, _or_empty(combined.topk_weights, x)


def _result(pending: Pending[Result], handle: DispatchHandle, asynchronous: bool) -> Result:
    """The result, complete on the current stream, or else at ``handle.event``."""
    if not asynchronous:
        return pending.wait()
    handle.event = pending.event
    return pending.result


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if tensor is None else tensor


def _dispatch_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, _, topk_weights, *_, handle_id = inputs
    ctx.handle = handle_by_id(handle_id)
    ctx.during_backward = ctx.handle.during_backward
    recv_dtype, widest = output[0].dtype, ctx.handle.buffer.config.dtype
    fits = recv_dtype in ROW_DTYPES and recv_dtype.itemsize <= widest.itemsize
    ctx.grad_dtype = recv_dtype if fits else torch.bfloat16  # the same on every rank
    ctx.has_weights = topk_weights is not None
    ctx.set_materialize_grads(False)


@once_differentiable
def _dispatch_backward(
    ctx: Any, grad_x: Tensor | None, _: Tensor | None, grad_weights: Tensor | None
) -> tuple:
    handle: DispatchHandle = ctx.handle
    in_experts = handle.layout == "expert"
    weights_shape = (handle.num_rows,) if in_experts else (handle.num_rows, handle.num_topk)
    grad_x, grad_weights = _gradients(ctx, grad_x, grad_weights, handle.num_rows, weights_shape)
    with handle.buffer.guard() as backend:
        is_overlapped = ctx.during_backward is not None
        pending = backend.combine(
            handle, grad_x, grad_weights, asynchronous=is_overlapped, num_sms=None
        )
        try:
            if is_overlapped:
                ctx.during_backward()
        finally:
            combined = pending.wait()
    return combined.x, None, combined.topk_weights, None, None, None, None, None


def _combine_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, topk_weights, ctx.grad_wire_dtype, *_, handle_id = inputs
    ctx.handle = handle_by_id(handle_id)
    ctx.has_weights = topk_weights is not None
    ctx.grad_dtype = x.dtype
    ctx.set_materialize_grads(False)


@once_differentiable
def _combine_backward(ctx: Any, grad_x: Tensor | None, grad_weights: Tensor | None) -> tuple:
    handle: DispatchHandle = ctx.handle
    weights_shape = (handle.num_tokens, handle.num_topk)
    grad_x, grad_weights = _gradients(ctx, grad_x, grad_weights, handle.num_tokens, weights_shape)
    with handle.buffer.guard() as backend:
        received = backend.dispatch(
            handle,
            grad_x,
            None,
            grad_weights,
            wire_dtype=ctx.grad_wire_dtype,
            recv_dtype=ctx.grad_dtype,
            asynchronous=False,
            num_sms=None,
        ).wait()
    return received.x, received.topk_weights, None, None, None, None


def _gradients(
    ctx: Any,
    grad_x: Tensor | None,
    grad_weights: Tensor | None,
    num_rows: int,
    weights_shape: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:
    """What to send back: zeros for an output that this rank did not use, for others may have."""
    handle: DispatchHandle = ctx.handle
    if grad_x is None:
        hidden = handle.buffer.config.hidden
        grad_x = handle.topk_idx.new_zeros(num_rows, hidden, dtype=ctx.grad_dtype)
    grad_x = grad_x.to(ctx.grad_dtype)
    if not ctx.has_weights:
        return _packed(grad_x), None
    if grad_weights is None:
        grad_weights = handle.topk_idx.new_zeros(weights_shape, dtype=torch.float32)
    return _packed(grad_x), _packed(grad_weights)


def _packed(tensor: Tensor) -> Tensor:
    """As the backends need it: contiguous, and at an address that bulk copies take."""
    tensor = plain_tensor("a gradient", tensor)
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


_library.impl("dispatch", _dispatch, "CompositeExplicitAutograd")
_library.impl("combine", _combine, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "ep_comm::dispatch", _dispatch_backward, setup_context=_dispatch_setup, lib=_library
)
torch.library.register_autograd(
    "ep_comm::combine", _combine_backward, setup_context=_combine_setup, lib=_library
)
