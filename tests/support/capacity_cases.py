"""Dispatches into outputs of given size, for any backend, compared with usual ones."""

from __future__ import annotations

import torch
from cases import Case, assert_same, finished, to_numpy, to_torch

from ep_comm import Buffer, fp8


def exact_and_roomy(rank: int, case: Case, buffer: Buffer | None = None) -> None:
    """Everything is as without it, but for zero rows behind.

    Compared on the host, after `finished`: what torch copies by itself (``torch.equal``) would hold
    up the other virtual ranks.
    """
    buffer = buffer or Buffer(None, case.config())
    x, topk, probs, how = inputs_of(case, rank)
    usual = buffer.dispatch(x, topk, probs, **how)
    y = to_torch(case.rows(rank, usual.handle.num_rows, salt=4), case.device)
    grad_probs = torch.rand_like(usual.recv_topk_weights)
    usual_sum = buffer.combine(y, usual.handle, grad_probs)
    finished(usual_sum.combined_x)
    for room in (0, 40):
        rows = max(usual.handle.num_rows + room, 1)
        out = buffer.dispatch(x, topk, probs, **how, num_worst_tokens=rows)
        finished(out.recv_x)
        assert out.num_recv_tokens_per_expert_list == []
        assert out.recv_x.shape[0] == out.handle.num_rows == rows
        for got, want in (
            (out.recv_x, usual.recv_x),
            (out.recv_topk_weights, usual.recv_topk_weights),
        ):
            got, want = to_numpy(got), to_numpy(want)
            assert_same(got[: len(want)], want, "rows")
            assert not got[len(want) :].any(), "rows behind the last group are not zero"
        if case.layout == "rank":
            count = usual.handle.num_rows
            got, want = to_numpy(out.recv_topk_idx), to_numpy(usual.recv_topk_idx)
            assert_same(got[:count], want, "indices")
            assert (got[count:] == -1).all()
        else:
            ends = usual.handle.padded_tokens_per_expert.cumsum(0)
            assert torch.equal(out.handle.device_expert_offsets[1:].cpu().long(), ends)
            assert torch.equal(out.handle.tokens_per_expert, usual.handle.tokens_per_expert)
        for handle in (usual.handle, out.handle):
            tokens, received = handle.device_tokens_per_expert, handle.device_tokens_per_rank
            assert torch.equal(tokens.cpu().long(), usual.handle.tokens_per_expert)
            assert received.dtype == torch.int32 and received.device == out.recv_x.device
            assert received.tolist() == list(usual.handle.num_recv_tokens_per_rank)
        padded_y = torch.nan * torch.ones(rows, case.hidden, dtype=y.dtype, device=y.device)
        padded_y[: len(y)] = y
        padded_grad = torch.full((rows, *grad_probs.shape[1:]), torch.nan, device=y.device)
        padded_grad[: len(y)] = grad_probs
        summed = buffer.combine(padded_y, out.handle, padded_grad)
        finished(summed.combined_x)
        assert_same(to_numpy(summed.combined_x), to_numpy(usual_sum.combined_x), "combined")
        got, want = (to_numpy(o.combined_topk_weights) for o in (summed, usual_sum))
        assert_same(got, want, "probabilities")
        again = buffer.dispatch(x, topk_weights=probs, handle=out.handle)
        assert_same(to_numpy(again.recv_x), to_numpy(out.recv_x), "cached dispatch")


