"""A Megatron layer with Transformer Engine's grouped experts on GPUs, and a step of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from megatron_model import BATCH, Setup, make_config, make_model, parallel_state

MARKS = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None
        or importlib.util.find_spec("megatron.core") is None,
        reason="needs Transformer Engine and megatron-core",
    ),
]
NUM_RANKS = 2
HIDDEN = 1024
MODEL = Setup(
    te=True,
    bf16=True,
    seq=256,
    lr=3e-4,
    config=(
        ("hidden_size", HIDDEN),
        ("num_attention_heads", 16),
        ("ffn_hidden_size", 512),
        ("moe_ffn_hidden_size", 512),
        ("num_moe_experts", 8),
        ("moe_router_topk", 2),
        ("moe_router_load_balancing_type", "none"),
        ("moe_aux_loss_coeff", 0.0),
    ),
)
FP8_EXPERTS = (
    ("fp8", "e4m3"),
    ("fp8_recipe", "blockwise"),
    ("moe_router_padding_for_quantization", True),
)
LAYER = dataclasses.replace(MODEL, config=(*MODEL.config, ("num_layers", 1)))
FP8_LAYER = dataclasses.replace(LAYER, config=(*LAYER.config, *FP8_EXPERTS))


def layer_step(rank: int, setup: Setup, skewed: bool) -> dict[str, Any]:
    """One MoE layer forward and backward, as FP32: what comes out, and every gradient.

    `skewed`: all tokens go to rank 0, whatever their router says.
    """
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from megatron.core.fp8_utils import get_fp8_context

    from ep_comm.megatron import EPOptions, check_weight_gradients
    from ep_comm.megatron.layer import moe_layers

    parallel_state(setup)
    config = make_config(setup, None)
    model = make_model(setup, config, EPOptions(**dict(setup.options)))
    _, layer = next(iter(moe_layers(model)))
    generator = torch.Generator().manual_seed(100 + rank)
    hidden = torch.randn(setup.seq, BATCH, HIDDEN, generator=generator)
    grad = torch.randn(setup.seq, BATCH, HIDDEN, generator=generator).bfloat16().cuda()
    if skewed:
        hidden[..., 0] = 8.0
        with torch.no_grad():
            half = config.num_moe_experts // NUM_RANKS
            layer.router.weight[:half, 0], layer.router.weight[half:, 0] = 4.0, -4.0
    hidden = hidden.bfloat16().cuda().requires_grad_()
    with get_fp8_context(config):
        output, _ = layer(hidden)
    output.backward(grad)
    check_weight_gradients(model)
    rows = getattr(layer.token_dispatcher, "handle", None)
    return dict(
        tensors={
            "output": to_fp32(output),
            "hidden": to_fp32(hidden.grad),
            **{name: to_fp32(p.main_grad) for name, p in layer.named_parameters()},
        },
        num_rows=None if rows is None else rows.num_rows,
        stores=[
            module.wgrad_store.context.qsize()
            for module in layer.experts.modules()
            if getattr(module, "wgrad_store", None) is not None and module.wgrad_store.context
        ],
    )


def to_fp32(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.detach().float().cpu().numpy()
    assert np.isfinite(array).all()
    return array


def assert_close(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    """Each tensor, relative to its largest element."""
    for mine, other in zip(ours, theirs, strict=True):
        for name, tensor in mine["tensors"].items():
            error = np.abs(tensor - other["tensors"][name]).max()
            largest = np.abs(other["tensors"][name]).max()
            assert error <= tolerance * largest, f"{name}: {error} of {largest}"


def with_options(setup: Setup, **options: Any) -> Setup:
    return dataclasses.replace(setup, options=tuple(options.items()))


def differing(ours: list[dict], theirs: list[dict]) -> set[str]:
    """Names of the tensors that are not bitwise the same on every rank."""
    return {
        name
        for mine, other in zip(ours, theirs, strict=True)
        for name in mine["tensors"]
        if not np.array_equal(mine["tensors"][name], other["tensors"][name])
    }
