"""Checks of what callers of low-latency operations pass, and the tensors made from it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ep_comm import checks, fp8_low_latency
from ep_comm.backends.base import Backend, LowLatencyBackend
from ep_comm.backends.requests import LowLatencySizes
from ep_comm.blank import Blank
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError, setting
from ep_comm.fp8 import FP8_DTYPE
from ep_comm.fp8_low_latency import ScaleForm
from ep_comm.low_latency.handle import LowLatencyHandle
from ep_comm.low_latency.known import Known
from ep_comm.numeric import is_int, round_up
from ep_comm.tracing import plain_tensor

# What callers pass of a dispatch and of a combine. num_max_dispatch_tokens_per_rank, num_experts,
# use_fp8, round_scale, use_ue8m0, async_finish, return_recv_hook:
DispatchCall = tuple[int, int, bool, bool, bool, bool, bool]
# x, topk_idx, topk_weights, cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats:
DispatchTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
# Sizes of the dispatch, async_finish, return_recv_hook:
CombineCall = tuple[LowLatencySizes, bool, bool]
# x, topk_weights that are not there yet, out, combine_wait_recv_cost_stats:
CombineTensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
_MOST_SIZES = 1024  # that are remembered
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


sizes_of = functools.lru_cache(_MOST_SIZES)(LowLatencySizes)
"""Returns the one object for these sizes."""


@functools.lru_cache(_MOST_SIZES)
def received(sizes: LowLatencySizes, num_kept_ints: int) -> Received:
    """Return what a dispatch of these sizes makes."""
    num_experts, num_rows, hidden = sizes.recv_shape
    form, scales = sizes.scale_form, None
    if form is not None:  # column-major in the last two dimensions, for TMA
        columns = hidden // form.elements_per_scale
        stride = round_up(num_rows, _TMA_STRIDE)
        size = (num_experts, num_rows, columns)
        scales = Blank(size, (columns * stride, 1, stride), form.dtype)
    dtype = torch.bfloat16 if form is None else FP8_DTYPE
    num_ints = num_experts * num_rows + num_kept_ints
    return Received(
        recv_x=Blank(sizes.recv_shape, (num_rows * hidden, hidden, 1), dtype),
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


class KnownDispatch(Known):
    """A dispatch that has passed its checks.

    Args:
        call, given, checked: As in `Known`.
        sizes: What its tensors are.
        received: What the tensors are to be that it makes.
    """

    __slots__ = ("received", "sizes")

    def __init__(
        self,
        call: DispatchCall,
        given: DispatchTensors,
        checked: DispatchTensors,
        sizes: LowLatencySizes,
        received: Received,
    ) -> None:
        super().__init__(call, given, checked)
        self.sizes = sizes
        self.received = received


class Arguments:
    """What the calls of one buffer are given: all of it is checked, at length where it is new.

    Args:
        backend: The low-latency operations.
        whole: The backend that they are of.
        config: The buffer's.
        num_ranks: R.
    """

    def __init__(
        self, backend: LowLatencyBackend, whole: Backend, config: EPConfig, num_ranks: int
    ) -> None:
        self.backend = backend
        self._whole = whole
        self._config = config
        self._num_ranks = num_ranks
        self._num_local_experts = config.num_experts // num_ranks
        self._dispatch: KnownDispatch | None = None  # the last ones
        self._combine: Known | None = None

    def dispatch(
        self, call: DispatchCall, given: DispatchTensors
    ) -> tuple[DispatchTensors, KnownDispatch]:
        """Return the tensors to use, and what is known of such dispatches."""
        known = self._dispatch
        if known is None or type(call[0]) is not int or not known.is_like(call, given):
            given, known = self._check_dispatch(call, given)
            self._dispatch = known
        return given, known

    def combine(self, call: CombineCall, given: CombineTensors) -> CombineTensors:
        """Return the tensors to use."""
        known = self._combine
        if known is None or not known.is_like(call, given):
            checked = self._check_combine(call, given)
            self._combine, given = Known(call, given, checked), checked
        return given

    def _check_dispatch(
        self, call: DispatchCall, given: DispatchTensors
    ) -> tuple[DispatchTensors, KnownDispatch]:
        config = self._config
        max_tokens, num_experts, use_fp8, round_scale, use_ue8m0, async_finish, is_split = call
        x, topk_idx, topk_weights, recv_stats, wait_stats = given
        form = scale_form(use_fp8, round_scale, use_ue8m0, config.hidden)
        check_phases(async_finish, is_split)
        check_sizes(max_tokens, num_experts, config)
        x = plain_tensor("x", x)
        checks.check_rows("x", x, None, config.hidden)
        checks.check_dtype("x", x, torch.bfloat16)
        self._whole.check_device("x", x)
        num_tokens, device = x.shape[0], x.device
        if num_tokens > max_tokens:
            raise EPArgumentError(
                f"x has {num_tokens} tokens, more than num_max_dispatch_tokens_per_rank "
                f"{max_tokens}"
            )
        source, num_topk = checks.checked_source(topk_idx, None, x, config)
        weights = checks.checked_weights(topk_weights, (num_tokens, num_topk), device)
        checks.check_no_grad(x=x, topk_weights=weights)
        recv_stats = checks.checked_optional(
            "cumulative_local_expert_recv_stats", recv_stats,
            (self._num_local_experts,), torch.int32, device,
        )  # fmt: skip
        wait_stats = checks.checked_optional(
            "dispatch_wait_recv_cost_stats", wait_stats, (self._num_ranks,), torch.int64, device
        )
        recv_shape = self._num_local_experts, self._num_ranks * max_tokens, config.hidden
        sizes = sizes_of(
            num_tokens, num_topk, source.element_size(), max_tokens, form, recv_shape, device
        )
        blank = received(sizes, self.backend.num_kept_ints(max_tokens, num_topk))
        checked = x, source, weights, recv_stats, wait_stats
        return checked, KnownDispatch(call, given, checked, sizes, blank)

    def _check_combine(self, call: CombineCall, given: CombineTensors) -> CombineTensors:
        sizes, async_finish, is_split = call
        x, weights, out, wait_stats = given
        check_phases(async_finish, is_split)
        num_tokens, device = sizes.num_tokens, sizes.device
        x = checks.checked_tensor("x", x, sizes.recv_shape, torch.bfloat16, device)
        checks.check_address("x", x)
        weights = checks.checked_weights(weights, (num_tokens, sizes.num_topk), device)
        if out is not None:
            shape = num_tokens, self._config.hidden
            out = checks.checked_tensor("out", out, shape, torch.bfloat16, device)
            checks.check_address("out", out)
        checks.check_no_grad(x=x, topk_weights=weights, out=out)
        wait_stats = checks.checked_optional(
            "combine_wait_recv_cost_stats", wait_stats, (self._num_ranks,), torch.int64, device
        )
        return x, weights, out, wait_stats


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


def weights_to_bring(topk_weights: Tensor | None, handle: LowLatencyHandle) -> Tensor | None:
    """Return the weights that combine has to bring to the experts' ranks, not checked yet.

    None: they are there.
    """
    mine = handle.topk_weights
    if mine is None:
        if topk_weights is None:
            raise EPArgumentError("pass topk_weights: none travelled with the dispatch")
        return topk_weights
    if topk_weights is not None and topk_weights is not mine:
        shape = tuple(handle.topk_idx.shape)
        weights = checks.checked_weights(topk_weights, shape, handle.topk_idx.device)
        if weights is None or weights.data_ptr() != mine.data_ptr():
            raise EPArgumentError(
                "topk_weights travelled with the dispatch: pass the same tensor, or None"
            )
    return None
