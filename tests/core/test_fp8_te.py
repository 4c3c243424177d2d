"""FP8 dispatch against Transformer Engine itself, where there is a GPU and Transformer Engine."""

from __future__ import annotations

import pytest
import torch
from cases import assert_same, to_numpy
from fp8_golden import golden_input
from ranks import run_ranks

from ep_comm import Buffer, EPConfig, fp8

pytestmark = pytest.mark.gpu


def transformer_engine():
    pytest.importorskip("transformer_engine")
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex

    return te, tex


def quantizer(block_dim: int, columnwise: bool = False):
    te, tex = transformer_engine()
    return te.Float8BlockQuantizer(
        tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=columnwise,
        force_pow_2_scales=True,
        block_scaling_dim=block_dim,
    )


def test_quantise_gives_the_same_bits():
    generator = torch.Generator("cuda").manual_seed(0)
    spread = torch.randint(-30, 30, (999, 1024), generator=generator, device="cuda")
    values = torch.randn(999, 1024, generator=generator, device="cuda") * 2.0**spread
    for x in (values.bfloat16(), golden_input().cuda()):
        data, scales = fp8.quantize(x)
        theirs = quantizer(1)(x)
        assert_same(to_numpy(data.view(torch.uint8)), to_numpy(theirs._rowwise_data), "bytes")
        assert_same(
            to_numpy(scales.t().contiguous()),
            to_numpy(theirs._rowwise_scale_inv[:, : len(x)].contiguous()),
            "scales",
        )


def received_rows_go_into_a_grouped_gemm(rank: int) -> None:
    te, tex = transformer_engine()
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    num_experts, hidden, width = 4, 1024, 512
    config = EPConfig(num_experts=num_experts, hidden=hidden, max_tokens_per_rank=200, num_topk=2)
    buffer = Buffer(None, config)
    topk = torch.stack([torch.randperm(num_experts)[:2] for _ in range(200)]).cuda()
    topk[topk == 3] = -1  # an expert without tokens
    x = torch.randn(200, hidden, device="cuda").bfloat16()
    out = buffer.dispatch(x, topk, wire_dtype=fp8.FP8_DTYPE, recv_dtype=fp8.FP8_DTYPE)
    as_bf16 = buffer.dispatch(x, handle=out.handle).recv_x
    data, scales = out.recv_x
    splits = out.num_recv_tokens_per_expert_list
    assert splits[3] == 0 and any(
        rows > tokens for rows, tokens in zip(splits, out.handle.tokens_per_expert, strict=True)
    )
    blocks = fp8.split_scales(scales, out.handle.device_expert_offsets.tolist(), hidden)
    rowwise = quantizer(1)
    ours = [
        te.Float8BlockwiseQTensorStorage(
            rowwise_data=rows.view(torch.uint8),
            rowwise_scale_inv=block,
            columnwise_data=None,
            columnwise_scale_inv=None,
            fp8_dtype=tex.DType.kFloat8E4M3,
            quantizer=rowwise,
            is_2D_scaled=False,
            fake_dtype=torch.bfloat16,
        )
        for rows, block in zip(data.split(splits), blocks, strict=True)
    ]
    weights = [
        quantizer(2, columnwise=True)(torch.randn(width, hidden, device="cuda").bfloat16())
        for _ in range(num_experts)
    ]

    def gemm(rows: list) -> torch.Tensor:
        y = torch.empty(sum(splits), width, device="cuda", dtype=torch.bfloat16)
        general_grouped_gemm(
            weights, rows, [y], [None] * num_experts, torch.bfloat16,
            single_output=True, m_splits=splits, use_split_accumulator=True,
        )  # fmt: skip
        return y

    theirs = [
        rowwise(rows.contiguous()) if len(rows) else ours[3] for rows in as_bf16.split(splits)
    ]
    y = gemm(ours)
    assert y.float().abs().sum() > 0
    assert torch.equal(y, gemm(theirs))


def test_received_rows_go_into_a_grouped_gemm():
    transformer_engine()
    run_ranks(1, received_rows_go_into_a_grouped_gemm, backend="nccl")
