"""Checks of what callers pass, made on the host before anything is sent or launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import fp8
from ep_comm.config import ROW_DTYPES, EPConfig
from ep_comm.errors import EPArgumentError, EPStateError, EPTooManyTokensError
from ep_comm.events import EventOverlap
from ep_comm.numeric import is_int
from ep_comm.routing.types import Routing, RowLayout
from ep_comm.tracing import plain_tensor

DEFAULT_ALIGNMENT = 16  # what Transformer Engine's FP8 GEMMs need
_MAX_ALIGNMENT = 4096
_LAYOUTS = get_args(RowLayout)
_ONE_ROUTING = "pass exactly one of topk_idx, routing_map and handle"


def checked_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group of a buffer, where None is the default one.

    Raises:
        EPStateError: torch.distributed is not initialised.
        EPArgumentError: It is no group, not one of this process, or moves no data.
    """
    if not dist.is_initialized():
        raise EPStateError(
            "torch.distributed is not initialised: call init_process_group before Buffer"
        )
    chosen = dist.group.WORLD if group is None else group
    if chosen == dist.GroupMember.NON_GROUP_MEMBER:
        raise EPArgumentError("this process is not a member of the group")
    if not isinstance(chosen, dist.ProcessGroup):
        raise EPArgumentError(f"group must be a ProcessGroup or None, got {type(group).__name__}")
    if dist.get_backend(chosen) == "fake":
        raise EPArgumentError('the group has torch\'s backend "fake", which moves no data')
    return chosen


def check_num_sms(num_sms: object) -> None:
    """Refuse what is neither None nor a number of SMs, at least 2."""
    if num_sms is not None and (not is_int(num_sms) or num_sms < 2):
        raise EPArgumentError(f"num_sms must be at least 2, or None, got {num_sms!r}")


def checked_overflow_stats(
    overflow_stats: Tensor | None, can_drop: bool, num_local_experts: int, device: torch.device
) -> Tensor | None:
    """Return what dropped tokens are counted in: int32 [2, E_local], or None.

    It goes with a dispatch that `can_drop` some: a new one by expert that waits for no counts.
    """
    if overflow_stats is not None and not can_drop:
        raise EPArgumentError(
            "overflow_stats needs expert_capacity or num_worst_tokens, the expert layout, and a "
            "new routing"
        )
    shape = 2, num_local_experts
    return checked_optional("overflow_stats", overflow_stats, shape, torch.int32, device)


def check_rows(name: str, x: Tensor, num_rows: int | None, hidden: int) -> None:
    """Refuse what is not [num_rows, hidden] and contiguous; None is any number of rows."""
    shape = x.shape
    if len(shape) != 2 or shape[1] != hidden or num_rows not in (None, shape[0]):
        rows = "num_tokens" if num_rows is None else num_rows
        raise EPArgumentError(f"{name} must be [{rows}, {hidden}], got {list(shape)}")
    if not x.is_contiguous():
        raise EPArgumentError(f"{name} must be contiguous, got strides {list(x.stride())}")
    check_address(name, x)


def check_address(name: str, x: Tensor) -> None:
    """Kernels read and write `x` in words of 16 bytes."""
    if x.is_cuda and x.data_ptr() % 16:
        raise EPArgumentError(
            f"{name} starts at an address that is no multiple of 16 bytes: pass a copy of the slice"
        )


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Refuse a tensor of another type than `dtype`."""
    if x.dtype != dtype:
        raise EPArgumentError(f"{name} must be {dtype}, got {x.dtype}")


def checked_tensor(
    name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return `value`, a contiguous tensor of that shape and type, on that device."""
    tensor = plain_tensor(name, value)
    if tensor.dtype != dtype:
        check_dtype(name, tensor, dtype)
    if tensor.shape != shape:
        raise EPArgumentError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise EPArgumentError(f"{name} must be on {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise EPArgumentError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    return tensor


def checked_optional(
    name: str,
    value: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Return what `checked_tensor` does, or None for a tensor that was left out."""
    return None if value is None else checked_tensor(name, value, shape, dtype, device)


def check_no_grad(**tensors: Tensor | None) -> None:
    """Refuse tensors that ask for a gradient which nobody would compute."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise EPArgumentError(
                f"{name} requires grad, but low-latency operations have no backward: call them "
                "under torch.no_grad()"
            )


def check_row_dtype(name: str, x: Tensor, config: EPConfig) -> None:
    """Refuse rows of other types than ours, and wider ones than the buffer was made for."""
    if x.dtype not in ROW_DTYPES:
        raise EPArgumentError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}")
    if x.dtype.itemsize > config.dtype.itemsize:
        raise EPArgumentError(
            f"{name} is {x.dtype}, wider than the {config.dtype} that the buffer was made for: "
            f"pass dtype={x.dtype} to EPConfig"
        )


