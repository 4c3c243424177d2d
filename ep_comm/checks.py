"""Checks of what callers pass, made on the host before anything is sent or launched."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ep_comm import fp8
from ep_comm.config import EPConfig, is_int
from ep_comm.errors import EPArgumentError, EPRoutingError, setting
from ep_comm.events import EventOverlap
from ep_comm.handle import DispatchHandle, Payload, RowLayout

ROW_DTYPES = (torch.bfloat16, torch.float32)
_MAX_ALIGNMENT = 4096


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise EPArgumentError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_num_sms(num_sms: object) -> None:
    """A number of SMs, or None."""
    if num_sms is not None and (not is_int(num_sms) or num_sms < 2):
        raise EPArgumentError(f"num_sms must be at least 2, or None, got {num_sms!r}")


def check_num_worst_tokens(num_worst_tokens: object) -> None:
    """A number of rows that an int32 can count, or None."""
    if num_worst_tokens is None:
        return
    if not is_int(num_worst_tokens) or not 0 < num_worst_tokens < 2**31:
        raise EPArgumentError(
            f"num_worst_tokens must be a positive number of rows, or None, got {num_worst_tokens!r}"
        )


def check_rows(name: str, x: Tensor, num_rows: int | None, hidden: int) -> None:
    """`x` is [num_rows, hidden], contiguous."""
    shape = x.shape
    if len(shape) != 2 or shape[1] != hidden or num_rows not in (None, shape[0]):
        rows = "num_tokens" if num_rows is None else num_rows
        raise EPArgumentError(f"{name} must be [{rows}, {hidden}], got {list(shape)}")
    if not x.is_contiguous():
        raise EPArgumentError(f"{name} must be contiguous, got strides {list(x.stride())}")
    if x.is_cuda and x.data_ptr() % 16:
        raise EPArgumentError(
            f"{name} starts at an address that is no multiple of 16 bytes: pass a copy of the slice"
        )


def check_row_dtype(name: str, x: Tensor, config: EPConfig) -> None:
    """Rows are BF16 or FP32, and no wider than the buffer was made for."""
    if x.dtype not in ROW_DTYPES:
        raise EPArgumentError(f"{name} must be bfloat16 or float32, got {x.dtype}")
    if x.dtype.itemsize > config.dtype.itemsize:
        raise EPArgumentError(
            f"{name} is {x.dtype}, wider than the {config.dtype} that the buffer was made for: "
            f"pass dtype={x.dtype} to EPConfig"
        )


def check_num_tokens(tokens_of_rank: Iterable[tuple[int, int]], config: EPConfig) -> None:
    """Raise `EPRoutingError` where one of these (rank, tokens) is more than the buffer holds."""
    for rank, num_tokens in tokens_of_rank:
        if num_tokens > config.max_tokens_per_rank:
            raise too_many_tokens(rank, num_tokens, config.max_tokens_per_rank)


def too_many_tokens(rank: int, num_tokens: int, max_tokens: int) -> EPRoutingError:
    """What all ranks raise where one has more tokens than the buffer holds."""
    return EPRoutingError(
        f"rank {rank} dispatches {num_tokens} tokens, more than the {max_tokens} that the buffer "
        f"was made for: raise {setting('max_tokens_per_rank')}"
    )


def checked_payload(x: Payload, config: EPConfig) -> tuple[Tensor, Tensor | None]:
    """Rows to dispatch: BF16 or FP32 [T, hidden], or FP8 with scales [T, hidden / 128]."""
    if isinstance(x, tuple) and len(x) == 2:
        rows, scales = x
        check_tensor("x[0]", rows)
        check_tensor("x[1]", scales)
    else:
        rows, scales = x, None
        check_tensor("x", rows)
    check_rows("x", rows, None, config.hidden)
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
    """Defaults for the two types, and a refusal of pairs that make no sense."""
    wire = rows.dtype if wire_dtype is None else wire_dtype
    recv = rows.dtype if recv_dtype is None else recv_dtype
    if wire != rows.dtype and (wire != fp8.FP8_DTYPE or scales is not None):
        raise EPArgumentError(
            f"wire_dtype must be x's own dtype {rows.dtype} or float8_e4m3fn, got {wire}"
        )
    if wire == fp8.FP8_DTYPE:
        fp8.check_hidden(hidden)
        if recv not in (*ROW_DTYPES, fp8.FP8_DTYPE):
            raise EPArgumentError(f"recv_dtype must be bfloat16, float32 or float8, got {recv}")
    elif recv != wire:
        raise EPArgumentError(f"recv_dtype {recv} needs FP8 on the wire, which carries {wire}")
    if rows.requires_grad and recv != rows.dtype:
        raise EPArgumentError(
            f"x requires grad, so the received rows must have its dtype {rows.dtype}, not {recv}"
        )
    return wire, recv


def grad_wire_dtype(x: Tensor, wire_dtype: torch.dtype | None) -> torch.dtype:
    """Default for the type in which the gradient of a combine of `x` travels."""
    wire = x.dtype if wire_dtype is None else wire_dtype
    if wire not in (x.dtype, fp8.FP8_DTYPE):
        raise EPArgumentError(
            f"grad_wire_dtype must be x's own dtype {x.dtype} or float8_e4m3fn, got {wire}"
        )
    if wire == fp8.FP8_DTYPE:
        fp8.check_hidden(x.shape[1])
    return wire


def check_weights(weights: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Probabilities: FP32 of that shape, contiguous, on that device."""
    name = "topk_weights"
    if weights is None:
        return
    check_tensor(name, weights)
    if weights.dtype != torch.float32:
        raise EPArgumentError(f"{name} must be float32, got {weights.dtype}")
    if weights.shape != shape:
        raise EPArgumentError(f"{name} must be {list(shape)}, got {list(weights.shape)}")
    if weights.device != device:
        raise EPArgumentError(f"{name} is on {weights.device}, x on {device}")
    if not weights.is_contiguous():
        raise EPArgumentError(f"{name} must be contiguous, got strides {list(weights.stride())}")


