"""Dispatch and combine as torch library ops that are each other's backward.

    ep_comm::dispatch(x, scales?, topk_weights?, wire_dtype, recv_dtype, asynchronous, handle)
        -> (recv_x, recv_scales, recv_topk_weights)
    ep_comm::combine(x, topk_weights?, grad_wire_dtype, asynchronous, handle)
        -> (combined_x, combined_topk_weights)

Optional results that do not exist come back as empty tensors, and a handle travels as its id.

`Buffer` checks arguments, and calls `dispatch` and `combine` below. Gradients are recorded in one
of two ways, with the same result. As a rule a function of autograd does it, which takes the handle
itself. The library op does it where one of torch's dispatch modes is to see the call, as selective
checkpointing is: torch's way to such an op costs a call several times as much.

FP8 on the wire is straight-through: the gradient is that of an unquantised dispatch. Gradients
travel in their own type, except where combine's `grad_wire_dtype` makes those that its backward
dispatches FP8. Autograd would give an FP8 tensor its gradient in FP8: where rows are received so,
it goes to a tensor that stands for them (`Dispatched.recv_edge`). A gradient that is received so
goes to who asked for it (`TakeGrad`), and autograd has a tensor that stands for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_comm.backends.base import Backend
from ep_comm.backends.requests import (
    Combined,
    CombineRequest,
    DispatchRequest,
    Pending,
    Result,
)
from ep_comm.config import ROW_DTYPES
from ep_comm.fp8 import FP8_DTYPE
from ep_comm.handle import DispatchHandle, handle_by_id
from ep_comm.routing.probabilities import scatter_probabilities, select_probabilities
from ep_comm.tracing import check_not_saved, plain_tensor

# Takes the rows [M, H] and scales of a gradient in FP8, and what autograd has in their place.
TakeGrad = Callable[[Tensor, Tensor, Tensor], None]

_NOTHING = contextlib.nullcontext()

_library = torch.library.Library("ep_comm", "DEF")
_library.define(
    "dispatch(Tensor x, Tensor? scales, Tensor? topk_weights, ScalarType wire_dtype, "
    "ScalarType recv_dtype, bool asynchronous, int handle) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "combine(Tensor x, Tensor? topk_weights, ScalarType grad_wire_dtype, bool asynchronous, "
    "int handle) -> (Tensor, Tensor)"
)


class Dispatched(NamedTuple):
    """What a dispatch brought.

    Attributes:
        x, scales, topk_weights: As backends give them; what does not exist is None, or empty where
            the op made it.
        recv_edge: Of FP8 rows: what takes their gradient, see `ep_comm.DispatchOutput`.
    """

    x: Tensor
    scales: Tensor | None
    topk_weights: Tensor | None
    recv_edge: Tensor | None = None


def check_dispatch_not_saved(request: DispatchRequest) -> None:
    """Refuse a dispatch whose result selective checkpointing is to keep, before it has begun.

    Raises:
        EPUnsupportedError: Names the op.
    """
    if _needs_grad(request.x, request.topk_weights):
        check_not_saved(torch.ops.ep_comm.dispatch.default, *request)


def dispatch(
    backend: Backend,
    begin: Callable[[], DispatchHandle],
    request: DispatchRequest,
    *,
    of_all_experts: bool,
) -> Dispatched:
    """Send rows along the routing of a handle, and record the gradient where one is needed.

    Args:
        backend: Moves them.
        begin: Gives the handle. Called once, when all that autograd has to do before is done.
        request: Rows and probabilities.
        of_all_experts: The probabilities are [T, num_experts]: the selected ones are sent.
    """
    in_fp8 = request.recv_dtype == FP8_DTYPE
    if not _needs_grad(request.x, request.topk_weights):
        handle = begin()
        if of_all_experts:
            request = _selected(request, handle)
        pending = backend.dispatch(handle.routing, request)
        received = _result(pending, handle, request.asynchronous)
        return Dispatched(*received, _edge_of(received.x) if in_fp8 else None)
    if _is_seen() and not in_fp8:  # the op has no result for an edge
        handle = begin()
        if of_all_experts:
            request = _selected(request, handle)
        return Dispatched(*torch.ops.ep_comm.dispatch.default(*request, handle.id))
    with _named("ep_comm::dispatch"):
        return Dispatched(
            *_Dispatch.apply(
                request.x, request.topk_weights, request, backend, begin, of_all_experts
            )
        )


def combine(
    backend: Backend,
    handle: DispatchHandle,
    request: CombineRequest,
    grad_wire_dtype: torch.dtype,
    take_grad: TakeGrad | None = None,
) -> Combined:
    """Send rows back along the routing of `handle`, and record the gradient as `dispatch` does.

    Where a dispatch mode sees the op, nobody is given the gradient apart.
    """
    x, topk_weights, asynchronous, adds_weights = request
    if not _needs_grad(x, topk_weights):
        return _result(backend.combine(handle.routing, request), handle, asynchronous)
    assert not adds_weights  # the caller has seen to it: nothing here is its backward
    if _is_seen():
        op = torch.ops.ep_comm.combine.default
        return Combined(*op(x, topk_weights, grad_wire_dtype, asynchronous, handle.id))
    with _named("ep_comm::combine"):
        return Combined(
            *_Combine.apply(x, topk_weights, request, backend, handle, grad_wire_dtype, take_grad)
        )


def _selected(request: DispatchRequest, handle: DispatchHandle) -> DispatchRequest:
    assert request.topk_weights is not None  # the caller has seen to it
    weights = select_probabilities(request.topk_weights, handle.topk_idx)
    return request._replace(topk_weights=weights)


def _is_seen() -> bool:
    """Return whether a dispatch mode of torch's looks at the ops that are called."""
    return torch._C._len_torch_dispatch_stack() > 0


