"""Whether results of the measured calls are right, bit for bit, by plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import CombineOutput, DispatchOutput, fp8
from ep_comm.bench.ops.cases import InputSet
from ep_comm.handle import RowLayout


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What one set of inputs must give on this rank.

    Attributes:
        tokens: [N] token of each received row, counted over all ranks; -1 is padding.
        expert_rows: Rows of each local expert's group; None in the rank layout.
        combined: [T, H] BF16, the sum of each token's rows as they were received.
    """

    tokens: Tensor
    expert_rows: tuple[int, ...] | None
    combined: Tensor


def expected(given: InputSet, layout: RowLayout, alignment: int, num_experts: int) -> Expected:
    """Return what a set must give. Collective over the default group.

    Args:
        given: This rank's inputs.
        layout: Order of the received rows.
        alignment: Of an expert's group.
        num_experts: Over all ranks.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    per_rank = num_experts // num_ranks
    topk_idx_NK = all_rows(given.topk_idx)
    comes_NE = topk_idx_NK.new_zeros(len(topk_idx_NK), num_experts, dtype=torch.bool)
    comes_NE.scatter_(1, topk_idx_NK, True)
    comes_Ne = comes_NE[:, rank * per_rank : (rank + 1) * per_rank]
    copies_TR = torch.zeros(
        len(given.x), num_ranks, dtype=torch.float32, device=given.x.device
    ).scatter_add_(1, given.topk_idx // per_rank, torch.ones_like(given.topk_weights))
    if layout == "rank":
        tokens, expert_rows = comes_Ne.any(dim=1).nonzero().flatten(), None
        copies_TR = copies_TR.clamp(max=1)
    else:
        groups = [_padded(column.nonzero().flatten(), alignment) for column in comes_Ne.T]
        tokens, expert_rows = torch.cat(groups), tuple(map(len, groups))
    return Expected(
        tokens=tokens, expert_rows=expert_rows, combined=_sum_of_copies(given.x, copies_TR)
    )


def wrong_dispatched(out: DispatchOutput, given: InputSet, expected: Expected) -> Tensor:
    """Return how many received rows of this rank are wrong. Collective."""
    if not isinstance(out.recv_x, tuple):
        return _wrong_rows(out.recv_x, all_rows(given.x), expected.tokens)
    assert given.x_fp8 is not None
    rows, scales = out.recv_x
    sent_rows, sent_scales = (all_rows(part.view(torch.uint8)) for part in given.x_fp8)
    blocks = rows.shape[1] // fp8.BLOCK
    ones = torch.ones(1, blocks, device=scales.device).view(torch.uint8)
    wrong = _wrong_rows(rows, sent_rows, expected.tokens)
    return wrong + _wrong_rows(
        _row_by_row(scales, blocks, expected.expert_rows), sent_scales, expected.tokens, ones
    )


def wrong_combined(out: CombineOutput, expected: Expected) -> Tensor:
    """Return how many sums of this rank are wrong."""
    return _differing(out.combined_x, expected.combined)


def check(out: object, given: InputSet, expected: Expected) -> int:
    """Return how many rows of a result are wrong on all ranks. Collective.

    What is no result of a buffer counts as right: NCCL's alltoall adds up in no fixed order.
    """
    wrong = torch.zeros((), dtype=torch.int64, device=given.x.device)
    if isinstance(out, DispatchOutput):
        wrong = wrong_dispatched(out, given, expected)
    elif isinstance(out, CombineOutput):
        wrong = wrong_combined(out, expected)
    dist.all_reduce(wrong)
    return int(wrong)


def all_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, as many from each, in order of ranks. Collective."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _padded(tokens: Tensor, alignment: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, -len(tokens) % alignment), value=-1)


def _sum_of_copies(x_TH: Tensor, copies_TR: Tensor) -> Tensor:
    """Return the sum of each token's rows: over those on a rank, then over ranks.

    A small multiple of a BF16 number is exact in FP32, so the order on a rank makes no difference.
    """
    total, has_any = torch.zeros_like(x_TH, dtype=torch.float32), None
    for copies_T in copies_TR.T:
        partial = (x_TH.float() * copies_T[:, None]).to(x_TH.dtype).float()
        has = (copies_T > 0)[:, None]
        first = has if has_any is None else has & ~has_any
        grown = total if has_any is None else torch.where(has, total + partial, total)
        total = torch.where(first, partial, grown)
        has_any = has if has_any is None else has | has_any
    return total.to(x_TH.dtype)


def _row_by_row(scales: Tensor, blocks: int, expert_rows: tuple[int, ...] | None) -> Tensor:
    """Return scales [N, blocks] as bytes; an expert's group has them block by block."""
    if expert_rows is None:
        return scales.view(torch.uint8)
    groups = scales.split([count * blocks for count in expert_rows])
    rows = [group.view(blocks, -1).T for group in groups]
    return torch.cat(rows).contiguous().view(torch.uint8)


def _wrong_rows(got: Tensor, sent: Tensor, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
    """Return how many rows are not what their token sent, or padding: zeros where it is None."""
    if len(got) != len(tokens):
        return torch.tensor(max(len(got), len(tokens)), device=got.device)
    want = sent[tokens.clamp(min=0)]
    is_padding = (tokens < 0)[:, None]
    want = want.masked_fill(is_padding, 0) if padding is None else want.where(~is_padding, padding)
    return _differing(got, want)


def _differing(got: Tensor, want: Tensor) -> Tensor:
    return (got.view(torch.uint8) != want.view(torch.uint8)).any(dim=1).sum()
