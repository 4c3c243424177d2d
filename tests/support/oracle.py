"""What dispatch and combine must give, written as plainly as possible: loops over tokens.

Shares no code with the package, not even the rounding. Rows are numpy: FP32 or FP16
arrays, or BF16 as uint16 bit patterns. All functions see all ranks at once; `x[r]` and
`topk_idx[r]` belong to rank r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def widen(row: np.ndarray) -> np.ndarray:
    return bf16_to_fp32(row) if row.dtype == np.uint16 else row.astype(np.float32)


def narrow(row: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return fp32_to_bf16(row) if dtype == np.uint16 else row.astype(dtype)


@dataclass
class Row:
    """One received row: token `token` of rank `source`; `expert` is local, None if rank-major."""

    source: int
    token: int
    expert: int | None = None


def local_experts(topk: np.ndarray, rank: int, per_rank: int) -> list[int]:
    """Local experts of `rank` that one token selected, ascending."""
    return sorted(int(e) - rank * per_rank for e in topk if e >= 0 and e // per_rank == rank)


def rank_rows(topk_idx: list[np.ndarray], rank: int, per_rank: int) -> list[Row]:
    """Rows that `rank` receives in the rank layout."""
    return [
        Row(source, token)
        for source, topk in enumerate(topk_idx)
        for token in range(len(topk))
        if local_experts(topk[token], rank, per_rank)
    ]


def expert_rows(
    topk_idx: list[np.ndarray], rank: int, per_rank: int, alignment: int
) -> tuple[list[Row | None], list[int]]:
    """Rows of `rank` in the expert layout (None is padding), and the tokens of each expert."""
    rows: list[Row | None] = []
    counts = []
    for expert in range(per_rank):
        group = [
            Row(source, token, expert)
            for source, topk in enumerate(topk_idx)
            for token in range(len(topk))
            if expert in local_experts(topk[token], rank, per_rank)
        ]
        counts.append(len(group))
        rows += group + [None] * (-len(group) % alignment)
    return rows, counts


def sum_rows(rows: list[np.ndarray]) -> np.ndarray:
    """One level of combine: FP32 in the given order, from the first row, rounded once."""
    total = widen(rows[0]).copy()
    for row in rows[1:]:
        with np.errstate(all="ignore"):
            total = (total + widen(row)).astype(np.float32)
    return narrow(total, rows[0].dtype)


def combine(
    topk: np.ndarray,
    rank_outputs: dict[int, dict[int, np.ndarray]],
    ranks_per_node: int,
    num_ranks: int,
    hidden: int,
    dtype: np.dtype,
) -> np.ndarray:
    """One token's combined row.

    ``rank_outputs[rank]`` holds the token's rows there by local expert; in the rank layout there
    is a single entry.
    """
    node_sums = []
    for first in range(0, num_ranks, ranks_per_node):
        partials = []
        for rank in range(first, first + ranks_per_node):
            outputs = rank_outputs.get(rank, {})
            if outputs:
                partials.append(sum_rows([outputs[e] for e in sorted(outputs)]))
        if partials:
            node_sums.append(sum_rows(partials))
    return sum_rows(node_sums) if node_sums else np.zeros(hidden, dtype)
