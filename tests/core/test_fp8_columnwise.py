"""Column-wise copies of FP8 rows, for weight gradients, against Transformer Engine's bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from test_fp8 import GOLDEN, assert_same_bits, golden_input

from ep_comm import fp8
from ep_comm.errors import EPArgumentError

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


def test_columns_have_transformer_engines_bits():
    """240 rows: a block of 128, and one of 112."""
    data = torch.empty(HIDDEN, 240, dtype=fp8.FP8_DTYPE)
    scales = torch.empty(2, HIDDEN)
    fp8._quantize_columns(golden_input(), data, scales)
    assert_same_bits(data, GOLDEN["bf16_columnwise_data"])
    assert_same_bits(scales, GOLDEN["bf16_columnwise_scale_inv"])


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_of_all_experts(groups, device):
    rows, scales, ends = received(groups, spare=32)
    got = fp8.columnwise(rows.to(device), scales.to(device), groups, ends.to(device))
    check_same(got, by_hand(rows, scales, ends.tolist()))


@pytest.mark.parametrize("groups", [(16, 24), (160,)])
def test_groups_that_do_not_fit_are_refused(groups):
    rows, scales, ends = received((48,))
    with pytest.raises(EPArgumentError, match="column-wise copies need groups of a multiple of 16"):
        fp8.columnwise(rows, scales, groups, ends)


@pytest.mark.gpu
def test_copies_are_transformer_engines():
    """Its quantiser's, of the rows' BF16 values."""
    pytest.importorskip("transformer_engine")
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex

    groups = (0, 48, 144, 0, 400, 16)
    rows, scales, ends = (each.cuda() for each in received(groups, hidden=1024))
    per_row = torch.cat(
        [each.t() for each in fp8.split_scales(scales, ends.tolist(), rows.shape[1])]
    )
    values = fp8.dequantize(rows, per_row.contiguous(), torch.bfloat16)
    quantizers = [
        te.Float8BlockQuantizer(
            tex.DType.kFloat8E4M3, rowwise=False, columnwise=True, block_scaling_dim=1
        )
        for _ in groups
    ]
    theirs = tex.split_quantize(values, list(groups), quantizers)
    want = [
        (each._columnwise_data.view(fp8.FP8_DTYPE), each._columnwise_scale_inv) for each in theirs
    ]
    check_same(fp8.columnwise(rows, scales, groups, ends), want)
