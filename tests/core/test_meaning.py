"""What the operations mean, without an oracle: ones count, identity experts, a dense MoE."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint

from ep_comm import Buffer, EPConfig, EPStateError, fp8
from ep_comm.routing.probabilities import select_probabilities

EXPERTS, TOPK, HIDDEN, TOKENS = 12, 3, 8, 10


def make_buffer(**changes) -> Buffer:
    sizes = dict(
        num_experts=EXPERTS,
        hidden=HIDDEN,
        max_tokens_per_rank=TOKENS,
        num_topk=TOPK,
        dtype=torch.float32,
    )
    return Buffer(None, EPConfig(**{**sizes, **changes}))


def random_topk(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    topk = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOPK).indices
    return torch.where(torch.rand(TOKENS, TOPK, generator=generator) < 0.2, -1, topk)


def ones_round_trip(rank: int, num_ranks: int) -> None:
    buffer = make_buffer()
    topk = random_topk(rank)
    x = torch.ones(TOKENS, HIDDEN)
    out = buffer.dispatch(x, topk, layout="rank")
    owner = torch.where(topk < 0, -1, topk // (EXPERTS // num_ranks))
    hits = torch.stack([(owner == r).any(1) for r in range(num_ranks)]).sum(0)
    combined = buffer.combine(out.recv_x, out.handle).combined_x
    assert torch.equal(combined, hits[:, None].expand_as(combined).float())

    out = buffer.dispatch(x, topk, layout="expert")
    combined = buffer.combine(out.recv_x, out.handle).combined_x
    assert torch.equal(combined, (topk >= 0).sum(1)[:, None].expand_as(combined).float())
    counts = out.handle.tokens_per_expert.tolist()
    groups = out.recv_x.split(out.num_recv_tokens_per_expert_list)
    for group, count in zip(groups, counts, strict=True):
        assert len(group) % 16 == 0
        assert (group[:count] == 1).all() and not group[count:].any()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_round_trip_of_ones_counts(num_ranks):
    run_ranks(num_ranks, ones_round_trip, num_ranks)


def moe_gradients(rank: int, num_ranks: int, layout_alignment: int) -> dict[str, torch.Tensor]:
    """One MoE layer over the group, its experts a linear map each, probabilities applied there."""
    buffer = make_buffer()
    local = EXPERTS // num_ranks
    topk, x, probs, weights, grad = moe_inputs(rank)
    weights = weights[rank * local : (rank + 1) * local].clone().requires_grad_()
    x, probs = x.requires_grad_(), probs.requires_grad_()
    out = buffer.dispatch(x, topk, probs, expert_alignment=layout_alignment)
    groups = out.recv_x.split(out.num_recv_tokens_per_expert_list)
    outputs = torch.cat([g @ w for g, w in zip(groups, weights, strict=True)])
    outputs = outputs * out.recv_topk_weights[:, None]
    y = buffer.combine(outputs, out.handle).combined_x
    y.backward(grad)
    return dict(y=y.detach(), x=x.grad, probs=probs.grad, weights=weights.grad)


def moe_inputs(rank: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    probs = torch.rand(TOKENS, TOPK, generator=generator)
    grad = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights = torch.randn(
        EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(7), dtype=torch.float32
    )
    return random_topk(rank), x, probs, weights, grad


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("alignment", [1, 16])
def test_layer_equals_a_dense_moe(num_ranks, alignment):
    results = run_ranks(num_ranks, moe_gradients, num_ranks, alignment)
    weight_grads = torch.zeros(EXPERTS, HIDDEN, HIDDEN, dtype=torch.float64)
    for rank, got in enumerate(results):
        topk, x, probs, weights, grad = moe_inputs(rank)
        x, probs = x.double().requires_grad_(), probs.double().requires_grad_()
        weights = weights.double().requires_grad_()
        selected = weights[topk.clamp(min=0)] * (topk >= 0)[..., None, None]
        y = torch.einsum("tk,th,tkhf->tf", probs, x, selected)
        y.backward(grad.double())
        weight_grads += weights.grad
        for name, want in (("y", y), ("x", x.grad), ("probs", probs.grad)):
            torch.testing.assert_close(got[name].double(), want.detach(), rtol=1e-5, atol=1e-5)
        assert not got["probs"][topk < 0].any()
    got_weights = torch.cat([got["weights"] for got in results]).double()
    torch.testing.assert_close(got_weights, weight_grads, rtol=1e-5, atol=1e-5)


def only_probabilities_or_only_rows(rank: int) -> None:
    buffer = make_buffer()
    topk, x, probs, _, _ = moe_inputs(rank)
    x, probs = x.requires_grad_(), probs.requires_grad_()
    out = buffer.dispatch(x, topk, probs)
    out.recv_topk_weights.sum().backward()
    assert torch.equal(probs.grad, (topk >= 0).float())
    assert not x.grad.any()
    out = buffer.dispatch(x, topk, probs.detach())
    out.recv_x.sum().backward()
    assert torch.equal(x.grad, (topk >= 0).sum(1)[:, None].expand_as(x).float())

    # Each rank uses another output: backward is one operation for all the same.
    x.grad = probs.grad = None
    out = buffer.dispatch(x, topk, probs)
    (out.recv_topk_weights if rank else out.recv_x).sum().backward()
    local = EXPERTS // buffer.num_ranks
    from_rank_0 = ((topk >= 0) & (topk < local)).sum(1)[:, None].expand_as(x)
    assert torch.equal(x.grad, from_rank_0.float())
    assert torch.equal(probs.grad, (topk >= local).float())


def test_unused_outputs_give_zero_gradients():
    run_ranks(2, only_probabilities_or_only_rows)


def only_one_rank_uses_the_rows(rank: int, dtype: torch.dtype, recv_dtype: torch.dtype) -> None:
    buffer = make_buffer(hidden=128, dtype=dtype)
    topk, _, probs, *_ = moe_inputs(rank)
    probs.requires_grad_()
    x = fp8.quantize(torch.randn(TOKENS, 128))
    out = buffer.dispatch(x, topk, probs, recv_dtype=recv_dtype)
    rows = out.recv_x[0] if recv_dtype == fp8.FP8_DTYPE else out.recv_x
    loss = out.recv_topk_weights.sum()
    if rank == 0:
        loss = loss + rows.float().sum() * out.recv_topk_weights.sum()
    backend = buffer._session.backend
    with mock.patch.object(backend, "combine", wraps=backend.combine) as combine:
        loss.backward()
    fits = recv_dtype in (torch.bfloat16, dtype)
    assert combine.call_args.args[1].x.dtype == (recv_dtype if fits else torch.bfloat16)
    assert probs.grad[topk >= 0].all() and not probs.grad[topk < 0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recv_dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_gradients_of_rows_sent_in_fp8_fit_the_buffer_and_each_other(dtype, recv_dtype):
    run_ranks(2, only_one_rank_uses_the_rows, dtype, recv_dtype)


def differentiate_twice(rank: int) -> None:
    buffer = make_buffer()
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    out = buffer.dispatch(x, random_topk(rank))
    y = buffer.combine(out.recv_x**3, out.handle).combined_x
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient.sum() + (x**3).sum()).backward()
    probs = torch.rand(TOKENS, EXPERTS, requires_grad=True)
    weights = select_probabilities(probs, random_topk(rank).int())
    (gradient,) = torch.autograd.grad((weights**3).sum(), probs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_second_derivative_is_refused():
    run_ranks(2, differentiate_twice)


def recompute(rank: int) -> None:
    buffer = make_buffer()
    topk, x, probs, *_ = moe_inputs(rank)
    columns = torch.where(topk < 0, EXPERTS, topk)  # the last one is for what is dropped
    all_probs = torch.zeros(TOKENS, EXPERTS + 1).scatter(1, columns, probs)[:, :-1].contiguous()
    routing_map = all_probs > 0

    def moe(x: torch.Tensor, all_probs: torch.Tensor) -> torch.Tensor:
        out = buffer.dispatch(x, routing_map=routing_map, topk_weights=all_probs)
        return out.recv_x, out.recv_topk_weights

    gradients = []
    for recomputed in (False, True):
        inputs = x.clone().requires_grad_(), all_probs.clone().requires_grad_()
        rows = checkpoint(moe, *inputs, use_reentrant=False) if recomputed else moe(*inputs)
        (rows[0] * rows[1][:, None]).square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    assert buffer.is_usable
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed) and plain.any()


def test_a_dispatch_may_be_recomputed():
    run_ranks(2, recompute)


def work_during_backward(rank: int) -> list[str]:
    buffer = make_buffer()
    topk, x, _, _, _ = moe_inputs(rank)
    calls: list[str] = []
    x.requires_grad_()
    out = buffer.dispatch(x, topk, during_backward=lambda: calls.append("wgrad"))
    assert calls == []
    out.recv_x.sum().backward()
    assert x.grad is not None
    return calls


def test_during_backward_is_called_once():
    assert run_ranks(2, work_during_backward) == [["wgrad"]] * 2


def fail_during_backward(rank: int) -> bool:
    """Rank 0's work fails. Its combine ends all the same, and with it that of the others."""
    buffer = make_buffer()
    topk, x, _, _, _ = moe_inputs(rank)

    def work() -> None:
        if rank == 0:
            raise KeyError("no weight gradient")

    out = buffer.dispatch(x.requires_grad_(), topk, during_backward=work)
    if rank == 0:
        with pytest.raises(KeyError, match="no weight gradient"):
            out.recv_x.sum().backward()
        with pytest.raises(EPStateError, match="an earlier operation failed: KeyError"):
            buffer.dispatch(x, topk)
    else:
        out.recv_x.sum().backward()
        hits = (topk >= 0).sum(1)[:, None].expand_as(x)
        assert torch.equal(x.grad, hits.float())
    assert [record.op for record in buffer.records][-1] == "combine"
    return buffer.is_usable


