"""`ep_comm.deep_ep.Buffer`'s low latency in every way, on a rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import low_latency_oracle as oracle
import numpy as np
import torch
import torch.distributed as dist
from cases import to_numpy
from low_latency_cases import LowLatencyCase, run_case, run_combined_twice
from own_name import patience

from ep_comm.deep_ep import Buffer

patience()
Case = LowLatencyCase
CASES = [
    Case(tokens=(7, 5), weights_with="combine"),
    Case(tokens=(0, 9), weights_with="combine", drop=0.3, split=True),
    Case(tokens=(12, 0, 7), weights_with="combine", scales="fp32", hidden=384, num_topk=4),
    Case(tokens=(12, 5), weights_with="combine", scales="power_of_two", hidden=128, split=True),
    Case(tokens=(9, 10, 8, 12), weights_with="combine", scales="ue8m0", hidden=1024, num_topk=4),
]


class Caller:
    """Calls a V1 buffer where the cases of the native one call that."""

    def __init__(self, buffer: Buffer, zero_copy: bool = False) -> None:
        self.buffer, self.zero_copy = buffer, zero_copy

    def low_latency_dispatch(self, x, topk_idx, max_tokens, num_experts, weights, **how) -> Any:
        assert weights is None  # V1 knows them at combine only
        recv_x, counts, handle, event, hook = self.buffer.low_latency_dispatch(
            x, topk_idx, max_tokens, num_experts, async_finish=not how["return_recv_hook"], **how
        )
        if hook is None:
            event.current_stream_wait()
        handle.recv_src_info = handle.native.recv_src_info  # as the cases read it
        return SimpleNamespace(recv_x=recv_x, recv_count=counts, handle=handle, hook=hook)

    def low_latency_combine(self, x, topk_idx, weights, handle, **how) -> Any:
        if self.zero_copy:
            self.buffer.get_next_low_latency_combine_buffer(handle)[:] = x
            x = torch.zeros_like(x)
        combined, event, hook = self.buffer.low_latency_combine(
            x, topk_idx, weights, handle, zero_copy=self.zero_copy, **how
        )
        return SimpleNamespace(combined_x=combined, event=event, hook=hook)


def make(**how: Any) -> Buffer:
    return Buffer(dist.group.WORLD, 0, 1000, low_latency_mode=True, num_qps_per_rank=4, **how)


def check_handle(case: LowLatencyCase, rank: int, handle: tuple) -> None:
    """Its items are those that DeepEP's tests read."""
    assert isinstance(handle, tuple) and len(handle) == 5
    src_info, layout_range, *sizes = handle
    assert sizes == [case.max_tokens, case.hidden, case.num_experts]
    assert (src_info.dtype, layout_range.dtype) == (torch.int32, torch.int64)
    topk_idx = [case.topk_idx(r) for r in range(case.num_ranks)]
    received = oracle.received(topk_idx, rank, case.experts_per_rank)
    for expert, rows in enumerate(received):
        tokens = to_numpy(src_info[expert])[: len(rows)]
        np.testing.assert_array_equal(tokens, [token for _, token in rows])
        for source, of_source in enumerate(to_numpy(layout_range[expert]).tolist()):
            first, count = of_source >> 32, of_source & 0xFFFFFFFF
            places = [i for i, row in enumerate(rows) if row[0] == source]
            assert count == len(places)
            assert places == list(range(first, first + count))


def every_way(rank: int, case: LowLatencyCase, zero_copy: bool) -> dict[str, Any]:
    buffer = make()
    handles = []
    dispatch = buffer.low_latency_dispatch
    buffer.low_latency_dispatch = lambda *a, **k: handles.append(dispatch(*a, **k)) or handles[-1]
    run = run_combined_twice if zero_copy else run_case
    results = run(rank, Caller(buffer, zero_copy), case, case.device)
    check_handle(case, rank, handles[0][2])
    buffer.destroy()
    return results