def check_num_tokens(num_tokens: Sequence[int], config: EPConfig) -> None:
    """Raise `EPTooManyTokensError` where a rank's tokens are more than the buffer holds."""
    if max(num_tokens) > config.max_tokens_per_rank:
        raise EPTooManyTokensError(tuple(num_tokens), config.max_tokens_per_rank)


def checked_payload(
    x: fp8.Payload, num_tokens: int | None, config: EPConfig
) -> tuple[Tensor, Tensor | None]:
    """Return the rows to dispatch, and their scales where they are FP8.

    Args:
        x: BF16, FP16 or FP32 [T, hidden], or FP8 with scales [T, hidden / 128].
        num_tokens: T, or None for any.
        config: The buffer's.
    """
    if isinstance(x, tuple) and len(x) == 2:
        rows, scales = plain_tensor("x[0]", x[0]), plain_tensor("x[1]", x[1])
    else:
        rows, scales = plain_tensor("x", x), None
    check_rows("x", rows, num_tokens, config.hidden)
    if scales is None:
        check_row_dtype("x", rows, config)
        return rows, None
    fp8.check_hidden(config.hidden)
    if rows.dtype != fp8.FP8_DTYPE:
        raise EPArgumentError(f"x with scales must be float8_e4m3fn, got {rows.dtype}")
    check_rows("scales", scales, rows.shape[0], config.hidden // fp8.BLOCK)
    if scales.dtype != torch.float32 or scales.device != rows.device:
        raise EPArgumentError(
            f"scales must be float32 on {rows.device}, got {scales.dtype} on {scales.device}"
        )
    return rows, scales


def wire_and_recv_dtype(
    rows: Tensor,
    scales: Tensor | None,
    wire_dtype: torch.dtype | None,
    recv_dtype: torch.dtype | None,
    hidden: int,
) -> tuple[torch.dtype, torch.dtype]:
    """Return the two types, defaults filled in. Pairs that make no sense are refused."""
    wire = rows.dtype if wire_dtype is None else wire_dtype
    recv = rows.dtype if recv_dtype is None else recv_dtype
    if wire != rows.dtype and (wire != fp8.FP8_DTYPE or scales is not None):
        raise EPArgumentError(
            f"wire_dtype must be x's own dtype {rows.dtype} or float8_e4m3fn, got {wire}"
        )
    if wire == fp8.FP8_DTYPE:
        if scales is None:
            _check_can_be_fp8("x", rows)
        fp8.check_hidden(hidden)
        if recv not in (*fp8.DTYPES, fp8.FP8_DTYPE):
            raise EPArgumentError(f"recv_dtype must be bfloat16, float32 or float8, got {recv}")
    elif recv != wire:
        raise EPArgumentError(f"recv_dtype {recv} needs FP8 on the wire, which carries {wire}")
    if rows.requires_grad and recv != rows.dtype:
        if recv != fp8.FP8_DTYPE or rows.dtype != torch.bfloat16:  # else there is an edge for it
            raise EPArgumentError(
                f"x requires grad, so the received rows must have its dtype {rows.dtype}, not "
                f"{recv}; BF16 rows can arrive in FP8"
            )
    return wire, recv


def grad_wire_dtype(x: Tensor, wire_dtype: torch.dtype | None, is_taken: bool) -> torch.dtype:
    """Return the type in which the gradient of a combine of `x` travels: None is x's own."""
    wire = x.dtype if wire_dtype is None else wire_dtype
    if wire not in (x.dtype, fp8.FP8_DTYPE):
        raise EPArgumentError(
            f"grad_wire_dtype must be x's own dtype {x.dtype} or float8_e4m3fn, got {wire}"
        )
    if wire == fp8.FP8_DTYPE:
        _check_can_be_fp8("x", x)
        fp8.check_hidden(x.shape[1])
    elif is_taken:
        raise EPArgumentError(f"take_grad needs grad_wire_dtype float8_e4m3fn, got {wire}")
    return wire


def _check_can_be_fp8(name: str, x: Tensor) -> None:
    if x.dtype not in fp8.DTYPES:
        raise EPArgumentError(f"{name} is {x.dtype}: only bfloat16 and float32 travel as FP8")


def checked_weights(
    weights: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """Return the probabilities, which are FP32 of that shape, contiguous, on that device."""
    return checked_optional("topk_weights", weights, shape, torch.float32, device)


def check_add_weights(layout: RowLayout, x: Tensor, weights: Tensor | None) -> None:
    """Refuse to add up weights that stand a row of an expert, or that ask for a gradient."""
    if layout != "rank":
        raise EPArgumentError(f"add_weights needs the rank layout, the handle has {layout!r}")
    needs_grad = x.requires_grad or (weights is not None and weights.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        raise EPArgumentError("add_weights has no backward: call it under torch.no_grad()")


def check_alignment(expert_alignment: object) -> None:
    """Refuse what is no number of rows that groups of experts can be padded to."""
    if not is_int(expert_alignment) or not 1 <= expert_alignment <= _MAX_ALIGNMENT:
        raise EPArgumentError(
            f"expert_alignment must be an integer from 1 to {_MAX_ALIGNMENT}, got "
            f"{expert_alignment!r}"
        )


def checked_output(
    layout: RowLayout | None,
    expert_alignment: int | None,
    num_worst_tokens: int | None,
    expert_capacity: int | None,
    num_local_experts: int,
) -> tuple[RowLayout, int, int | None]:
    """Return layout, alignment and number of rows of what a new dispatch gives.

    The number is None where the host is to wait for it.
    """
    if expert_capacity is not None:
        if not is_int(expert_capacity) or expert_capacity < 1:
            raise EPArgumentError(
                "expert_capacity must be a positive number of rows, or None, got "
                f"{expert_capacity!r}"
            )
        if layout == "rank":
            raise EPArgumentError("expert_capacity is for the expert layout, not for 'rank'")
        for name, value in (
            ("expert_alignment", expert_alignment),
            ("num_worst_tokens", num_worst_tokens),
        ):
            if value is not None:
                raise EPArgumentError(f"expert_capacity says what {name} would: pass one of them")
        layout, expert_alignment = "expert", expert_capacity
        num_worst_tokens = expert_capacity * num_local_experts
    else:
        layout = "expert" if layout is None else layout
        if layout not in _LAYOUTS:
            raise EPArgumentError(f"layout must be 'rank' or 'expert', got {layout!r}")
        expert_alignment = DEFAULT_ALIGNMENT if expert_alignment is None else expert_alignment
        check_alignment(expert_alignment)
        if layout == "rank":
            expert_alignment = 1  # nothing is padded there
    if num_worst_tokens is not None:
        if not is_int(num_worst_tokens) or not 0 < num_worst_tokens < 2**31:  # an int32 counts them
            raise EPArgumentError(
                "num_worst_tokens must be a positive number of rows, or None, got "
                f"{num_worst_tokens!r}"
            )
    return layout, expert_alignment, num_worst_tokens


def checked_source(
    topk_idx: Tensor | None, routing_map: Tensor | None, rows: Tensor, config: EPConfig
) -> tuple[Tensor, int]:
    """Return the routing of `rows`, contiguous, and K.

    Args:
        topk_idx: int32 or int64 [T, K], any strides.
        routing_map: bool [T, E], any strides; K is then ``config.num_topk``.
        rows: [T, hidden], on the same device.
        config: The buffer's.
    """
    if (topk_idx is None) == (routing_map is None):
        raise EPArgumentError(_ONE_ROUTING)
    if topk_idx is not None:
        source = _checked_2d("topk_idx", topk_idx, (torch.int32, torch.int64), "num_topk")
        num_tokens, num_topk = source.shape
        if not 1 <= num_topk <= config.num_topk:
            raise EPArgumentError(
                f"topk_idx has {num_topk} entries a token, the buffer was made for 1 to num_topk "
                f"{config.num_topk}"
            )
    else:
        source = _checked_2d("routing_map", routing_map, (torch.bool,), "num_experts")
        num_tokens, num_columns = source.shape
        num_topk = config.num_topk
        if num_columns != config.num_experts:
            raise EPArgumentError(
                f"routing_map has {num_columns} columns, expected one for each of the "
                f"num_experts = {config.num_experts} experts"
            )
    if source.device != rows.device:
        raise EPArgumentError(f"the routing is on {source.device}, x on {rows.device}")
    if num_tokens != rows.shape[0]:
        raise EPArgumentError(f"the routing has {num_tokens} tokens, x has {rows.shape[0]}")
    return source.contiguous(), num_topk


def _checked_2d(name: str, value: object, dtypes: tuple[torch.dtype, ...], columns: str) -> Tensor:
    tensor = plain_tensor(name, value)
    if tensor.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise EPArgumentError(f"{name} has dtype {tensor.dtype}, expected {expected}")
    if tensor.dim() != 2:
        raise EPArgumentError(
            f"{name} has shape {list(tensor.shape)}, expected 2 dimensions [num_tokens, {columns}]"
        )
    return tensor


def check_scale_groups(recv_dtype: torch.dtype, layout: RowLayout, expert_alignment: int) -> None:
    """Refuse FP8 rows in groups whose scales have no place: no multiple of 4 rows."""
    if recv_dtype == fp8.FP8_DTYPE and layout == "expert" and expert_alignment % 4:
        raise EPArgumentError(
            "FP8 rows with scales in the expert layout need expert_alignment, or expert_capacity, "
            f"to be a multiple of 4, got {expert_alignment}"
        )


def check_repeated(
    routing: Routing,
    topk_idx: Tensor | None,
    routing_map: Tensor | None,
    layout: RowLayout | None,
    expert_alignment: int | None,
    capacity: int | None,
) -> None:
    """Refuse what is passed along with a handle and is not so in its `routing`."""
    if topk_idx is not None or routing_map is not None:
        raise EPArgumentError(_ONE_ROUTING)
    if capacity is not None:
        raise EPArgumentError(
            "num_worst_tokens is that of the handle, and so is expert_capacity: leave them out"
        )
    if layout not in (None, routing.layout):
        raise EPArgumentError(f"layout is that of the handle, {routing.layout!r}, got {layout!r}")
    if routing.layout == "expert" and expert_alignment not in (None, routing.expert_alignment):
        raise EPArgumentError(
            f"expert_alignment is that of the handle, {routing.expert_alignment}, got "
            f"{expert_alignment!r}"
        )


def check_during_backward(during_backward: object) -> None:
    """Refuse what is neither None nor callable."""
    if during_backward is not None and not callable(during_backward):
        raise EPArgumentError(
            f"during_backward must be callable, got {type(during_backward).__name__}"
        )


def check_stream_arguments(
    previous_event: object, async_finish: bool, allocate_on_comm_stream: bool
) -> None:
    """Refuse what is no event, and `allocate_on_comm_stream` without what orders that stream."""
    if not isinstance(previous_event, (EventOverlap, type(None))):
        raise EPArgumentError(
            f"previous_event must be an EventOverlap, got {type(previous_event).__name__}"
        )
    if allocate_on_comm_stream and (previous_event is None or not async_finish):
        raise EPArgumentError(
            "allocate_on_comm_stream needs previous_event and async_finish=True: only then is "
            "the communication stream ordered with the caller's"
        )
