"""Low-latency operations over NVLink: one kernel each, or one for sending and one for receiving.

The host waits for nothing. What a captured kernel has to know of its operation it counts on the
device (csrc/low_latency/epochs.cuh), so every form can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ep_comm._native import header
from ep_comm.backends.nvlink.resources import Resources
from ep_comm.backends.requests import (
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencySizes,
    Pending,
)
from ep_comm.fp8_low_latency import ScaleForm

_FORMATS = {
    None: header.EP_LOW_LATENCY_BF16,
    ScaleForm.FP32: header.EP_LOW_LATENCY_FP8,
    ScaleForm.POWER_OF_TWO: header.EP_LOW_LATENCY_FP8_ROUNDED,
    ScaleForm.UE8M0: header.EP_LOW_LATENCY_UE8M0,
}
_SEND, _RECEIVE = header.EP_LOW_LATENCY_SEND, header.EP_LOW_LATENCY_RECEIVE
_MOST_OUT = 2  # operations of a kind, see `ep_comm.backends.base.LowLatencyBackend`
EPOCHS = 2  # of a handle: the dispatch's and the combine's
_BYTES_OF_PEERS = 4 * header.EP_MAX_PEERS
# All of them use the same counts: for streams they are one kind of operation.
_KIND = header.EP_OP_LOW_LATENCY_DISPATCH


@dataclass(slots=True, eq=False)  # made by position and not frozen: a microsecond less
class NVLinkLowLatencyRouting:
    """What a combine needs of its dispatch. Nobody changes it.

    Attributes:
        topk_idx: [T, K] int32 or int64 of this rank's tokens.
        sizes: Of the dispatch.
        memory: Behind ``recv_src_info`` what the dispatch leaves, see ``ep_low_latency_handle``.
        stream: The caller's at the dispatch, to which these tensors belong.
    """

    topk_idx: Tensor
    sizes: LowLatencySizes
    memory: Tensor
    stream: int


class Call:
    """The arguments of a kernel. Of each kind there are two, for the operations that may be out.

    Args:
        op: EP_OP_*.
        function: Of the library.
        launched: The structure that it takes.
        args: What is the same on one host, in it.

    Attributes:
        common: What both kinds of operations have, in `args`.
        handle: What a dispatch leaves for its combine, in `args`.
        sizes: Those that stand in the arguments now.
        kept: With them, where each field of `handle` stands behind the start of ``recv_src_info``.
    """

    def __init__(self, op: int, function: str, launched: ctypes.Structure, args: Any) -> None:
        self.op = op
        self.function = function
        self.launched = launched
        self.args = args
        # Looked up once, which makes an object each time.
        self.common: header.LowLatency = args.common
        self.handle: header.LowLatencyHandle = args.handle
        self.peers: header.Peers = self.common.peers
        self.sizes: LowLatencySizes | None = None
        self.kept: tuple[int, ...] = ()

    def set_handle(self, recv_src_info: int) -> None:
        """Say where the dispatch leaves what its combine needs: behind ``recv_src_info``."""
        epochs, num_tokens, num_rows, ranks, rows, weights = self.kept
        handle = self.handle
        handle.epochs = recv_src_info + epochs
        handle.num_tokens = recv_src_info + num_tokens
        handle.num_rows = recv_src_info + num_rows
        handle.ranks = recv_src_info + ranks
        handle.rows = recv_src_info + rows
        handle.weights = recv_src_info + weights


class LowLatency:
    """Calls, phases and graphs: the same over NVLink and between nodes.

    `ep_comm.backends.base.LowLatencyBackend` says what each method is for.

    Args:
        resources: The backend's.
        num_sms: Returns the SMs of an operation, which may be asynchronous.

    Attributes:
        calls: The kernels' arguments.
    """

    _state_ints: int  # of the operations' counts, on the device

    def __init__(self, resources: Resources, num_sms: Callable[[bool], int]) -> None:
        native, memory, offsets, config, device, streams, recorder = resources
        self._native = native
        self._memory = memory
        self._offsets = offsets
        self._num_ranks = memory.num_ranks
        self._hidden = config.hidden
        self._num_local_experts = config.num_experts // memory.num_ranks
        self._device = device
        self._streams = streams
        self._recorder = recorder
        self._num_sms = num_sms
        # The counts, and for each kernel those of its blocks that are done.
        self._state = torch.zeros(3, self._state_ints, dtype=torch.int32, device=device)
        self._room = config.low_latency_tokens
        pairs = [self._make_calls() for _ in range(_MOST_OUT)]
        self.calls = tuple(itertools.chain(*pairs))
        self._dispatches, self._combines = map(itertools.cycle, zip(*pairs, strict=True))

    def _make_calls(self) -> tuple[Call, Call]:
        """Return the arguments of a dispatch and of a combine."""
        raise NotImplementedError

    def num_kept_ints(self, max_tokens: int, num_topk: int) -> int:
        """Return the numbers of an ``ep_low_latency_handle``."""
        raise NotImplementedError

    def _kept(self, sizes: LowLatencySizes) -> tuple[int, ...]:
        """Return where a dispatch leaves what its combine needs, in bytes: see `Call.kept`."""
        raise NotImplementedError

    def _common_args(self, op: int, **offsets: int) -> header.LowLatency:
        is_combine = op == header.EP_OP_LOW_LATENCY_COMBINE
        return header.LowLatency(
            peers=self._memory.peers(op, self._recorder.addresses),
            state=self._state[0].data_ptr(),
            finished=self._state[1 + is_combine].data_ptr(),
            room=self._room,
            hidden=self._hidden,
            num_local_experts=self._num_local_experts,
            **offsets,
        )

    def dispatch(self, request: LowLatencyDispatchRequest) -> Pending[NVLinkLowLatencyRouting]:
        """Launch the kernel that sends, and that which receives or its hook."""
        self._memory.check()
        call, sizes, ints = next(self._dispatches), request.sizes, request.recv_src_info
        args, scales, recv_stats = call.args, request.recv_scales, request.recv_stats
        if call.sizes is not sizes:
            args.format = _FORMATS[sizes.scale_form]
            args.scale_stride = 0 if scales is None else scales.stride(2)
            self._set_sizes(call, sizes)
        args.recv_src_info = address = ints.data_ptr()
        call.set_handle(address)
        args.x = request.x.data_ptr()
        args.recv_x = request.recv_x.data_ptr()
        args.recv_scales = None if scales is None else scales.data_ptr()
        args.recv_count = request.recv_count.data_ptr()
        args.recv_stats = None if recv_stats is None else recv_stats.data_ptr()
        current = self._launch(call, request.topk_idx, request)
        routing = NVLinkLowLatencyRouting(request.topk_idx, sizes, ints, current)
        return self._pending(call, request, routing, current, routing)

    def combine(
        self, routing: NVLinkLowLatencyRouting, request: LowLatencyCombineRequest
    ) -> Pending[None]:
        """Launch the kernel that sums and sends, and that which receives or its hook."""
        self._memory.check_fault()
        call = next(self._combines)
        args = call.args
        if call.sizes is not routing.sizes:
            self._set_sizes(call, routing.sizes)
        call.set_handle(routing.memory.data_ptr())
        args.x = request.x.data_ptr()
        args.combined_x = request.out.data_ptr()
        current = self._launch(call, routing.topk_idx, request)
        self._keep_for_stream(current, routing)
        return self._pending(call, request, routing, current, None)

    def _set_sizes(self, call: Call, sizes: LowLatencySizes) -> None:
        """Describe the tensors of operations, as long as they are alike."""
        common = call.common
        common.idx_bytes = sizes.idx_bytes
        common.num_tokens, common.num_topk = sizes.num_tokens, sizes.num_topk
        common.max_tokens = sizes.max_tokens
        call.sizes, call.kept = sizes, self._kept(sizes)

    def _launch(
        self,
        call: Call,
        topk_idx: Tensor,
        request: LowLatencyDispatchRequest | LowLatencyCombineRequest,
    ) -> int:
        """Launch an operation, or its send phase; return the caller's stream."""
        common, weights, wait_stats = call.common, request.topk_weights, request.wait_stats
        common.topk_idx = topk_idx.data_ptr()
        common.weights = None if weights is None else weights.data_ptr()
        common.has_weights = weights is not None
        common.wait_stats = None if wait_stats is None else wait_stats.data_ptr()
        common.phases = _SEND if request.is_split else _SEND | _RECEIVE
        asynchronous = request.asynchronous
        common.num_blocks = sms = self._num_sms(asynchronous)
        stream = self._streams.begin(_KIND, asynchronous, sms)
        call.peers.record = self._recorder.start(call.op)
        self._native.launch(call.function, call.launched, stream)
        return self._streams.current if asynchronous else stream

    def _pending(
        self,
        call: Call,
        request: LowLatencyDispatchRequest | LowLatencyCombineRequest,
        routing: NVLinkLowLatencyRouting,
        current: int,
        result: NVLinkLowLatencyRouting | None,
    ) -> Pending[Any]:
        """Return what `_launch` has started on the stream `current` of the caller's."""
        if request.asynchronous:
            return Pending(result, self._streams.comm_event((request, routing)))
        if not request.is_split:
            return Pending(result)
        receive = functools.partial(self._receive, call, request, routing, current, result)
        return Pending(None, None, receive)

    def _receive(
        self,
        call: Call,
        request: LowLatencyDispatchRequest | LowLatencyCombineRequest,
        routing: NVLinkLowLatencyRouting,
        sent_on: int,
        result: NVLinkLowLatencyRouting | None,
    ) -> NVLinkLowLatencyRouting | None:
        """Launch the receive phase of what `call` still describes.

        The request comes along so that a hook alone keeps the tensors that this writes to. They
        belong to the stream that it was `sent_on`.
        """
        self._memory.check_fault()
        common = call.common
        common.phases = _RECEIVE
        common.num_blocks = sms = self._num_sms(False)
        stream = self._streams.begin(_KIND, False, sms)
        self._native.launch(call.function, call.launched, stream)
        if stream != sent_on:
            self._streams.keep_for_current(_tensors_of(request), sent_on)
        self._keep_for_stream(stream, routing)
        return result

    def _keep_for_stream(self, current: int, routing: NVLinkLowLatencyRouting) -> None:
        """Keep the routing's memory until `current`, the current stream, is done with it."""
        if current != routing.stream:
            stream = torch.cuda.current_stream(self._device)
            for tensor in (routing.memory, routing.topk_idx):
                tensor.record_stream(stream)


