"""`ep_comm.deep_ep.Buffer`: low latency on real processes, against a loop over tokens."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from deep_ep_low_latency import CASES, Case, every_way, make
from low_latency_cases import check_results
from own_name import patience
from ranks import run_ranks

from ep_comm import EPArgumentError, EPStateError, EPTimeoutError, EPUnsupportedError
from ep_comm.deep_ep import Buffer
from ep_comm.deep_ep.hints import TIMEOUT_VARIABLE
from ep_comm.job.store import default_store

patience()


@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_way_to_call(case, zero_copy):
    check_results(case, run_ranks(case.num_ranks, every_way, case, zero_copy))


def sizes(rank: int) -> None:
    """A larger call makes a larger buffer; handles of the smaller one go on working."""
    buffer = make()
    small, large = Case(tokens=(3, 2), max_tokens=4), Case(tokens=(9, 2), max_tokens=10)
    x = {case: torch.ones(case.tokens[rank], case.hidden).bfloat16() for case in (small, large)}
    handles = {}
    for case in (small, large, small):
        topk = torch.from_numpy(case.topk_idx(rank))
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
            x[case], topk, case.max_tokens, case.num_experts, use_fp8=False
        )
        assert recv_x.shape[1] == 2 * case.max_tokens
        handles.setdefault(case, (handle, topk, recv_x))
    made = [each.native.config.low_latency_tokens for each in buffer._buffers._all]
    assert made == [4, 10]
    for case, (handle, topk, recv_x) in handles.items():
        ones = torch.ones_like(recv_x)
        weights = torch.ones(topk.shape)
        combined, _, _ = buffer.low_latency_combine(ones, topk, weights, handle)
        assert torch.equal(combined, x[case] * (topk >= 0).sum(1, keepdim=True))
    # Normal operations beside, of another size.
    topk = handles[small][1]
    layout = buffer.get_dispatch_layout(topk, small.num_experts)
    buffer.dispatch(x[small], None, layout[0], layout[1], layout[3], layout[2], topk)
    buffer.clean_low_latency_buffer(8, 24, 16)
    assert buffer._buffers.newest.native.config.hidden == 24
    # Waits are counted for this rank: a row of a matrix of all.
    waits = torch.zeros(2, 2, dtype=torch.int64)
    buffer.low_latency_dispatch(x[small], topk, 4, 8, None, waits, use_fp8=False)
    assert not waits[1 - rank].any()
    buffer.destroy()


def test_sizes_follow_the_calls():
    run_ranks(2, sizes)


def refusals(rank: int) -> None:
    normal = Buffer(dist.group.WORLD)
    x, topk = torch.ones(2, 128).bfloat16(), torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(EPArgumentError, match="without low_latency_mode=True"):
        normal.low_latency_dispatch(x, topk, 4, 4)
    with pytest.raises(EPArgumentError, match="without enable_shrink=True"):
        normal.low_latency_clean_mask_buffer()
    buffer = make(enable_shrink=True)
    with pytest.raises(EPStateError, match="clean_low_latency_buffer first"):
        buffer.low_latency_query_mask_buffer(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(EPArgumentError, match="num_max_dispatch_tokens_per_rank must be"):
        buffer.low_latency_dispatch(x, topk, 0, 4)
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, topk, 4, 4, use_fp8=False)
    weights = torch.ones(2, 2)
    with pytest.raises(EPUnsupportedError, match="use_logfmt=True"):
        buffer.low_latency_combine(recv_x, topk, weights, handle, use_logfmt=True)
    with pytest.raises(EPArgumentError, match="what low_latency_dispatch returned, got tuple"):
        buffer.low_latency_combine(recv_x, topk, weights, handle[:])
    for extra in ("use_nvfp4", "x_global_scale"):
        with pytest.raises(TypeError, match=extra):
            buffer.low_latency_dispatch(x, topk, 4, 4, **{extra: True})
    buffer.low_latency_combine(recv_x, topk, weights, handle)
    buffer.destroy()
    normal.destroy()


def test_what_is_not_there_is_refused_by_name():
    run_ranks(2, refusals)


# ---- Masks -------------------------------------------------------------------------------------


def masked(rank: int) -> None:
    """Ranks 0 and 1 go on without rank 2, and take it in again."""
    os.environ[TIMEOUT_VARIABLE] = "3"
    buffer = make(enable_shrink=True)
    buffer.clean_low_latency_buffer(4, 128, 6)
    x = torch.full((2, 128), 1.0 + rank).bfloat16()
    topk = torch.tensor([[0, 2], [3, 5]])
    status = torch.full((3,), 7, dtype=torch.int32)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        recv_x, counts, handle, _, _ = buffer.low_latency_dispatch(x, topk, 4, 6, use_fp8=False)
        return buffer.low_latency_combine(recv_x, topk, torch.ones(2, 2), handle)[0], counts

    combined, counts = step()
    assert torch.equal(combined, 2 * x) and counts.sum() == (3, 6, 3)[rank]
    if rank != 2:
        with pytest.raises(EPTimeoutError, match="rank 2"):
            step()
        buffer.low_latency_update_mask_buffer(2, True)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 0, 1]
        combined, counts = step()
        assert torch.equal(combined, x * torch.tensor([[2], [1]])) and counts.sum() == (2, 4)[rank]
    store = default_store()
    store.set(f"went on without rank 2/{rank}", "")
    store.wait([f"went on without rank 2/{r}" for r in range(3)])
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0, 0]
    combined, counts = step()
    assert torch.equal(combined, 2 * x) and counts.sum() == (3, 6, 3)[rank]
    buffer.destroy()


def test_masks():
    run_ranks(3, masked, fresh=True)
