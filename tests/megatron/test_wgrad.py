"""ep_comm/megatron/wgrad.py on single layers, without Megatron's DistributedDataParallel."""

from __future__ import annotations

import pytest
import torch

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
