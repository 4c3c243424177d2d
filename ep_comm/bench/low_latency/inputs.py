"""Tokens, routings, and what the experts make of them.

All of it follows from a seed, so every rank knows what all others send, and what must come out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep_comm import fp8_low_latency
from ep_comm.bench.low_latency.settings import Point, Settings
from ep_comm.bench.ops.routing import NUM_SETS, routing_of
from ep_comm.fp8_low_latency import ScaleForm


@dataclass(frozen=True, kw_only=True)
class InputSet:
    """What the ranks send in one call, and what must come out.

    R ranks, T tokens of each, K experts of a token, E experts of a rank, M room.

    Attributes:
        x: [T, H] BF16 of this rank.
        topk_idx: [T, K] int64 of this rank.
        topk_weights: [T, K] FP32 of this rank.
        y: [E, R M, H] BF16, what this rank's experts make of the rows that it receives.
        experts: [N] int64, local expert of each row that this rank receives.
        places: [N] int64, where it stands among the expert's.
        src_info: [N] int32, source rank x M + token of it.
        rows: [N, bytes] uint8, the rows.
        scales: [N, H / 128] FP32, where rows are FP8.
        counts: [E] int32, rows of each expert.
        combined: [T, H] BF16, what combine gives this rank.
        copies_to_rank: [R, R] rows that each rank sends to each, 0 to itself.
    """

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    y: Tensor
    experts: Tensor
    places: Tensor
    src_info: Tensor
    rows: Tensor
    scales: Tensor | None
    counts: Tensor
    combined: Tensor
    copies_to_rank: Tensor


def make_inputs(
    settings: Settings, point: Point, rank: int, num_ranks: int, device: torch.device
) -> list[InputSet]:
    """Draw `NUM_SETS` sets, each with rows and routing of its own.

    They are rotated. Memory of operations is used in turns of two: with three sets, what stands
    there from before is always another set's, and a result made of it is wrong.

    Args:
        settings: Of the run.
        point: The size.
        rank: This rank.
        num_ranks: R.
        device: Where the tensors are.
    """
    sets = []
    tokens, room, hidden = point.tokens, point.room, point.hidden
    num_experts = settings.num_experts(num_ranks)
    per_rank = num_experts // num_ranks
    for i in range(NUM_SETS):
        drawn = [_draw(settings, point, r, num_ranks, i) for r in range(num_ranks)]
        topk_idx_RTK, weights_RTK, x_RTH = (
            torch.stack(parts).to(device) for parts in zip(*drawn, strict=True)
        )
        owner_RTK = topk_idx_RTK // per_rank
        goes_RTR = torch.zeros(num_ranks, tokens, num_ranks, dtype=torch.int64, device=device)
        goes_RTR.scatter_(2, owner_RTK, 1)
        copies_RR = goes_RTR.sum(dim=1)
        copies_RR.fill_diagonal_(0)

        # Rows that come: by local expert, then by source and token.
        flat_idx = topk_idx_RTK.flatten(0, 1)
        comes_NE = torch.zeros(len(flat_idx), num_experts, dtype=torch.bool, device=device)
        comes_NE.scatter_(1, flat_idx, True)
        comes_EN = comes_NE[:, rank * per_rank : (rank + 1) * per_rank].T
        experts, tokens_N = comes_EN.nonzero(as_tuple=True)
        places = (comes_EN.cumsum(dim=1) - 1)[experts, tokens_N]
        sources, tokens_of_source = tokens_N // tokens, tokens_N % tokens

        rows = x_RTH.flatten(0, 1)
        sent, scales = rows, None
        if settings.fp8:
            sent, scales_of_rows = fp8_low_latency.quantize(rows, ScaleForm.FP32)
            scales = scales_of_rows[tokens_N]
        y = torch.empty(per_rank, num_ranks * room, hidden, dtype=torch.bfloat16, device=device)
        y[experts, places] = expert_output(rows[tokens_N], rank * per_rank + experts)
        sets.append(
            InputSet(
                x=x_RTH[rank].contiguous(),
                topk_idx=topk_idx_RTK[rank].contiguous(),
                topk_weights=weights_RTK[rank].contiguous(),
                y=y,
                experts=experts,
                places=places,
                src_info=(sources * room + tokens_of_source).int(),
                rows=sent.contiguous().view(torch.uint8)[tokens_N],
                scales=scales,
                counts=comes_EN.sum(dim=1).int(),
                combined=combined(
                    x_RTH[rank], topk_idx_RTK[rank], weights_RTK[rank], num_ranks, per_rank
                ),
                copies_to_rank=copies_RR,
            )
        )
    return sets


def _draw(
    settings: Settings, point: Point, rank: int, num_ranks: int, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a rank's experts [T, K], their weights [T, K] and its rows [T, H], of one set."""
    seed = number * num_ranks + rank
    topk_idx, weights = routing_of(
        settings.routing,
        point.tokens,
        settings.num_experts(num_ranks),
        settings.topk,
        rank=rank,
        number=number,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(point.tokens, point.hidden, generator=generator).bfloat16()
    return topk_idx, weights, x


def expert_output(rows: Tensor, experts: Tensor) -> Tensor:
    """Return what experts make of rows: BF16, and no two experts the same.

    Args:
        rows: [N, H] BF16.
        experts: [N] of all ranks' numbers.
    """
    return (rows.float() * (1 + experts % 7).unsqueeze(1) / 4).bfloat16()


def combined(
    x_TH: Tensor, topk_idx_TK: Tensor, weights_TK: Tensor, num_ranks: int, per_rank: int
) -> Tensor:
    """Return what combine must give for these tokens, as `ep_comm.low_latency` says: BF16 [T, H].

    A token's experts are distinct, and none is dropped.
    """
    ascending_TK, order_TK = topk_idx_TK.sort(dim=1)
    weights_TK = weights_TK.gather(1, order_TK)
    total, has_total = x_TH.new_zeros(x_TH.shape, dtype=torch.float32), None
    for rank in range(num_ranks):
        partial, has_partial = torch.zeros_like(total), None
        for k in range(topk_idx_TK.shape[1]):
            expert_T = ascending_TK[:, k]
            is_here = (expert_T // per_rank == rank).unsqueeze(1)
            term = weights_TK[:, k, None] * expert_output(x_TH, expert_T).float()
            partial, has_partial = _add_where(is_here, partial, has_partial, term)
        assert has_partial is not None
        total, has_total = _add_where(has_partial, total, has_total, partial.bfloat16().float())
    return total.bfloat16()


def _add_where(
    where: Tensor, total: Tensor, has_total: Tensor | None, term: Tensor
) -> tuple[Tensor, Tensor]:
    """Add a term to some sums; a sum begins with its first term."""
    if has_total is None:
        return torch.where(where, term, total), where
    grown = torch.where(has_total, total + term, term)
    return torch.where(where, grown, total), has_total | where
