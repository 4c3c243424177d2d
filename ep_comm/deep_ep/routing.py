"""What DeepEP's callers are told of a routing, and what they tell."""

from __future__ import annotations

import torch
from torch import Tensor

from ep_comm.errors import EPArgumentError
from ep_comm.routing.layout import RoutingLayout, layout_of


def token_layout(
    topk_idx: Tensor, num_experts: int, num_ranks: int, ranks_per_node: int | None
) -> tuple[RoutingLayout, Tensor | None]:
    """Return who is sent what, and the tokens to each node, [nodes] int32, where there are several.

    On a GPU with the CUDA library the host does not wait.
    """
    if topk_idx.dim() != 2 or topk_idx.dtype not in (torch.int64, torch.int32):
        raise EPArgumentError(
            "topk_idx must be [num_tokens, num_topk] int64 or int32, got "
            f"{list(topk_idx.shape)} {topk_idx.dtype}"
        )
    if num_experts < 1 or num_experts % num_ranks:
        raise EPArgumentError(
            f"num_experts {num_experts} is not divisible by the group's {num_ranks} ranks"
        )
    source, num_topk = topk_idx.contiguous(), topk_idx.shape[1]
    layout = layout_of(source, num_topk, num_experts, num_ranks, wait=False)
    if ranks_per_node is None:
        return layout, None
    nodes = layout.is_token_in_rank.unflatten(1, (-1, ranks_per_node)).any(2)
    return layout, nodes.sum(0, dtype=torch.int32)


def map_of_ranks(is_token_in_rank: Tensor | None, num_tokens_per_expert: Tensor) -> Tensor:
    """Return a routing map [T, E] that sends these tokens to these ranks, with these counts.

    DeepEP dispatches without ``topk_idx`` too. Which of a rank's experts a token has is then
    nobody's to know, but how many tokens each has comes back. So experts take turns: each has as
    many as it needs of its rank's tokens, beginning behind those of the expert before, around and
    around. No expert has a token twice, and none is left out where the counts are those of a
    routing.

    Args:
        is_token_in_rank: [T, R] bool.
        num_tokens_per_expert: [E] int32.
    """
    if is_token_in_rank is None:
        raise EPArgumentError("pass topk_idx, or is_token_in_rank and num_tokens_per_expert")
    num_ranks = is_token_in_rank.shape[1]
    counts = num_tokens_per_expert.view(num_ranks, -1)
    first = counts.cumsum(1) - counts
    place = is_token_in_rank.cumsum(0) - 1
    in_all = is_token_in_rank.sum(0).clamp(min=1)
    turn = (place.unsqueeze(2) - first) % in_all.view(num_ranks, 1)
    return (is_token_in_rank.unsqueeze(2) & (turn < counts)).flatten(1)
