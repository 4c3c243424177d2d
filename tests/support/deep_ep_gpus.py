"""Inputs of one size for DeepEP's calls on GPUs."""

from __future__ import annotations

import torch
from buffer_cases import on_gpus

ON_GPUS = dict(backend="nccl", timeout_s=240)


def of_two(cases: list) -> list:
    return [on_gpus(case, "nvlink") for case in cases if case.num_ranks == 2]


HIDDEN, EXPERTS, TOPK, TOKENS = 7168, 32, 8, 128


def inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    weights, topk_idx = torch.rand(TOKENS, EXPERTS, device="cuda").topk(TOPK)
    return x, topk_idx, weights
