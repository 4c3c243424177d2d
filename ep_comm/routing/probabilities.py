"""Probabilities of the selected experts out of those of all experts.

Megatron's router gives a probability for every expert, [T, E]; what travels with a token is those
of the experts that it selected, [T, K].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ep_comm import _native
from ep_comm._native import header


def select_probabilities(probs_TE: Tensor, topk_idx_TK: Tensor) -> Tensor:
    """Return FP32 [T, K]: the selected experts' probabilities, 0 where `topk_idx_TK` is -1.

    Differentiable: gradients scatter back to [T, E].

    Args:
        probs_TE: FP32, contiguous.
        topk_idx_TK: int32, contiguous, distinct experts in a row or -1.
    """
    if torch.is_grad_enabled() and probs_TE.requires_grad:
        return _Select.apply(probs_TE, topk_idx_TK)
    return _select(probs_TE, topk_idx_TK)


def scatter_probabilities(grad_TK: Tensor, topk_idx_TK: Tensor, num_experts: int) -> Tensor:
    """Return FP32 [T, E]: the gradient of `select_probabilities`, 0 where nothing was selected.

    Args:
        grad_TK: FP32.
        topk_idx_TK: As there.
        num_experts: E.
    """
    native = _native.load_for(grad_TK.device)
    if native is not None:
        output = grad_TK.new_empty(len(grad_TK), num_experts)
        grad_TK = grad_TK.contiguous()
        _launch(native, "ep_scatter_probabilities", grad_TK, topk_idx_TK, output, num_experts)
        return output
    # An extra column takes the dropped entries, so that no expert's gradient meets theirs.
    grad_TE = grad_TK.new_zeros(len(grad_TK), num_experts + 1)
    columns = torch.where(topk_idx_TK < 0, num_experts, topk_idx_TK).long()
    return grad_TE.scatter_(1, columns, grad_TK)[:, :-1]


def _select(probs_TE: Tensor, topk_idx_TK: Tensor) -> Tensor:
    native = _native.load_for(probs_TE.device)
    if native is None:
        return torch.where(topk_idx_TK < 0, 0.0, probs_TE.gather(1, topk_idx_TK.clamp(0).long()))
    output = torch.empty_like(topk_idx_TK, dtype=torch.float32)
    _launch(native, "ep_select_probabilities", probs_TE, topk_idx_TK, output, probs_TE.shape[1])
    return output


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs_TE: Tensor, topk_idx_TK: Tensor) -> Tensor:
        ctx.topk_idx_TK = topk_idx_TK  # no saved tensor: see Buffer on checkpointing
        ctx.num_experts = probs_TE.shape[1]
        return _select(probs_TE, topk_idx_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None]:
        return scatter_probabilities(grad_TK, ctx.topk_idx_TK, ctx.num_experts), None


def _launch(
    native: _native.NativeLibrary,
    function: str,
    input: Tensor,
    topk_idx_TK: Tensor,
    output: Tensor,
    num_experts: int,
) -> None:
    num_tokens, num_topk = topk_idx_TK.shape
    args = header.ProbabilitiesArgs(
        input=input.data_ptr(),
        topk_idx=topk_idx_TK.data_ptr(),
        output=output.data_ptr(),
        num_tokens=num_tokens,
        num_topk=num_topk,
        num_experts=num_experts,
    )
    native.launch(function, args, torch.cuda.current_stream(input.device).cuda_stream)