def check_alignment(expert_alignment: object) -> None:
    if not is_int(expert_alignment) or not 1 <= expert_alignment <= _MAX_ALIGNMENT:
        raise EPArgumentError(
            f"expert_alignment must be an integer from 1 to {_MAX_ALIGNMENT}, got "
            f"{expert_alignment!r}"
        )


def check_layout(layout: RowLayout, expert_alignment: int) -> None:
    if layout not in ("rank", "expert"):
        raise EPArgumentError(f"layout must be 'rank' or 'expert', got {layout!r}")
    check_alignment(expert_alignment)


def check_repeated(
    handle: DispatchHandle, layout: RowLayout | None, expert_alignment: int | None
) -> None:
    """What is given along with a handle is what the handle has."""
    if layout not in (None, handle.layout):
        raise EPArgumentError(f"layout is that of the handle, {handle.layout!r}, got {layout!r}")
    if handle.layout == "expert" and expert_alignment not in (None, handle.expert_alignment):
        raise EPArgumentError(
            f"expert_alignment is that of the handle, {handle.expert_alignment}, got "
            f"{expert_alignment!r}"
        )


def check_handle(handle: object, buffer: object) -> None:
    if not isinstance(handle, DispatchHandle):
        raise EPArgumentError(f"handle must be a DispatchHandle, got {type(handle).__name__}")
    if handle.buffer is not buffer:
        raise EPArgumentError("the handle belongs to another buffer")


def check_stream_arguments(
    previous_event: object, async_finish: bool, allocate_on_comm_stream: bool
) -> None:
    if not isinstance(previous_event, (EventOverlap, type(None))):
        raise EPArgumentError(
            f"previous_event must be an EventOverlap, got {type(previous_event).__name__}"
        )
    if allocate_on_comm_stream and (previous_event is None or not async_finish):
        raise EPArgumentError(
            "allocate_on_comm_stream needs previous_event and async_finish=True: only then is "
            "the communication stream ordered with the caller's"
        )
