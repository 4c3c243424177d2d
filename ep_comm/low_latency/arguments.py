"""Checks of what callers of low-latency operations pass, and the tensors made from it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ep_comm import checks, fp8_low_latency
from ep_comm.blank import Blank
from ep_comm.config import EPConfig, is_int
from ep_comm.errors import EPArgumentError, setting
from ep_comm.fp8 import FP8_DTYPE
from ep_comm.fp8_low_latency import ScaleForm
from ep_comm.low_latency.handle import LowLatencyHandle
from ep_comm.tracing import plain_tensor

_TMA_STRIDE = 4  # scales of 4 bytes in the 16 bytes that a stride is a multiple of


@functools.cache
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


class Received(NamedTuple):
    """What the tensors are to be that a dispatch writes, see `LowLatencyDispatchRequest`."""

    recv_x: Blank
    recv_scales: Blank | None
    recv_src_info: Blank
    recv_count: Blank


@functools.cache
def received(
    num_experts: int, num_rows: int, hidden: int, form: ScaleForm | None, num_kept_ints: int
) -> Received:
    """Return the tensors of a dispatch to `num_experts` of this rank, `num_rows` each."""
    scales = None
    if form is not None:  # column-major in the last two dimensions, for TMA
        columns = hidden // form.elements_per_scale
        stride = -(-num_rows // _TMA_STRIDE) * _TMA_STRIDE
        size = (num_experts, num_rows, columns)
        scales = Blank(size, (columns * stride, 1, stride), form.dtype)
    dtype = torch.bfloat16 if form is None else FP8_DTYPE
    num_ints = num_experts * num_rows + num_kept_ints
    return Received(
        recv_x=Blank((num_experts, num_rows, hidden), (num_rows * hidden, hidden, 1), dtype),
        recv_scales=scales,
        recv_src_info=Blank((num_ints,), (1,), torch.int32),
        recv_count=Blank((num_experts,), (1,), torch.int32),
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