def _tensors_of(request: LowLatencyDispatchRequest | LowLatencyCombineRequest) -> list[Tensor]:
    values = (getattr(request, field.name) for field in fields(request))
    return [value for value in values if isinstance(value, Tensor)]


class NVLinkLowLatency(LowLatency):
    """The low-latency part of the NVLink backend; its arguments are those of `LowLatency`."""

    _state_ints = header.EP_LOW_LATENCY_STATE_INTS

    def _make_calls(self) -> tuple[Call, Call]:
        offsets = self._offsets
        dispatch = header.LowLatencyDispatchArgs(
            common=self._common_args(
                header.EP_OP_LOW_LATENCY_DISPATCH,
                credit_offset=offsets.low_latency_credits,
                row_offset=offsets.low_latency_dispatch,
                header_offset=offsets.low_latency_headers,
                entry_offset=offsets.low_latency_entries,
            ),
            notice=self._memory.notice_address,
        )
        combine = header.LowLatencyCombineArgs(
            common=self._common_args(
                header.EP_OP_LOW_LATENCY_COMBINE,
                credit_offset=offsets.low_latency_credits,
                row_offset=offsets.low_latency_combine,
                header_offset=offsets.low_latency_headers,
                entry_offset=offsets.low_latency_weights,
            )
        )
        return (
            Call(header.EP_OP_LOW_LATENCY_DISPATCH, "ep_low_latency_dispatch", dispatch, dispatch),
            Call(header.EP_OP_LOW_LATENCY_COMBINE, "ep_low_latency_combine", combine, combine),
        )

    def num_kept_ints(self, max_tokens: int, num_topk: int) -> int:
        """Return the numbers of an ``ep_low_latency_handle``."""
        entries = self._num_ranks * max_tokens * num_topk
        return EPOCHS + 2 * header.EP_MAX_PEERS + max_tokens + 2 * entries

    def _kept(self, sizes: LowLatencySizes) -> tuple[int, ...]:
        num_places = self._num_ranks * sizes.max_tokens
        epochs = 4 * self._num_local_experts * num_places
        num_tokens = epochs + 4 * EPOCHS
        num_rows = num_tokens + _BYTES_OF_PEERS
        ranks = num_rows + _BYTES_OF_PEERS
        rows = ranks + 4 * sizes.max_tokens
        weights = rows + 4 * num_places * sizes.num_topk
        return epochs, num_tokens, num_rows, ranks, rows, weights

    @property
    def most_operations(self) -> int:
        """Of both kinds the higher number of an operation sent so far; waits for the GPU."""
        state = header.LowLatencyState.from_buffer_copy(self._state[0].cpu().numpy().tobytes())
        return max(state.sent)

    def restart(self, masked: tuple[int, ...], first: int) -> None:
        """Count on from `first`, as if all operations so far had been received everywhere.

        Their memory holds the waiting pattern, and zeros. Headers and entries of before, which a
        masked rank may still write, carry a lower epoch.
        """
        half = first // 2
        halves = (half, half), (half, half)
        state = header.LowLatencyState(
            sent=(first, first),
            received=halves,
            known=(halves, halves),
            masked=sum(1 << rank for rank in masked),
        )
        self._state.zero_()
        words = torch.frombuffer(bytearray(state), dtype=torch.int32)
        self._state[0, : len(words)].copy_(words)
        memory = self._memory.tensor
        assert memory is not None  # it was not destroyed
        credits = memory[self._offsets.low_latency_credits :]
        credits[: 16 * self._num_ranks].view(torch.int32).fill_(half)
