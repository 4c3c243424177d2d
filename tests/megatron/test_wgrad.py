"""ep_comm/megatron/wgrad.py on single layers, without Megatron's DistributedDataParallel."""

from __future__ import annotations

import queue
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("megatron.core")

from ep_comm.errors import EPStateError, EPUnsupportedError  # noqa: E402
from ep_comm.megatron.wgrad import DelayedWeightGradient, check_weight_gradients  # noqa: E402


class Linear(torch.nn.Module):
    """A layer as far as the delay needs one: with Megatron's ``_forward_impl``."""

    gradient_accumulation_fusion = False

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 5, generator=generator))

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.matmul(input, weight.t())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._forward_impl(input, self.weight)


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(7, 5, generator=generator) for _ in range(3)]


def backward(linear: Linear, input: torch.Tensor) -> None:
    linear(input).square().sum().backward()


@pytest.mark.parametrize("each", [True, False], ids=["after-each", "after-all"])
def test_gradients_of_microbatches_add_up(each):
    """Whether the owed gradients are computed after each backward pass or after the last."""
    plain, delayed = Linear(), Linear()
    delay = DelayedWeightGradient(delayed)
    for input in inputs():
        backward(plain, input)
        backward(delayed, input)
        if each:
            delay.backward_dw()
    if not each:
        assert len(delay) == 3 and delayed.weight.grad is None
        with pytest.raises(EPStateError, match=r"never computed: 0 \(3\)"):
            check_weight_gradients([torch.nn.Sequential(delayed)])
        delay.backward_dw()
    assert torch.equal(delayed.weight.grad, plain.weight.grad)
    assert len(delay) == 0
    check_weight_gradients([delayed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_are_those_without_the_delay(dtype):
    plain, delayed = Linear().to(dtype), Linear().to(dtype)
    delay = DelayedWeightGradient(delayed)
    gradients = []
    for linear in (plain, delayed):
        input = inputs()[0].requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = linear(input)
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
        gradients.append(input.grad)
    delay.backward_dw()
    assert torch.equal(*gradients) and torch.equal(delayed.weight.grad, plain.weight.grad)
    assert delayed.weight.grad.dtype == dtype


def test_the_next_step_begins_anew():
    plain, delayed = Linear(), Linear()
    delay = DelayedWeightGradient(delayed)
    for input in inputs():
        for linear in (plain, delayed):
            linear.weight.grad = None  # as optimizers do
            backward(linear, input)
        delay.backward_dw()
        assert torch.equal(delayed.weight.grad, plain.weight.grad)


def test_apexs_fusion_in_megatrons_own_layers_is_refused():
    linear = Linear()
    linear.gradient_accumulation_fusion = True  # what Megatron grants where Apex is installed
    forward = linear._forward_impl
    with pytest.raises(EPUnsupportedError, match="--no-gradient-accumulation-fusion"):
        DelayedWeightGradient(linear)
    assert linear._forward_impl == forward and not hasattr(linear.weight, "skip_backward_post_hook")


class DelayingLinear(torch.nn.Module):
    """Hands out and keeps its gradient's memory as Transformer Engine's delaying layers do."""

    fuse_wgrad_accumulation = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 2))
        self.weight.skip_backward_post_hook = True
        self.wgrad_store = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _DelayingFunction.apply(x, self.weight, self.wgrad_store)


class _DelayingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, store):
        ctx.save_for_backward(weight)
        ctx.store = store
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        ctx.store.append(torch.full_like(weight, torch.nan))  # not computed yet
        return grad @ weight, ctx.store[-1], None


def unfinished_gradients_are_left_alone(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron.wgrad import delay_weight_gradients

    experts = torch.nn.Sequential(DelayingLinear(), torch.nn.ReLU())
    x = torch.ones(4, 2, requires_grad=True)
    layer = experts[0]
    experts(x).sum().backward()
    assert layer.weight.grad.isnan().all(), "autograd copied it"
    delay_weight_gradients(experts)
    addresses = set()
    for _ in range(2):
        layer.weight.grad = None
        experts(x).sum().backward()
        addresses.add(layer.weight.grad.data_ptr())
    assert len(addresses) == 1, "autograd copied the placeholder"
    assert addresses.isdisjoint(grad.data_ptr() for grad in layer.wgrad_store)
    assert x.grad.eq(9).all()


def test_autograd_copies_no_unfinished_gradients():
    run_ranks(1, unfinished_gradients_are_left_alone, pool="megatron")


class StoringLinear(torch.nn.Module):
    """Keeps a queue of delayed gradients; some of Transformer Engine's raise where it is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 2))
        self.wgrad_store = SimpleNamespace(context=queue.Queue())

    def backward_dw(self) -> None:
        self.wgrad_store.context.get_nowait()


def only_owed_gradients_are_computed(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron.wgrad import delay_weight_gradients

    frozen, trained = StoringLinear(), StoringLinear()
    compute = delay_weight_gradients(torch.nn.Sequential(frozen, trained))
    trained.wgrad_store.context.put("operands")
    compute()
    assert trained.wgrad_store.context.empty()


def test_frozen_layers_are_asked_for_no_gradient():
    run_ranks(1, only_owed_gradients_are_computed, pool="megatron")
