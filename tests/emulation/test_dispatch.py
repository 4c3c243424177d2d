"""Dispatches of one host, with their kernels run on the CPU: no GPU is needed."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from emulated_ranks import run_emulated_ranks

from ep_comm import Buffer, EPConfig, EPTimeoutError
from ep_comm.backends.nvlink import rows as nvlink_rows

NUM_EXPERTS = 8
TOKENS = (77, 0, 70, 5)


def inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS[rank], 24, generator=generator).bfloat16()
    scores = torch.rand(TOKENS[rank], NUM_EXPERTS, generator=generator)
    topk_idx = scores.topk(3, dim=1).indices if TOKENS[rank] else torch.zeros(0, 3).long()
    return x, topk_idx.masked_fill(torch.rand(topk_idx.shape, generator=generator) < 0.2, -1)


def wanted(rank: int, num_ranks: int, layout: str) -> torch.Tensor:
    """Rows of all ranks in order, a loop over what each of them says."""
    per_rank = NUM_EXPERTS // num_ranks
    mine = range(rank * per_rank, (rank + 1) * per_rank)
    groups = [mine] if layout == "rank" else [[expert] for expert in mine]
    return torch.cat([rows_of(group, num_ranks) for group in groups])


def rows_of(experts: Collection[int], num_ranks: int) -> torch.Tensor:
    """Rows of all ranks that select one of these experts, in order."""
    rows = [
        x[t]
        for x, topk_idx in [inputs(source) for source in range(num_ranks)]
        for t in range(len(x))
        if set(topk_idx[t].tolist()) & set(experts)
    ]
    return torch.stack(rows)


def dispatches(rank: int, buffer: Buffer, layout: str) -> list[torch.Tensor]:
    x, topk_idx = inputs(rank)
    alignment = 1 if layout == "expert" else None
    out = buffer.dispatch(x, topk_idx, layout=layout, expert_alignment=alignment)
    rows = [out.recv_x.clone()]
    for num_sms in (2, 7):
        buffer.set_num_sms(num_sms)
        rows.append(buffer.dispatch(x, handle=out.handle).recv_x.clone())
    return rows


def config(num_ranks: int, timeout_s: float = 60) -> EPConfig:
    return EPConfig(
        num_experts=NUM_EXPERTS, hidden=24, max_tokens_per_rank=80, num_topk=3, timeout_s=timeout_s
    )


@pytest.mark.parametrize("delay_us", [0, 300])
@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_row_arrives(library, monkeypatch, num_ranks, layout, delay_us):
    monkeypatch.setattr(nvlink_rows, "DISPATCH_CHUNK_BYTES", 1)  # short: several chunks a warp
    results = run_emulated_ranks(
        library, num_ranks, dispatches, config(num_ranks), layout, delay_us=delay_us
    )
    for rank, found in enumerate(results):
        rows = wanted(rank, num_ranks, layout)
        for got in found:
            assert torch.equal(got, rows)


def full_groups(rank: int, buffer: Buffer, capacity: int) -> tuple[torch.Tensor, ...]:
    x, topk_idx = inputs(rank)
    stats = torch.zeros(2, buffer.num_local_experts, dtype=torch.int32)
    out = buffer.dispatch(x, topk_idx, expert_capacity=capacity, overflow_stats=stats)
    counts = out.handle.device_tokens_per_expert.clone()
    entries = out.handle.routing.array("entries").view(-1, 3, 4)[: out.handle.num_recv_tokens]
    buffer.dispatch(x, handle=out.handle)
    return out.recv_x.clone(), stats, counts, entries.clone()


@pytest.mark.parametrize("capacity", [9, 20, 64])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_full_groups_drop_their_own_last_tokens(library, num_ranks, capacity):
    results = run_emulated_ranks(library, num_ranks, full_groups, config(num_ranks), capacity)
    num_dropped, num_local_experts = 0, NUM_EXPERTS // num_ranks
    for rank, (rows, stats, counts, entries) in enumerate(results):
        num_placed = 0
        for e in range(num_local_experts):
            of_expert = rows_of([rank * num_local_experts + e], num_ranks)
            group, kept = rows[e * capacity : (e + 1) * capacity], of_expert[:capacity]
            assert torch.equal(group[: len(kept)], kept) and not group[len(kept) :].any()
            dropped = len(of_expert) - len(kept)
            assert stats[:, e].tolist() == [dropped, len(of_expert)]
            assert counts[e] == len(kept)
            num_dropped, num_placed = num_dropped + dropped, num_placed + len(kept)
        rows_of_k, ascending = entries[:, 0], entries[:, 2]
        assert (rows_of_k >= 0).sum() == num_placed
        for of_row, in_order in zip(rows_of_k.tolist(), ascending.tolist(), strict=True):
            there = sorted(row for row in of_row if row >= 0)
            assert in_order == there + [-1] * (4 - len(there))
    assert bool(num_dropped) == (capacity < 64)


def only_rank_0(rank: int, buffer: Buffer) -> str:
    x, topk_idx = inputs(rank)
    handle = buffer.dispatch(x, topk_idx).handle
    if rank == 0:
        with pytest.raises(EPTimeoutError) as error:
            buffer.dispatch(x, handle=handle)
            buffer.dispatch(x, handle=handle)
        return str(error.value)
    return ""


def test_a_missing_rank_is_named(library):
    said, _ = run_emulated_ranks(library, 2, only_rank_0, config(2, timeout_s=2))
    assert "rank 1" in said and "dispatch" in said