def test_an_error_during_backward_fails_the_rank_that_has_it():
    assert run_ranks(2, fail_during_backward, fresh=True) == [False, True]


def repeated_runs(rank: int) -> None:
    """Two buffers on one group, operations interleaved: same bits as alone."""
    one, two = make_buffer(), make_buffer(ranks_per_node=1)
    topk, x, probs, _, _ = moe_inputs(rank)
    first = one.dispatch(x, topk, probs)
    second = two.dispatch(x, topk, probs)
    a = one.combine(first.recv_x, first.handle).combined_x
    b = two.combine(second.recv_x, second.handle).combined_x
    for _ in range(20):
        again = one.dispatch(x, topk, probs)
        assert torch.equal(again.recv_x, first.recv_x)
        assert torch.equal(one.combine(again.recv_x, first.handle).combined_x, a)
        assert torch.equal(two.combine(second.recv_x, second.handle).combined_x, b)
    assert one.records.num_operations == 1 + 1 + 20 * 2
    assert [(r.op, r.epoch, r.place) for r in one.records.since(40)] == [
        ("plan", 21, 41),
        ("dispatch", 21, 41),
        ("combine", 21, 42),
    ]  # the numbers that an error of theirs would name
    assert one.records.wire_bytes == sum(r.wire_bytes for r in one.records) > 0


def test_two_buffers_and_repeated_operations():
    run_ranks(3, repeated_runs)
