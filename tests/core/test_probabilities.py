"""Probabilities of the selected experts, and their gradients."""

from __future__ import annotations

import pytest
import torch

from ep_comm.routing.probabilities import select_probabilities


def by_hand(probs, topk_idx, grad):
    """What is selected, and what comes back, entry by entry."""
    selected, scattered = torch.zeros(topk_idx.shape), torch.zeros(probs.shape)
    for t, experts in enumerate(topk_idx.tolist()):
        for k, expert in enumerate(experts):
            if expert >= 0:
                selected[t, k] = probs[t, expert]
                scattered[t, expert] = grad[t, k]
    return selected, scattered


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("num_tokens", "num_topk", "num_experts"), [(0, 2, 4), (1, 1, 1), (37, 3, 5), (300, 8, 256)]
)
def test_select_and_scatter(device, num_tokens, num_topk, num_experts):
    generator = torch.Generator().manual_seed(num_tokens)
    probs = torch.rand(num_tokens, num_experts, generator=generator)
    order = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)
    topk_idx = order[:, :num_topk].to(torch.int32).contiguous()
    topk_idx[torch.rand(topk_idx.shape, generator=generator) < 0.2] = -1
    grad = torch.rand(topk_idx.shape, generator=generator)
    selected, scattered = by_hand(probs, topk_idx, grad)

    leaf = probs.to(device).requires_grad_()
    out = select_probabilities(leaf, topk_idx.to(device))
    out.backward(grad.to(device))
    assert torch.equal(out.detach().cpu(), selected)
    assert torch.equal(leaf.grad.cpu(), scattered)
