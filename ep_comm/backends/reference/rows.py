"""Rows in plain torch: the order in which they stand, and the order in which they are added.

This is where the numerics of every backend are written down (docs/architecture.md, "Numerics").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from ep_comm import fp8
from ep_comm.backends.reference.routing import ReferenceRouting
from ep_comm.backends.requests import Received
from ep_comm.routing.types import RoutingSizes


def to_bytes(rows: Tensor) -> Tensor:
    """Return [T, H] rows as [T, bytes] uint8, sharing memory."""
    if not rows.numel():  # strides of an empty tensor may be anything, and then it has no view
        return rows.new_empty(len(rows), rows.shape[1] * rows.element_size(), dtype=torch.uint8)
    return rows.view(torch.uint8)


def tokens_to_ranks(is_token_in_rank: Tensor) -> tuple[Tensor, ...]:
    """Return for each rank r the tokens [n_r] int64 that go there, ascending, out of [T, R]."""
    return tuple(goes_T.nonzero(as_tuple=True)[0] for goes_T in is_token_in_rank.unbind(1))


def unpack(rows: Tensor, hidden: int, wire_dtype: torch.dtype, recv_dtype: torch.dtype) -> Received:
    """Turn bytes off the wire into rows of `recv_dtype`."""
    if wire_dtype != fp8.FP8_DTYPE:
        return Received(rows.view(wire_dtype), None, None)
    x = rows[:, :hidden].contiguous().view(fp8.FP8_DTYPE)
    scales = rows[:, hidden:].contiguous().view(torch.float32)
    if recv_dtype == fp8.FP8_DTYPE:
        return Received(x, scales, None)
    return Received(fp8.dequantize(x, scales, recv_dtype), None, None)


def expert_rows(
    recv_topk_idx: Tensor, num_local_experts: int, alignment: int, capacity: int | None
) -> tuple[tuple[int, ...], Tensor]:
    """Find the positions of received tokens in the expert-major output.

    Inside an expert's group tokens stand by source rank, then by token index, which is the order
    of received rows; groups stand in expert order, each padded to a multiple of `alignment` rows,
    or of `capacity` rows where that is not None.

    Returns:
        Tokens that came to each expert, and the rows [N, K] int64 of each received token, -1 where
        the expert is not local, or its group has no room for the token.
    """
    experts = torch.arange(num_local_experts, device=recv_topk_idx.device)
    hits_KNE = recv_topk_idx.t().unsqueeze(-1) == experts  # one [N, E_local] bool a top-k column
    hits_NE = hits_KNE.any(0)
    counts = hits_NE.sum(0)
    padded = (counts + alignment - 1) // alignment * alignment
    if capacity is not None:
        padded = torch.full_like(counts, capacity)
    first_row = padded.cumsum(0) - padded
    row_NE = first_row + hits_NE.cumsum(0) - 1
    row_NE = torch.where(row_NE < first_row + padded, row_NE, -1)
    local = recv_topk_idx >= 0
    expert_row_NK = torch.where(local, row_NE.gather(1, recv_topk_idx.clamp(min=0).long()), -1)
    return tuple(counts.tolist()), expert_row_NK


def count_drops(stats: Tensor, came: tuple[int, ...], sizes: RoutingSizes, capacity: int) -> None:
    """Count the tokens for which a dispatch of `capacity` rows has no room.

    Args:
        stats: int32 [2, E_local], see `ep_comm.Buffer.dispatch`.
        came: Tokens that came to each expert.
        sizes: Of the routing.
        capacity: Rows of the output.
    """
    if sizes.expert_capacity is not None:
        rooms = [sizes.expert_capacity] * len(came)
    else:
        first_rows = itertools.accumulate(sizes.padded_expert_rows, initial=0)
        rooms = [max(0, capacity - first) for first in first_rows]
    dropped = [max(0, tokens - room) for tokens, room in zip(came, rooms, strict=False)]
    stats[0] += stats.new_tensor(dropped)
    torch.maximum(stats[1], stats.new_tensor(came), out=stats[1])


def fit(rows: Tensor, num_rows: int, value: float = 0) -> Tensor:
    """Return the first `num_rows` rows, filled up with rows of `value`."""
    fitted = rows.new_full((num_rows, *rows.shape[1:]), value)
    fitted[: len(rows)] = rows[:num_rows]
    return fitted


def fit_received(received: Received, num_rows: int) -> Received:
    """Cut rank-major rows, or fill them up with padding."""
    like = received.x
    x = torch.zeros(num_rows, like.shape[1], dtype=like.dtype, device=like.device)
    to_bytes(x)[: len(received.x)] = to_bytes(received.x)[:num_rows]
    scales, weights = received.scales, received.topk_weights
    return Received(
        x,
        None if scales is None else fit(scales, num_rows, 1),
        None if weights is None else fit(weights, num_rows),
    )


def expand(received: Received, routing: ReferenceRouting) -> Received:
    """Turn rank-major rows into padded expert-major rows; padding is 0, with FP8 scale 1."""
    n, k = (routing.expert_row_NK >= 0).nonzero(as_tuple=True)
    row = routing.expert_row_NK[n, k]
    x = torch.zeros(
        routing.num_rows, received.x.shape[1], dtype=received.x.dtype, device=received.x.device
    )
    to_bytes(x)[row] = to_bytes(received.x)[n]
    scales = weights = None
    if received.scales is not None:
        scales = received.scales.new_ones(routing.num_rows, received.scales.shape[1])
        scales[row] = received.scales[n]
        scales = fp8.join_scales(scales, routing.device_expert_offsets.tolist())
    if received.topk_weights is not None:
        weights = received.topk_weights.new_zeros(routing.row_weights_shape)
        weights[row] = received.topk_weights[n, k]
    return Received(x, scales, weights)


def collapse_weights(weights_M: Tensor, expert_row_NK: Tensor) -> Tensor:
    """Undo `expand` for one number a row: [M] to [N, K], 0 where not local."""
    if not len(weights_M):
        return weights_M.new_zeros(expert_row_NK.shape)
    return torch.where(expert_row_NK >= 0, weights_M[expert_row_NK.clamp(min=0)], 0.0)


def sum_expert_rows(x_MH: Tensor, routing: ReferenceRouting) -> Tensor:
    """Add up level 1 of combine: a token's rows on this rank, ascending by expert, rounded once."""
    rows_NK = routing.expert_row_NK
    # Groups stand in expert order, so ascending rows are ascending experts.
    rows_NK = torch.where(rows_NK < 0, len(x_MH), rows_NK).sort(dim=1).values
    contributions = []
    for rows in rows_NK.unbind(1):
        tokens = (rows < len(x_MH)).nonzero(as_tuple=True)[0]
        contributions.append((tokens, x_MH[rows[tokens]]))
    return sum_in_order(routing.sizes.num_received, contributions)[0].to(x_MH.dtype)


def sum_in_order(
    num_rows: int, contributions: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Add up (row indices, rows) in FP32, strictly in the order given.

    A sum starts from its first contribution, not from zero, so that -0 survives. No index stands
    twice in one contribution, hence no order is left to chance.

    Returns:
        Sums [num_rows, H] FP32 (+0 where nothing came) and [num_rows] bool, whether any came.
    """
    contributions = list(contributions)
    hidden = contributions[0][1].shape[1]
    device = contributions[0][1].device
    total = torch.zeros(num_rows, hidden, dtype=torch.float32, device=device)
    present = torch.zeros(num_rows, dtype=torch.bool, device=device)
    for idx, rows in contributions:
        first = ~present[idx]
        total[idx[first]] = rows[first].float()
        total[idx[~first]] += rows[~first].float()
        present[idx] = True
    return total, present