def groups_of_one_size(rank: int, case: Case, buffer: Buffer | None = None) -> None:
    """Rows of a group are those of an unpadded dispatch, then zeros; empty groups are zeros."""
    buffer = buffer or Buffer(None, case.config())
    x, topk, probs, _ = inputs_of(case, rank)
    usual = buffer.dispatch(x, topk, probs, expert_alignment=1)
    finished(usual.recv_x)
    tokens = usual.handle.tokens_per_expert
    for capacity in (sum(case.tokens), sum(case.tokens) + 4):
        out = buffer.dispatch(x, topk, probs, expert_capacity=capacity)
        assert out.handle.padded_tokens_per_expert.tolist() == [capacity] * case.experts_per_rank
        finished(out.recv_x)
        assert torch.equal(out.handle.tokens_per_expert, tokens)
        assert torch.equal(out.handle.device_tokens_per_expert.cpu().long(), tokens)
        offsets = out.handle.device_expert_offsets.cpu()
        assert offsets.tolist() == [capacity * e for e in range(case.experts_per_rank + 1)]
        y = torch.full_like(out.recv_x, torch.nan)
        for got, want in (
            (out.recv_x, usual.recv_x),
            (out.recv_topk_weights, usual.recv_topk_weights),
        ):
            groups, first = to_numpy(got).reshape(case.experts_per_rank, capacity, -1), 0
            for group, count in zip(groups, tokens.tolist(), strict=True):
                rows = to_numpy(want)[first : first + count].reshape(count, group.shape[1])
                assert_same(group[:count], rows, "rows of a group")
                assert not group[count:].any(), "padding is not zero"
                first += count
        for e, count in enumerate(tokens.tolist()):
            first = int(tokens[:e].sum())
            y[e * capacity : e * capacity + count] = usual.recv_x[first : first + count]
        finished(y)
        summed = buffer.combine(y, out.handle)
        usual_sum = buffer.combine(usual.recv_x, usual.handle)
        finished(summed.combined_x)
        assert_same(to_numpy(summed.combined_x), to_numpy(usual_sum.combined_x), "combined")
        again = buffer.dispatch(x, topk_weights=probs, handle=out.handle)
        assert_same(to_numpy(again.recv_x), to_numpy(out.recv_x), "cached dispatch")


def inputs_of(case: Case, rank: int) -> tuple:
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2), case.device)
    topk = to_torch(case.topk_idx(rank), case.device)
    probs = to_torch(case.probabilities(rank, tuple(topk.shape), salt=3), case.device)
    return x, topk, probs, dict(layout=case.layout, expert_alignment=case.alignment)


def captured(rank: int, buffer: Buffer | None, case: Case) -> None:
    """Dispatch, a stand-in for experts and combine as a graph, replayed on fresh inputs."""
    buffer = buffer or Buffer(None, case.config())
    x, topk, probs, how = inputs_of(case, rank)
    rows = sum(case.tokens) * case.num_topk + case.num_experts * case.alignment

    def layer(x, topk, probs):
        out = buffer.dispatch(x, topk, probs, **how, num_worst_tokens=rows)
        y = out.recv_x.float() * (out.recv_topk_weights[:, None] + 1)
        back = buffer.combine(y.to(x.dtype), out.handle)
        return out, back.combined_x

    def both_types(x, topk, probs):
        out, combined = layer(x, topk, probs)
        cached = buffer.dispatch(x, handle=out.handle, wire_dtype=fp8.FP8_DTYPE)
        return combined, cached.recv_x, buffer.combine(cached.recv_x, out.handle).combined_x

    both_types(x, topk, probs)  # loads kernels
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="relaxed"):
        in_graph = both_types(x, topk, probs)
    operations = buffer.records.num_operations
    for seed in range(1, 6):
        other = Case(**{**vars(case), "seed": seed})
        for static, fresh in zip((x, topk, probs), inputs_of(other, rank)[:3], strict=True):
            static.copy_(fresh)
        graph.replay()
        torch.cuda.current_stream().synchronize()
        got = [to_numpy(tensor) for tensor in in_graph]
        eager = both_types(x, topk, probs)
        for a, b in zip(got, eager, strict=True):
            assert_same(a, to_numpy(b), f"replay {seed}")
    # The graph's own records are those of its last replay.
    recorded = buffer.records.since(operations - 4)[:4]
    assert [r.op for r in recorded] == ["dispatch", "combine", "dispatch", "combine"]
    again = buffer.records.since(buffer.records.num_operations - 4)
    # Two of a kind each time: one that warms up, then five replays and as many eager ones.
    assert [r.epoch for r in recorded] == [19, 19, 20, 20]
    assert [r.epoch for r in again] == [21, 21, 22, 22]
    assert [r.rows_to_rank for r in recorded] == [r.rows_to_rank for r in again]


GRAPH_CASE = Case(
    tokens=(40, 25), hidden=512, num_topk=3, alignment=16, device="cuda", backend="nvlink"
)
