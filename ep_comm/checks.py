"""Checks of what callers pass, made on the host before anything is sent or launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ep_comm import fp8
from ep_comm.config import EPConfig, is_int
from ep_comm.errors import EPArgumentError, EPTooManyTokensError
from ep_comm.events import EventOverlap
from ep_comm.routing.types import Routing, RowLayout
from ep_comm.tracing import plain_tensor

ROW_DTYPES = (torch.bfloat16, torch.float32)
_MAX_ALIGNMENT = 4096


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
    check_address(name, x)


def check_address(name: str, x: Tensor) -> None:
    """Kernels read and write `x` in words of 16 bytes."""
    if x.is_cuda and x.data_ptr() % 16:
        raise EPArgumentError(
            f"{name} starts at an address that is no multiple of 16 bytes: pass a copy of the slice"
        )


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype:
        raise EPArgumentError(f"{name} must be {dtype}, got {x.dtype}")


def checked_tensor(
    name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A contiguous tensor of that shape and type, on that device."""
    tensor = plain_tensor(name, value)
    check_dtype(name, tensor, dtype)
    if tensor.shape != shape:
        raise EPArgumentError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise EPArgumentError(f"{name} must be on {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise EPArgumentError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    return tensor


def checked_counter(
    name: str, value: Tensor | None, length: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """[length] of that type and device, to which an operation adds, or None."""
    return None if value is None else checked_tensor(name, value, (length,), dtype, device)


def check_topk(topk_idx: Tensor, num_topk: int, x: Tensor, config: EPConfig) -> None:
    """A routing [T, num_topk] belongs to the rows `x`, in a buffer of that config."""
    if topk_idx.device != x.device:
        raise EPArgumentError(f"the routing is on {topk_idx.device}, x on {x.device}")
    if topk_idx.shape[0] != x.shape[0]:
        raise EPArgumentError(f"the routing has {topk_idx.shape[0]} tokens, x has {x.shape[0]}")
    if num_topk > config.num_topk:
        raise EPArgumentError(
            f"topk_idx has {num_topk} entries a token, the buffer was made for "
            f"num_topk {config.num_topk}"
        )


def check_no_grad(**tensors: Tensor | None) -> None:
    """None of them asks for a gradient that nobody would compute."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise EPArgumentError(
                f"{name} requires grad, but low-latency operations have no backward: call them "
                "under torch.no_grad()"
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


def check_num_tokens(num_tokens: Sequence[int], config: EPConfig) -> None:
    """Raise `EPTooManyTokensError` where a rank's tokens are more than the buffer holds."""
    if max(num_tokens) > config.max_tokens_per_rank:
        raise EPTooManyTokensError(tuple(num_tokens), config.max_tokens_per_rank)


def checked_payload(x: fp8.Payload, config: EPConfig) -> tuple[Tensor, Tensor | None]:
    """Rows to dispatch: BF16 or FP32 [T, hidden], or FP8 with scales [T, hidden / 128]."""
    if isinstance(x, tuple) and len(x) == 2:
        rows, scales = plain_tensor("x[0]", x[0]), plain_tensor("x[1]", x[1])
    else:
        rows, scales = plain_tensor("x", x), None
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


def checked_weights(
    weights: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """Probabilities: FP32 of that shape, contiguous, on that device."""
    name = "topk_weights"
    if weights is None:
        return None
    weights = plain_tensor(name, weights)
    if weights.dtype != torch.float32:
        raise EPArgumentError(f"{name} must be float32, got {weights.dtype}")
    if weights.shape != shape:
        raise EPArgumentError(f"{name} must be {list(shape)}, got {list(weights.shape)}")
    if weights.device != device:
        raise EPArgumentError(f"{name} is on {weights.device}, x on {device}")
    if not weights.is_contiguous():
        raise EPArgumentError(f"{name} must be contiguous, got strides {list(weights.stride())}")
    return weights


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


def check_scale_groups(recv_dtype: torch.dtype, layout: RowLayout, expert_alignment: int) -> None:
    """FP8 rows may be received in groups of `expert_alignment`."""
    if recv_dtype == fp8.FP8_DTYPE and layout == "expert" and expert_alignment % 4:
        raise EPArgumentError(
            "FP8 rows with scales in the expert layout need expert_alignment to be a multiple "
            f"of 4, got {expert_alignment}"
        )


def check_repeated(
    routing: Routing, layout: RowLayout | None, expert_alignment: int | None
) -> None:
    """What is given along with a handle is what its routing has."""
    if layout not in (None, routing.layout):
        raise EPArgumentError(f"layout is that of the handle, {routing.layout!r}, got {layout!r}")
    if routing.layout == "expert" and expert_alignment not in (None, routing.expert_alignment):
        raise EPArgumentError(
            f"expert_alignment is that of the handle, {routing.expert_alignment}, got "
            f"{expert_alignment!r}"
        )


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
