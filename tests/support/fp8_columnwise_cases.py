"""Rows of experts for column-wise copies in FP8, and the copies made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ep_comm import fp8

HIDDEN = 512
# Whole tiles, parts of one, several of them, none at all, at either end and between.
GROUPS = [(16,), (128, 0, 256), (0, 48, 144, 0, 0, 400, 16, 0), (0, 0), (16,) * 33]


def received(groups: Sequence[int], hidden: int = HIDDEN, spare: int = 0) -> tuple:
    """Rows and scales as dispatch gives them to experts, and where these begin: all magnitudes."""
    generator = torch.Generator().manual_seed(sum(groups))
    num_rows = sum(groups) + spare
    data = torch.randint(0, 256, (num_rows, hidden), generator=generator, dtype=torch.uint8)
    data = torch.where(data & 0x7F == 0x7F, 0x55, data)  # no NaN
    data[torch.rand(num_rows, hidden, generator=generator) < 0.2] = 0
    exponents = torch.randint(-20, 20, (num_rows, hidden // fp8.BLOCK), generator=generator)
    exponents[:, 0] = -127  # BF16 has to round these
    exponents[3::16, 1:] = torch.randint(-127, 110, exponents[3::16, 1:].shape, generator=generator)
    scales = torch.ldexp(torch.ones(exponents.shape), exponents)
    data[5::16], scales[5::16] = 0, 1.0
    ends = torch.tensor([0, *itertools.accumulate(groups)], dtype=torch.int32)
    return data.view(fp8.FP8_DTYPE), fp8.join_scales(scales, ends.tolist()), ends


def by_hand(rows: torch.Tensor, scales: torch.Tensor, ends: list[int]) -> list[tuple]:
    """The same by what a block is: 128 rows of one column, of one expert."""
    copies = []
    blocks = fp8.split_scales(scales, ends, rows.shape[1])
    for (first, end), of_expert in zip(itertools.pairwise(ends), blocks, strict=True):
        values = fp8.dequantize(rows[first:end], of_expert.t(), torch.bfloat16)
        data = torch.empty(rows.shape[1], end - first, dtype=fp8.FP8_DTYPE)
        columns = torch.empty(-(-(end - first) // fp8.BLOCK), rows.shape[1])
        for tile in range(len(columns)):
            span = slice(tile * fp8.BLOCK, min((tile + 1) * fp8.BLOCK, end - first))
            block = values[span].float()
            scale = fp8._power_of_two_scale(block.abs().amax(0))
            data[:, span] = (block * scale).clamp(-448, 448).to(fp8.FP8_DTYPE).t()
            columns[tile] = 1 / scale
        copies.append((data, columns))
    return copies


def check_same(got: list[tuple], want: list[tuple]) -> None:
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        for each, other in zip(mine, theirs, strict=True):
            assert each.shape == other.shape and each.is_contiguous()
            assert torch.equal(each.cpu().view(torch.uint8), other.cpu().view(torch.uint8))
