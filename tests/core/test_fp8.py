"""FP8 wire format against Transformer Engine's bits."""

import math

import pytest
import torch
from fp8_golden import GOLDEN, assert_same_bits, golden_input

from ep_comm import fp8
from ep_comm.errors import EPArgumentError, EPUnsupportedError


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_quantize_gives_transformer_engines_bits(dtype, device):
    x = golden_input() if dtype == "bf16" else golden_input().float()
    data, scale = fp8.quantize(x.to(device))
    data, scale = data.cpu(), scale.cpu()
    assert_same_bits(data, GOLDEN[f"{dtype}_rowwise_data"])
    assert_same_bits(scale.t(), GOLDEN[f"{dtype}_rowwise_scale_inv"])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 4096])
def test_kernel_gives_the_reference_bits(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 1536, generator=generator).bfloat16()
    for want, got in zip(fp8.quantize(x), fp8.quantize(x.cuda()), strict=True):
        assert torch.equal(want.view(torch.uint8), got.cpu().view(torch.uint8))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dequantize_gives_transformer_engines_bits(dtype):
    data = torch.from_numpy(GOLDEN[f"{dtype}_rowwise_data"].copy()).view(fp8.FP8_DTYPE)
    scale = torch.from_numpy(GOLDEN[f"{dtype}_rowwise_scale_inv"].copy()).t().contiguous()
    assert_same_bits(
        fp8.dequantize(data, scale, torch.bfloat16), GOLDEN[f"{dtype}_dequantized_bf16_bits"]
    )


def test_scales_at_the_edge_of_a_power_of_two():
    """448 / amax is a power of two there, and what rounds a hair below it has half the scale."""
    exponents = range(-118, 128)
    x = torch.tensor([[math.ldexp(1.75, e)] for e in exponents]).repeat(1, fp8.BLOCK)
    data, scales = fp8.quantize(x)
    assert scales.flatten().tolist() == [math.ldexp(1.0, e - 8) for e in exponents]
    assert torch.equal(fp8.dequantize(data, scales, torch.float32), x)


def test_requantised_values_are_the_same_values():
    """What Transformer Engine relies on: FP8 experts see the same values after FP8 dispatch."""
    data, scale = fp8.quantize(golden_input())
    once = fp8.dequantize(data, scale, torch.bfloat16)
    data_again, scale_again = fp8.quantize(once)
    assert_same_bits(data_again, GOLDEN["requantized_rowwise_data"])
    assert_same_bits(scale_again.t(), GOLDEN["requantized_rowwise_scale_inv"])
    twice = fp8.dequantize(data_again, scale_again, torch.bfloat16)
    finite = once.isfinite()
    assert torch.equal(once[finite], twice[finite])
    assert (data.view(torch.uint8) != data_again.view(torch.uint8)).any(), "vectors lost their bite"


def test_hidden_must_be_whole_blocks():
    with pytest.raises(EPArgumentError, match="hidden 200"):
        fp8.quantize(torch.zeros(4, 200))


def test_fp32_scales_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    with pytest.raises(EPUnsupportedError, match="NVTE_FP8_BLOCK_SCALING_FP32_SCALES"):
        fp8.quantize(torch.zeros(4, 128))
