"""Low-latency operations between nodes: messages over the network to every rank.

What it does is in csrc/PROTOCOL.md, "Low latency between nodes". Calls, phases and graphs are those
of one host.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ep_comm._native import header
from ep_comm.backends.nodes.memory import NodesMemory
from ep_comm.backends.nvlink.low_latency import EPOCHS, Call, LowLatency
from ep_comm.backends.requests import LowLatencySizes

_OPS = (header.EP_OP_LOW_LATENCY_DISPATCH, header.EP_OP_LOW_LATENCY_COMBINE)
_FLAG_BYTES = 8


class NodesLowLatency(LowLatency):
    """The low-latency part of the backend between nodes; its arguments are those of `LowLatency`.

    Ranks cannot be masked here.
    """

    _memory: NodesMemory
    _offsets: header.NodesOffsets
    _state_ints = header.EP_NODES_LOW_LATENCY_STATE_INTS

    @cached_property
    def _counters(self) -> Tensor:
        """For each operation: rows of a chunk that are packed."""
        shape = len(_OPS), self._num_ranks, header.EP_LOW_LATENCY_CHUNKS
        return torch.zeros(shape, dtype=torch.int32, device=self._device)

    def _make_calls(self) -> tuple[Call, Call]:
        dispatch = header.NodesLowLatencyDispatchArgs(
            dispatch=header.LowLatencyDispatchArgs(
                common=self._common_args(header.EP_OP_LOW_LATENCY_DISPATCH),
                notice=self._memory.notice_address,
            ),
            nodes=self._nodes_args(0),
        )
        combine = header.NodesLowLatencyCombineArgs(
            combine=header.LowLatencyCombineArgs(
                common=self._common_args(header.EP_OP_LOW_LATENCY_COMBINE)
            ),
            nodes=self._nodes_args(1),
        )
        dispatch_op, combine_op = _OPS
        return (
            Call(dispatch_op, "ep_nodes_low_latency_dispatch", dispatch, dispatch.dispatch),
            Call(combine_op, "ep_nodes_low_latency_combine", combine, combine.combine),
        )

    def _nodes_args(self, kind: int) -> header.NodesLowLatency:
        """Return what kernels of dispatch, 0, or combine, 1, know of the other ranks."""
        offsets = self._offsets
        of_kind = kind * 2 * self._num_ranks * _FLAG_BYTES
        return header.NodesLowLatency(
            network=self._memory.network_of_ranks,
            counters=self._counters[kind].data_ptr(),
            credit_offset=offsets.low_latency_credits + of_kind,
            head_flag_offset=offsets.low_latency_head_flags + of_kind,
            row_flag_offset=offsets.low_latency_row_flags + of_kind * header.EP_LOW_LATENCY_CHUNKS,
            head_send_offset=offsets.low_latency_heads_to_send[kind],
            head_receive_offset=offsets.low_latency_heads_received[kind],
            head_region=offsets.low_latency_head_region[kind],
            row_send_offset=offsets.low_latency_rows_to_send[kind],
            row_receive_offset=offsets.low_latency_rows_received[kind],
            row_region=offsets.low_latency_row_region,
            ranks_per_node=self._memory.place.ranks_per_node,
        )

    @property
    def networks(self) -> list[header.Network]:
        """How the kernels reach the other ranks; to be changed in place."""
        return [call.launched.nodes.network for call in self.calls]

    def num_kept_ints(self, max_tokens: int, num_topk: int) -> int:
        """Return the numbers of an ``ep_low_latency_handle``, see ``ep_nodes_low_latency``."""
        entries = self._num_ranks * max_tokens * num_topk
        return EPOCHS + self._num_ranks + max_tokens * num_topk + 2 * entries

    def _kept(self, sizes: LowLatencySizes) -> tuple[int, ...]:
        num_places = self._num_ranks * sizes.max_tokens
        epochs = 4 * self._num_local_experts * num_places
        num_rows = epochs + 4 * EPOCHS
        ranks = num_rows + 4 * self._num_ranks
        rows = ranks + 4 * sizes.max_tokens * sizes.num_topk
        weights = rows + 4 * num_places * sizes.num_topk
        num_tokens = 0  # not used
        return epochs, num_tokens, num_rows, ranks, rows, weights
