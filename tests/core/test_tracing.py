"""Tensors that are not plain, torch.compile and selective checkpointing around our calls."""

from __future__ import annotations

import contextlib
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ep_comm import Buffer, EPConfig, EPUnsupportedError
from ep_comm.tracing import plain_tensor

SIZES = dict(num_experts=4, hidden=8, max_tokens_per_rank=32, num_topk=2, dtype=torch.float32)
TOPK = torch.tensor([[0, 2], [1, 3], [2, 1], [3, 0]])


def make_buffer() -> Buffer:
    return Buffer(None, EPConfig(**SIZES, timeout_s=20))


def wrapper_tensors(rank: int) -> None:
    import torch.distributed._functional_collectives as collectives
    from torch._subclasses import FakeTensorMode
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    buffer = make_buffer()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(4, 8)
    weights = torch.rand(4, 2)

    def replicated(tensor):
        return DTensor.from_local(tensor, mesh, [Replicate()])

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    started = buffer.records.num_operations
    for name, call in {
        "x is a DTensor": lambda: buffer.dispatch(replicated(x), TOPK),
        r"to_local\(\)": lambda: buffer.dispatch(replicated(x), TOPK),
        "x is a FakeTensor": lambda: buffer.dispatch(fake, TOPK),
        "topk_idx is a DTensor": lambda: buffer.dispatch(x, replicated(TOPK)),
        "topk_weights is a DTensor": lambda: buffer.dispatch(x, TOPK, replicated(weights)),
        "x is a torch.sparse_coo tensor": lambda: buffer.dispatch(x.to_sparse(), TOPK),
        "x is a tensor on cpu": lambda: torch.func.vmap(lambda t: buffer.dispatch(t, TOPK))(
            x[None]
        ),
    }.items():
        with pytest.raises(EPUnsupportedError, match=name):
            call()
    assert buffer.records.num_operations == started  # nothing was sent
    handle = buffer.dispatch(x, TOPK).handle
    rows = torch.randn(handle.num_rows, 8)
    with pytest.raises(EPUnsupportedError, match="x is a DTensor"):
        buffer.combine(replicated(rows), handle)

    # The result of a collective that has not been waited for is waited for.
    for needs_grad in (False, True):
        gathered = collectives.all_gather_tensor(x[:2], 0, dist.group.WORLD)
        assert type(gathered).__name__ == "AsyncCollectiveTensor"
        gathered.requires_grad_(needs_grad)
        out = buffer.dispatch(gathered, TOPK)
        combined = buffer.combine(out.recv_x, out.handle).combined_x
        assert type(combined) is torch.Tensor
        assert torch.equal(combined, 2 * gathered.trigger_wait())
        if needs_grad:
            combined.sum().backward()
            assert torch.equal(gathered.grad, torch.full((4, 8), 2.0))


def test_tensors_that_are_not_plain():
    run_ranks(2, wrapper_tensors)


def test_plain_tensors_are_passed_on():
    x = torch.randn(3)
    parameter = torch.nn.Parameter(x)
    assert plain_tensor("x", x) is x and plain_tensor("x", parameter) is parameter
    empty = torch.empty(0, 5)
    assert plain_tensor("x", empty) is empty
    negated = plain_tensor("x", torch._neg_view(x))  # its memory still holds x
    assert not negated.is_neg() and torch.equal(negated, -x)


