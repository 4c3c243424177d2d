"""Checks of what callers of low-latency operations pass, and the tensors made from it."""

from __future__ import annotations

import torch
from torch import Tensor

from ep_comm import checks, fp8_low_latency
from ep_comm.config import EPConfig, is_int
from ep_comm.errors import EPArgumentError, setting
from ep_comm.fp8_low_latency import ScaleForm
from ep_comm.low_latency.handle import LowLatencyHandle
from ep_comm.tracing import plain_tensor

_TMA_STRIDE = 4  # scales of 4 bytes in the 16 bytes that a stride is a multiple of


def scale_form(use_fp8: bool, round_scale: bool, use_ue8m0: bool, hidden: int) -> ScaleForm | None:
    """Return the form that DeepEP's three switches ask for; None is BF16."""
    if round_scale and not use_fp8:
        raise EPArgumentError("round_scale=True needs use_fp8=True: BF16 rows have no scales")
    if use_ue8m0 and not round_scale:
        raise EPArgumentError("use_ue8m0=True needs round_scale=True: it holds powers of two only")
    if not use_fp8:
        return None
    form = ScaleForm.FP32
    if round_scale:
        form = ScaleForm.UE8M0 if use_ue8m0 else ScaleForm.POWER_OF_TWO
    fp8_low_latency.check_hidden(hidden, form)
    return form


def empty_scales(
    shape: tuple[int, int], hidden: int, form: ScaleForm, device: torch.device
) -> Tensor:
    """[E, rows, columns], column-major in the last two dimensions, for TMA."""
    num_experts, num_rows = shape
    stride = -(-num_rows // _TMA_STRIDE) * _TMA_STRIDE
    columns = hidden // form.elements_per_scale
    return torch.empty_strided(
        (num_experts, num_rows, columns),
        (columns * stride, 1, stride),
        dtype=form.dtype,
        device=device,
    )


def check_phases(async_finish: bool, return_recv_hook: bool) -> None:
    """Refuse both ways of leaving an operation unfinished at once."""
    if async_finish and return_recv_hook:
        raise EPArgumentError(
            "pass async_finish or return_recv_hook, not both: a hook receives on the stream that "
            "it is called on"
        )


def check_sizes(max_tokens: object, num_experts: object, config: EPConfig) -> None:
    """Tokens and experts of a call fit a buffer of `config`, which has low-latency operations."""
    room = config.low_latency_tokens
    assert room is not None
    if not is_int(max_tokens) or not 1 <= max_tokens <= room:
        raise EPArgumentError(
            f"num_max_dispatch_tokens_per_rank must be from 1 to the {room} that the buffer was "
            f"made for ({setting('low_latency_tokens')}), got {max_tokens!r}"
        )
    if num_experts != config.num_experts:
        raise EPArgumentError(
            f"num_experts is {config.num_experts} in this buffer, got {num_experts!r}"
        )


def check_same_routing(topk_idx: object, handle: LowLatencyHandle) -> None:
    """`topk_idx` is that of the handle's dispatch, as far as no GPU has to be waited for."""
    mine = handle.topk_idx
    if topk_idx is mine:
        return
    theirs = plain_tensor("topk_idx", topk_idx)
    if (theirs.shape, theirs.dtype, theirs.device) != (mine.shape, mine.dtype, mine.device):
        raise EPArgumentError(
            f"topk_idx must be that of the dispatch, {list(mine.shape)} {mine.dtype} on "
            f"{mine.device}, got {list(theirs.shape)} {theirs.dtype} on {theirs.device}"
        )
    if not theirs.is_cuda and not torch.equal(theirs, mine):
        raise EPArgumentError("topk_idx has other values than that of the dispatch")


def combine_weights(topk_weights: Tensor | None, handle: LowLatencyHandle) -> Tensor | None:
    """Return the weights that combine has to bring to the experts' ranks; None: they are there."""
    mine = handle.topk_weights
    if topk_weights is mine:
        if mine is None:
            raise EPArgumentError("pass topk_weights: none travelled with the dispatch")
        return None
    shape = tuple(handle.topk_idx.shape)
    weights = checks.checked_weights(topk_weights, shape, handle.topk_idx.device)
    if mine is None or weights is None:
        return weights
    if weights.data_ptr() != mine.data_ptr():
        raise EPArgumentError(
            "topk_weights travelled with the dispatch: pass the same tensor, or None"
        )
    return None
