"""Low-latency calls of small sizes: right ones, and what makes them wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ep_comm import EPError

SIZES = dict(num_experts=4, hidden=512, max_tokens_per_rank=4, num_topk=2, low_latency_tokens=6)
X = torch.ones(4, 512, dtype=torch.bfloat16)
TOPK = torch.tensor([[0, 3], [1, -1], [2, 0], [3, 1]])
WEIGHTS = torch.ones(4, 2)
Y = torch.ones(2, 8, 512, dtype=torch.bfloat16)
DISPATCH = dict(
    x=X, topk_idx=TOPK, num_max_dispatch_tokens_per_rank=4, num_experts=4, topk_weights=WEIGHTS
)


def raised(call: Callable[[], Any]) -> str:
    """Type and message of the error of `call`, which is one of ours."""
    try:
        call()
    except EPError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# name: (changed arguments of a good dispatch, part of the message)
BAD_DISPATCH: dict[str, tuple[dict[str, Any], str]] = {
    "more_tokens": (dict(num_max_dispatch_tokens_per_rank=3), "x has 4 tokens, more than .* 3"),
    "more_room": (
        dict(num_max_dispatch_tokens_per_rank=7),
        r"from 1 to the 6 that .*low_latency_tokens=.*got 7",
    ),
    "no_room": (dict(num_max_dispatch_tokens_per_rank=0), "got 0"),
    "room_type": (dict(num_max_dispatch_tokens_per_rank=4.0), r"got 4\.0"),
    "experts": (dict(num_experts=8), "num_experts is 4 in this buffer, got 8"),
    "hidden": (dict(x=X[:, :256].contiguous()), r"x must be \[num_tokens, 512\], got \[4, 256\]"),
    "dtype": (dict(x=X.float()), "x must be torch.bfloat16, got torch.float32"),
    "x_fp8": (dict(x=(X, WEIGHTS)), "x must be a torch.Tensor, got tuple"),
    "strides": (dict(x=torch.ones(512, 4).bfloat16().t()), "x must be contiguous, got strides"),
    "device": (dict(x=X.to("meta")), "x is on meta"),
    "topk_tokens": (dict(topk_idx=TOPK[:3]), "the routing has 3 tokens, x has 4"),
    "topk_dtype": (dict(topk_idx=TOPK.float()), "topk_idx has dtype torch.float32"),
    "topk_too_wide": (dict(topk_idx=TOPK.repeat(1, 2)), "4 entries a token.*num_topk 2"),
    "topk_none": (dict(topk_idx=None), "pass exactly one of topk_idx"),
    "no_such_expert": (dict(topk_idx=TOPK + 1), "token 0, k 1 is 4"),
    "expert_twice": (dict(topk_idx=TOPK * 0), "each expert may come once"),
    "weights_shape": (dict(topk_weights=WEIGHTS[:, :1]), r"topk_weights must be \[4, 2\]"),
    "weights_dtype": (dict(topk_weights=WEIGHTS.double()), "must be torch.float32, got .*64"),
    "grad": (dict(x=X.clone().requires_grad_()), "x requires grad.*no_grad"),
    "rounded_bf16": (dict(use_fp8=False, round_scale=True), "round_scale=True needs use_fp8"),
    "ue8m0_alone": (dict(use_ue8m0=True), "use_ue8m0=True needs round_scale"),
    "both_phases": (dict(async_finish=True, return_recv_hook=True), "not both"),
    "recv_stats": (
        dict(cumulative_local_expert_recv_stats=torch.zeros(3, dtype=torch.int32)),
        r"cumulative_local_expert_recv_stats must be \[2\], got \[3\]",
    ),
    "wait_stats": (
        dict(dispatch_wait_recv_cost_stats=torch.zeros(2)),
        "dispatch_wait_recv_cost_stats must be torch.int64, got torch.float32",
    ),
}
# The same for a combine of a dispatch with which weights travelled.
BAD_COMBINE: dict[str, tuple[dict[str, Any], str]] = {
    "x_shape": (dict(x=Y[:, :7].contiguous()), r"x must be \[2, 8, 512\], got \[2, 7, 512\]"),
    "x_dtype": (dict(x=Y.float()), "x must be torch.bfloat16"),
    "x_strides": (dict(x=Y.transpose(0, 1).contiguous().transpose(0, 1)), "x must be contiguous"),
    "topk_shape": (dict(topk_idx=TOPK[:3]), r"topk_idx must be that of the dispatch, \[4, 2\]"),
    "topk_values": (dict(topk_idx=TOPK.flip(0)), "other values than that of the dispatch"),
    "other_weights": (dict(topk_weights=WEIGHTS.clone()), "pass the same tensor, or None"),
    "handle_type": (dict(handle=3), "handle must be a LowLatencyHandle, got int"),
    "no_place": (dict(zero_copy=True), "get_next_low_latency_combine_buffer"),
    "both_phases": (dict(async_finish=True, return_recv_hook=True), "not both"),
    "out_shape": (dict(out=X[:3]), r"out must be \[4, 512\], got \[3, 512\]"),
    "out_dtype": (dict(out=X.float()), "out must be torch.bfloat16"),
    "grad": (dict(x=Y.clone().requires_grad_()), "x requires grad"),
    "wait_stats": (
        dict(combine_wait_recv_cost_stats=torch.zeros(3, dtype=torch.int64)),
        r"combine_wait_recv_cost_stats must be \[2\], got \[3\]",
    ),
}