def asynchronous_gradient(rank: int) -> None:
    """What a backward pass hands over may be the result of a collective that is under way."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return AsyncCollectiveTensor(grad.clone())

    buffer = make_buffer()
    x = torch.randn(4, 8, requires_grad=True)
    out = buffer.dispatch(x, TOPK)
    y = Late.apply(buffer.combine(Late.apply(out.recv_x), out.handle).combined_x)
    backend = buffer._session.backend
    with (
        mock.patch.object(backend, "dispatch", wraps=backend.dispatch) as dispatch,
        mock.patch.object(backend, "combine", wraps=backend.combine) as combine,
    ):
        y.sum().backward()
    assert torch.equal(x.grad, torch.full((4, 8), 2.0))
    for call in (dispatch, combine):  # kernels would take its address
        assert type(call.call_args.args[1].x) is torch.Tensor


def test_gradients_that_are_not_plain():
    run_ranks(2, asynchronous_gradient)


def compiled_layer(rank: int) -> None:
    """The numbers of the layer as it is, for changing token counts, and as many operations."""
    buffer = make_buffer()
    weight = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(rank))

    def layer(x, router):
        probs, topk_idx = (x @ router).softmax(-1).topk(2)
        out = buffer.dispatch(x, topk_idx, probs)
        groups = out.recv_x.split(out.num_recv_tokens_per_expert_list)
        rows = torch.cat([group @ w for group, w in zip(groups, weight)])  # noqa: B905
        rows = rows * out.recv_topk_weights[:, None]
        return x + buffer.combine(rows, out.handle).combined_x

    router = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(layer, backend="aot_eager")
    for seed, num_tokens in enumerate((8, 5, 32)):
        results = []
        for function in (layer, compiled):
            before = buffer.records.num_operations
            x = torch.randn(
                num_tokens, 8, generator=torch.Generator().manual_seed(10 * seed + rank)
            )
            inputs = x.requires_grad_(), router.clone().requires_grad_()
            y = function(*inputs)
            y.square().sum().backward()
            num_operations = buffer.records.num_operations - before
            results.append((y.detach(), *(t.grad for t in inputs), torch.tensor(num_operations)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(Exception, match="Buffer.dispatch"):
        torch.compile(lambda *args: layer(*args), backend="aot_eager", fullgraph=True)(*inputs)
    assert buffer.is_usable


@pytest.mark.slow
def test_a_compiled_layer():
    run_ranks(2, compiled_layer, timeout_s=300)


def checkpointed_layer(rank: int, saved: str) -> None:
    buffer = make_buffer()
    weight = torch.randn(8, 8, requires_grad=True)
    op = torch.ops.aten.mm.default if saved == "mm" else getattr(torch.ops.ep_comm, saved).default

    def policy(context, each, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if each is op else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(x):
        out = buffer.dispatch(x, TOPK)
        return buffer.combine(out.recv_x @ weight, out.handle).combined_x

    def gradient(function):
        x = torch.ones(4, 8, requires_grad=True)
        function(x).sum().backward()
        return x.grad

    contexts = partial(create_selective_checkpoint_contexts, policy)
    recomputed = partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)
    if saved == "dispatch":
        started = buffer.records.num_operations
        with pytest.raises(EPUnsupportedError, match="cannot save the result of ep_comm.dispatch"):
            recomputed(torch.ones(4, 8, requires_grad=True))
        assert buffer.records.num_operations == started
    else:
        assert torch.equal(gradient(recomputed), gradient(layer))


class Seen(TorchDispatchMode):
    """Notes which ops it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "ep_comm":
            self.ops.append(op.name())
        return op(*args, **(kwargs or {}))


def layer_with_and_without_ops(rank: int, of_map: bool) -> None:
    """Where a mode looks on the ops of the library are called; numbers and gradients are equal."""
    buffer = make_buffer()
    topk = TOPK if rank else TOPK[:3].clone().fill_diagonal_(-1)
    routing_map = torch.zeros(len(topk), 5, dtype=torch.bool)
    routing_map = routing_map.scatter_(1, torch.where(topk < 0, 4, topk), True)[:, :4].contiguous()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(len(topk), 8, generator=generator)
    probs = torch.rand(len(topk), 4 if of_map else 2, generator=generator)

    def results(mode) -> list[torch.Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (x, probs)]
        with mode:
            how = dict(routing_map=routing_map) if of_map else dict(topk_idx=topk)
            out = buffer.dispatch(inputs[0], topk_weights=inputs[1], **how)
            rows = out.recv_x * out.recv_topk_weights[:, None]
            y, weights, _ = buffer.combine(rows, out.handle, out.recv_topk_weights)
        (y.square().sum() + weights.square().sum()).backward()
        return [y.detach(), weights.detach(), *(tensor.grad for tensor in inputs)]

    seen = Seen()
    for got, want in zip(results(contextlib.nullcontext()), results(seen), strict=True):
        assert torch.equal(got, want) and want.any()
    assert seen.ops == ["ep_comm::dispatch", "ep_comm::combine"]


@pytest.mark.parametrize("of_map", [True, False], ids=["map", "topk"])
def test_ops_are_called_where_a_mode_looks_on(of_map):
    run_ranks(2, layer_with_and_without_ops, of_map)


@pytest.mark.parametrize("saved", ["mm", "combine", "dispatch"])
def test_selective_checkpointing(saved):
    run_ranks(2, checkpointed_layer, saved)
