"""Low-latency operations over NVLink: one kernel each, or one for sending and one for receiving.

The host waits for nothing. What a captured kernel has to know of its operation it counts on the
device (csrc/low_latency/epochs.cuh), so every form can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep_comm._native import NativeLibrary, header
from ep_comm.backends.base import LowLatencyCombineRequest, LowLatencyDispatchRequest, Pending
from ep_comm.backends.nvlink.memory import PeerMemory
from ep_comm.backends.nvlink.streams import Streams
from ep_comm.config import EPConfig
from ep_comm.fp8_low_latency import ScaleForm
from ep_comm.telemetry.device import DeviceRecorder

_FORMATS = {
    None: header.EP_LOW_LATENCY_BF16,
    ScaleForm.FP32: header.EP_LOW_LATENCY_FP8,
    ScaleForm.POWER_OF_TWO: header.EP_LOW_LATENCY_FP8_ROUNDED,
    ScaleForm.UE8M0: header.EP_LOW_LATENCY_UE8M0,
}
_SEND, _RECEIVE = header.EP_LOW_LATENCY_SEND, header.EP_LOW_LATENCY_RECEIVE
_EPOCHS = 2  # of a handle: the dispatch's and the combine's
_BYTES_OF_PEERS = 4 * header.EP_MAX_PEERS
# All of them use the same counts: for streams they are one kind of operation.
_KIND = header.EP_OP_LOW_LATENCY_DISPATCH


@dataclass(kw_only=True, slots=True, eq=False)  # frozen, a call would take 1 µs longer
class NVLinkLowLatencyRouting:
    """What a combine needs of its dispatch. Nobody changes it.

    Attributes:
        topk_idx: [T, K] int32 or int64 of this rank's tokens.
        max_tokens: M of the dispatch.
        kept: Addresses of what the dispatch left, in the order of ``ep_low_latency_handle``.
        memory: The tensor that it stands in.
        stream: The caller's at the dispatch, to which these tensors belong.
    """

    topk_idx: Tensor
    max_tokens: int
    kept: tuple[int, ...]
    memory: Tensor
    stream: int


class LowLatencyArgs(NamedTuple):
    """The arguments of both kernels; every call fills in the rest anew."""

    dispatch: header.LowLatencyDispatchArgs
    combine: header.LowLatencyCombineArgs


class NVLinkLowLatency:
    """The low-latency part of the NVLink backend, see `ep_comm.backends.base.LowLatencyBackend`.

    Args:
        native: The CUDA library.
        memory: This rank's.
        config: The buffer's.
        offsets: Where things stand in the memory.
        device: The GPU.
        streams: Where operations run.
        recorder: Gives each operation its record.
        num_sms: Returns the SMs of an operation, which may be asynchronous.

    Attributes:
        args: The kernels' arguments.
    """

    def __init__(
        self,
        native: NativeLibrary,
        memory: PeerMemory,
        config: EPConfig,
        offsets: header.BufferOffsets,
        device: torch.device,
        streams: Streams,
        recorder: DeviceRecorder,
        num_sms: Callable[[bool], int],
    ) -> None:
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
        self._launched = self._make_args()

    _state_ints = header.EP_LOW_LATENCY_STATE_INTS
    _function = "ep_{}"

    def _make_args(self) -> dict[str, Any]:
        """Make `args`; return what the function of each operation takes."""
        offsets = self._offsets
        self.args = LowLatencyArgs(
            header.LowLatencyDispatchArgs(
                common=self._common_args(
                    header.EP_OP_LOW_LATENCY_DISPATCH,
                    credit_offset=offsets.low_latency_credits,
                    row_offset=offsets.low_latency_dispatch,
                    header_offset=offsets.low_latency_headers,
                    entry_offset=offsets.low_latency_entries,
                ),
                notice=self._memory.notice_address,
            ),
            header.LowLatencyCombineArgs(
                common=self._common_args(
                    header.EP_OP_LOW_LATENCY_COMBINE,
                    credit_offset=offsets.low_latency_credits,
                    row_offset=offsets.low_latency_combine,
                    header_offset=offsets.low_latency_headers,
                    entry_offset=offsets.low_latency_weights,
                )
            ),
        )
        return {
            "low_latency_dispatch": self.args.dispatch,
            "low_latency_combine": self.args.combine,
        }

    def _common_args(self, op: int, **offsets: int) -> header.LowLatency:
        is_combine = op == header.EP_OP_LOW_LATENCY_COMBINE
        return header.LowLatency(
            peers=self._memory.peers(op, self._recorder.wire_bytes_address),
            state=self._state[0].data_ptr(),
            finished=self._state[1 + is_combine].data_ptr(),
            room=self._room,
            hidden=self._hidden,
            num_local_experts=self._num_local_experts,
            **offsets,
        )

    def num_kept_ints(self, max_tokens: int, num_topk: int) -> int:
        """Return the numbers of an ``ep_low_latency_handle``."""
        entries = self._num_ranks * max_tokens * num_topk
        return _EPOCHS + 2 * header.EP_MAX_PEERS + max_tokens + 2 * entries

    def dispatch(self, request: LowLatencyDispatchRequest) -> Pending[NVLinkLowLatencyRouting]:
        """Launch the kernel that sends, and that which receives or its hook."""
        self._memory.check()
        topk_idx, weights, scales = request.topk_idx, request.topk_weights, request.recv_scales
        max_tokens, ints = request.max_tokens, request.recv_src_info
        args = self.args.dispatch
        self._fill(args.common, topk_idx, weights, max_tokens, request.wait_stats)
        args.recv_src_info = address = ints.data_ptr()
        kept = self._kept(address, max_tokens, topk_idx.shape[1])
        _set_handle(args.handle, kept)
        args.x = request.x.data_ptr()
        args.recv_x = request.recv_x.data_ptr()
        args.recv_scales = None if scales is None else scales.data_ptr()
        args.scale_stride = 0 if scales is None else scales.stride(2)
        args.recv_count = request.recv_count.data_ptr()
        args.recv_stats = None if request.recv_stats is None else request.recv_stats.data_ptr()
        args.format = _FORMATS[request.scale_form]
        current = self._launch("low_latency_dispatch", args.common, request)
        routing = NVLinkLowLatencyRouting(
            topk_idx=topk_idx, max_tokens=max_tokens, kept=kept, memory=ints, stream=current
        )
        return self._pending("low_latency_dispatch", request, routing, routing)

    def combine(
        self, routing: NVLinkLowLatencyRouting, request: LowLatencyCombineRequest
    ) -> Pending[None]:
        """Launch the kernel that sums and sends, and that which receives or its hook."""
        self._memory.check_fault()
        args = self.args.combine
        weights = request.topk_weights
        self._fill(args.common, routing.topk_idx, weights, routing.max_tokens, request.wait_stats)
        _set_handle(args.handle, routing.kept)
        args.x = request.x.data_ptr()
        args.combined_x = request.out.data_ptr()
        current = self._launch("low_latency_combine", args.common, request)
        self._keep_for_stream(current, routing)
        return self._pending("low_latency_combine", request, routing, None)

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

    def _kept(self, recv_src_info: int, max_tokens: int, num_topk: int) -> tuple[int, ...]:
        """Return where a dispatch leaves what its combine needs: behind its `recv_src_info`."""
        num_places = self._num_ranks * max_tokens
        epochs = recv_src_info + 4 * self._num_local_experts * num_places
        num_tokens = epochs + 4 * _EPOCHS
        num_rows = num_tokens + _BYTES_OF_PEERS
        ranks = num_rows + _BYTES_OF_PEERS
        rows = ranks + 4 * max_tokens
        weights = rows + 4 * num_places * num_topk
        return epochs, num_tokens, num_rows, ranks, rows, weights

    def _fill(
        self,
        common: header.LowLatency,
        topk_idx: Tensor,
        weights: Tensor | None,
        max_tokens: int,
        wait_stats: Tensor | None,
    ) -> None:
        common.topk_idx = topk_idx.data_ptr()
        common.idx_bytes = topk_idx.element_size()
        common.num_tokens, common.num_topk = topk_idx.shape
        common.weights = None if weights is None else weights.data_ptr()
        common.has_weights = weights is not None
        common.max_tokens = max_tokens
        common.wait_stats = None if wait_stats is None else wait_stats.data_ptr()

    def _launch(
        self,
        op: str,
        common: header.LowLatency,
        request: LowLatencyDispatchRequest | LowLatencyCombineRequest,
    ) -> int:
        """Launch an operation, or its send phase; return the caller's stream."""
        asynchronous = request.asynchronous
        common.phases = _SEND if request.is_split else _SEND | _RECEIVE
        common.num_blocks = sms = self._num_sms(asynchronous)
        stream = self._streams.begin(_KIND, asynchronous, sms)
        common.peers.record = self._recorder.start(op, 2 * self._hidden)
        self._native.launch(self._function.format(op), self._launched[op], stream)
        return self._streams.current if asynchronous else stream

    def _pending(
        self,
        op: str,
        request: LowLatencyDispatchRequest | LowLatencyCombineRequest,
        routing: NVLinkLowLatencyRouting,
        result: Any,
    ) -> Pending[Any]:
        """Return what `_launch` has started, which the arguments still describe."""
        if request.asynchronous:
            return Pending(result, self._streams.comm_event((request, routing)))
        if not request.is_split:
            return Pending(result)
        launched = self._launched[op]
        args = type(launched).from_buffer_copy(launched)
        common = self._common_of(args)

        def receive() -> Any:
            """Launch the receive phase."""
            self._memory.check_fault()
            common.phases = _RECEIVE
            common.num_blocks = sms = self._num_sms(False)
            stream = self._streams.begin(_KIND, False, sms)
            self._native.launch(self._function.format(op), args, stream)
            self._keep_for_stream(stream, routing)
            return result

        return Pending(finish=receive)

    @staticmethod
    def _common_of(args: Any) -> header.LowLatency:
        """Return what both operations have among the arguments of a function."""
        return args.common

    def _keep_for_stream(self, current: int, routing: NVLinkLowLatencyRouting) -> None:
        """Keep the routing's memory until `current`, the current stream, is done with it."""
        if current != routing.stream:
            stream = torch.cuda.current_stream(self._device)
            for tensor in (routing.memory, routing.topk_idx):
                tensor.record_stream(stream)


def _set_handle(handle: header.LowLatencyHandle, kept: tuple[int, ...]) -> None:
    """Set the fields one by one: another structure to copy would cost a call 2 µs."""
    epochs, num_tokens, num_rows, ranks, rows, weights = kept
    handle.epochs = epochs
    handle.num_tokens = num_tokens
    handle.num_rows = num_rows
    handle.ranks = ranks
    handle.rows = rows
    handle.weights = weights