def _named(name: str) -> contextlib.AbstractContextManager:
    """Give what happens inside a name in the trace of a profiler that records."""
    if torch.autograd._profiler_enabled():
        return torch.autograd.profiler.record_function(name)
    return _NOTHING


def _needs_grad(x: Tensor, topk_weights: Tensor | None) -> bool:
    """Return whether gradients are to be recorded, so that the op is called."""
    return torch.is_grad_enabled() and (
        x.requires_grad or (topk_weights is not None and topk_weights.requires_grad)
    )


def _dispatch(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, handle_id = inputs
    request = DispatchRequest(*fields)
    handle = handle_by_id(handle_id)
    with handle.session.operation() as backend:
        pending = backend.dispatch(handle.routing, request)
        received = _result(pending, handle, request.asynchronous)
    like = request.x
    return received.x, _or_empty(received.scales, like), _or_empty(received.topk_weights, like)


def _combine(
    x: Tensor,
    topk_weights: Tensor | None,
    grad_wire_dtype: torch.dtype,
    asynchronous: bool,
    handle_id: int,
) -> tuple[Tensor, Tensor]:
    handle = handle_by_id(handle_id)
    with handle.session.operation() as backend:
        pending = backend.combine(handle.routing, CombineRequest(x, topk_weights, asynchronous))
        combined = _result(pending, handle, asynchronous)
    return combined.x, _or_empty(combined.topk_weights, x)


def _result(pending: Pending[Result], handle: DispatchHandle, asynchronous: bool) -> Result:
    """Return the result: complete on the current stream, or else at ``handle.event``."""
    if not asynchronous:
        return pending.wait()
    handle.event = pending.event
    return pending.result


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if tensor is None else tensor


class _Dispatch(torch.autograd.Function):
    """A dispatch with its gradient; ``ep_comm::dispatch`` without torch's dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor | None,
        request: DispatchRequest,
        backend: Backend,
        begin: Callable[[], DispatchHandle],
        of_all_experts: bool,
    ) -> Dispatched:
        handle = begin()
        if of_all_experts:
            request = _selected(request, handle)
        pending = backend.dispatch(handle.routing, request)
        received = _result(pending, handle, request.asynchronous)
        _prepare_dispatch_backward(ctx, handle, received.x.dtype, topk_weights is not None)
        ctx.num_experts = None
        if of_all_experts and topk_weights is not None:
            ctx.num_experts = topk_weights.shape[1]
        if request.recv_dtype != FP8_DTYPE:
            return Dispatched(*received)
        ctx.mark_non_differentiable(received.x, received.scales)
        return Dispatched(*received, _edge_of(received.x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        grad_x = grads[0] if grads[3] is None else grads[3]
        grad_x, grad_weights = _grads_of_dispatch(ctx, grad_x, grads[2])
        if ctx.num_experts is not None and grad_weights is not None:
            grad_weights = scatter_probabilities(grad_weights, ctx.handle.topk_idx, ctx.num_experts)
        return grad_x, grad_weights, None, None, None, None


def _edge_of(rows: Tensor) -> Tensor:
    """Return what takes the gradient of FP8 rows: of their shape, with one element in memory.

    It is no view: nothing has to be kept in step with what it would be one of.
    """
    nan = _nan(rows.device)
    return torch.empty(0, dtype=nan.dtype, device=nan.device).set_(
        nan.untyped_storage(), 0, rows.shape, (0, 0)
    )


@functools.cache
def _nan(device: torch.device) -> Tensor:
    return torch.full((1,), torch.nan, dtype=torch.bfloat16, device=device)


def _dispatch_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, topk_weights, *_, handle_id = inputs
    handle = handle_by_id(handle_id)
    _prepare_dispatch_backward(ctx, handle, output[0].dtype, topk_weights is not None)


def _prepare_dispatch_backward(
    ctx: Any, handle: DispatchHandle, recv_dtype: torch.dtype, has_weights: bool
) -> None:
    ctx.handle = handle
    ctx.during_backward = handle.during_backward
    widest = handle.session.config.dtype
    fits = recv_dtype in ROW_DTYPES and recv_dtype.itemsize <= widest.itemsize
    ctx.grad_dtype = recv_dtype if fits else torch.bfloat16  # the same on every rank
    ctx.has_weights = has_weights
    ctx.set_materialize_grads(False)


@once_differentiable
def _dispatch_backward(
    ctx: Any, grad_x: Tensor | None, _: Tensor | None, grad_weights: Tensor | None
) -> tuple:
    grad_x, grad_weights = _grads_of_dispatch(ctx, grad_x, grad_weights)
    return grad_x, None, grad_weights, None, None, None, None


def _grads_of_dispatch(
    ctx: Any, grad_x: Tensor | None, grad_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Combine the gradients of received rows and probabilities, beside `during_backward`."""
    handle: DispatchHandle = ctx.handle
    routing = handle.routing
    gradients = _gradients(ctx, grad_x, grad_weights, routing.num_rows, routing.row_weights_shape)
    with handle.session.operation(is_backward=True) as backend:
        num_bytes = routing.num_tokens * gradients[0].shape[1] * gradients[0].element_size()
        is_overlapped = (
            ctx.during_backward is not None
            and backend.overlap_loss("combine", routing.layout, num_bytes) is None
        )
        pending = backend.combine(routing, CombineRequest(*gradients, is_overlapped))
        try:
            if ctx.during_backward is not None:
                ctx.during_backward()
        finally:
            combined = pending.wait()
    return combined.x, combined.topk_weights


class _Combine(torch.autograd.Function):
    """A combine with its gradient; ``ep_comm::combine`` without torch's dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor | None,
        request: CombineRequest,
        backend: Backend,
        handle: DispatchHandle,
        grad_wire_dtype: torch.dtype,
        take_grad: TakeGrad | None,
    ) -> Combined:
        pending = backend.combine(handle.routing, request)
        combined = _result(pending, handle, request.asynchronous)
        _prepare_combine_backward(ctx, handle, x.dtype, topk_weights is not None, grad_wire_dtype)
        ctx.take_grad = take_grad
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        return *_grads_of_combine(ctx, *grads), None, None, None, None, None


def _combine_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, topk_weights, grad_wire_dtype, _, handle_id = inputs
    handle = handle_by_id(handle_id)
    _prepare_combine_backward(ctx, handle, x.dtype, topk_weights is not None, grad_wire_dtype)


def _prepare_combine_backward(
    ctx: Any,
    handle: DispatchHandle,
    dtype: torch.dtype,
    has_weights: bool,
    grad_wire_dtype: torch.dtype,
) -> None:
    ctx.handle = handle
    ctx.grad_dtype = dtype
    ctx.has_weights = has_weights
    ctx.grad_wire_dtype = grad_wire_dtype
    ctx.take_grad = None
    ctx.set_materialize_grads(False)


@once_differentiable
def _combine_backward(ctx: Any, grad_x: Tensor | None, grad_weights: Tensor | None) -> tuple:
    return *_grads_of_combine(ctx, grad_x, grad_weights), None, None, None


def _grads_of_combine(
    ctx: Any, grad_x: Tensor | None, grad_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Dispatch the gradients of combined rows and probabilities."""
    handle: DispatchHandle = ctx.handle
    routing = handle.routing
    x, weights = _gradients(
        ctx, grad_x, grad_weights, routing.num_tokens, routing.token_weights_shape
    )
    take_grad: TakeGrad | None = ctx.take_grad
    recv_dtype = ctx.grad_dtype if take_grad is None else FP8_DTYPE
    request = DispatchRequest(
        x, None, weights, ctx.grad_wire_dtype, recv_dtype=recv_dtype, asynchronous=False
    )
    with handle.session.operation(is_backward=True) as backend:
        received = backend.dispatch(routing, request).wait()
    if take_grad is None:
        return received.x, received.topk_weights
    assert received.scales is not None  # as for all FP8 rows
    # Real memory, but not written: what needs a gradient to be contiguous finds it so.
    instead = torch.empty_like(received.x, dtype=ctx.grad_dtype)
    take_grad(received.x, received.scales, instead)
    return instead, received.topk_weights


def _gradients(
    ctx: Any,
    grad_x: Tensor | None,
    grad_weights: Tensor | None,
    num_rows: int,
    weights_shape: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients to send: zeros for an output unused here, which others may have used."""
    handle: DispatchHandle = ctx.handle
    if grad_x is None:
        hidden = handle.session.config.hidden
        grad_x = handle.topk_idx.new_zeros(num_rows, hidden, dtype=ctx.grad_dtype)
    grad_x = grad_x.to(ctx.grad_dtype)
    if not ctx.has_weights:
        return _packed(grad_x), None
    if grad_weights is None:
        grad_weights = handle.topk_idx.new_zeros(weights_shape, dtype=torch.float32)
    return _packed(grad_x), _packed(grad_weights)


def _packed(tensor: Tensor) -> Tensor:
    """Return it as backends need it: contiguous, and at an address that bulk copies take."""
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
