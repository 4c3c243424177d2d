"""Column-wise copies of FP8 rows, for weight gradients, against Transformer Engine's bits."""

from __future__ import annotations

import pytest
import torch
from fp8_columnwise_cases import GROUPS, HIDDEN, by_hand, check_same, received
from fp8_golden import GOLDEN, assert_same_bits, golden_input

from ep_comm import fp8
from ep_comm.errors import EPArgumentError


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
