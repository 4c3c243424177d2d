"""Low-latency calls of small sizes that are right, to be made wrong."""

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
