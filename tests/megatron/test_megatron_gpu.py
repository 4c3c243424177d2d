"""Megatron-Core with Transformer Engine's grouped experts on GPUs: our dispatcher and its switches.

All tests share two processes: importing Transformer Engine takes ten seconds in each.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from typing import Any

import numpy as np
import pytest
from megatron_gpu import (
    FP8_EXPERTS,
    FP8_LAYER,
    LAYER,
    MARKS,
    MODEL,
    NUM_RANKS,
    assert_close,
    differing,
    layer_step,
    with_options,
)
from megatron_model import train
from packaging.version import Version
from ranks import run_ranks

pytestmark = MARKS


def run(function: Any, *args: Any) -> list[dict]:
    return run_ranks(NUM_RANKS, function, *args, timeout_s=300, pool="megatron-gpu", backend="nccl")


def of_linear(result: dict, linear: str) -> set[str]:
    """Weights of all local experts in that linear layer."""
    names = {name for name in result["tensors"] if f"experts.{linear}.weight" in name}
    assert names
    return names


def test_layer_is_alltoalls():
    """A token's two outputs are added in another order and precision: BF16 keeps 8 bits, and the
    sums differ by one or two units in the last of them. What is behind them is off by as much."""
    ours = run(layer_step, LAYER, False)
    stock = run(layer_step, dataclasses.replace(LAYER, dispatcher="alltoall"), False)
    assert_close(ours, stock, tolerance=2**-6)


def test_fused_accumulation_changes_the_rounding_of_weight_gradients():
    """They are not rounded to BF16 on the way to the FP32 that they are added up in."""
    plain = run(layer_step, LAYER, False)
    fused = run(layer_step, dataclasses.replace(LAYER, fused=True), False)
    experts = of_linear(plain[0], "linear_fc1") | of_linear(plain[0], "linear_fc2")
    assert set() < differing(plain, fused) <= experts
    assert_close(fused, plain, tolerance=2**-8)


@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("experts", ["bf16", "fp8"])
def test_overlapped_weight_gradients_are_the_same_bits(experts, fused, skewed):
    setup = dataclasses.replace(LAYER if experts == "bf16" else FP8_LAYER, fused=fused)
    plain = run(layer_step, setup, skewed)
    overlapped = run(layer_step, with_options(setup, overlap_wgrad=True), skewed)
    assert plain[0]["stores"] == [] and overlapped[0]["stores"] == [0, 0]
    assert differing(plain, overlapped) == set()


@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
def test_fp8_wire_gives_fp8_experts_the_same_values(skewed):
    """The forward pass and all but one linear layer's weight gradients, whose GEMM reads columns:
    their blocks are quantised from what arrived, not from what was sent."""
    plain = run(layer_step, FP8_LAYER, skewed)
    in_fp8 = run(layer_step, with_options(FP8_LAYER, fp8_dispatch=True), skewed)
    assert (in_fp8[1]["num_rows"] == 0) == skewed
    assert "output" not in differing(plain, in_fp8)
    assert differing(plain, in_fp8) <= of_linear(plain[0], "linear_fc1")
    assert_close(plain, in_fp8, tolerance=0.05)

    grads_too = with_options(FP8_LAYER, fp8_dispatch=True, fp8_grad_dispatch=True)
    both = run(layer_step, grads_too, skewed)
    assert differing(in_fp8, both) <= of_linear(plain[0], "linear_fc2")
    assert_close(in_fp8, both, tolerance=0.05)
    if skewed:
        for linear in ("linear_fc1", "linear_fc2"):
            for name in of_linear(both[1], linear):
                assert not both[1]["tensors"][name].any(), f"{name} on the rank without tokens"


@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_copy_engines_move_the_same_bits(fp8, skewed):
    """Tokens are on their way before the router has run."""
    wire = dict(fp8_dispatch=fp8, fp8_grad_dispatch=fp8)
    setup = FP8_LAYER if fp8 else LAYER
    plain = run(layer_step, with_options(setup, **wire), skewed)
    copied = run(layer_step, with_options(setup, **wire, copy_engines=True), skewed)
    assert differing(plain, copied) == set()


@pytest.mark.parametrize("overlap_wgrad", [False, True], ids=["serial", "overlapped"])
def test_copy_engines_train_the_same_bits(overlap_wgrad):
    setup = dataclasses.replace(MODEL, microbatches=2, dist_opt=True, overlap_grad_reduce=True)
    plain = run(train, with_options(setup, overlap_wgrad=overlap_wgrad))
    copied = run(train, with_options(setup, overlap_wgrad=overlap_wgrad, copy_engines=True))
    for one, other in zip(plain, copied, strict=True):
        assert other["losses"] == one["losses"]
        for name, gradient in one["gradients"].items():
            assert np.array_equal(gradient, other["gradients"][name]), name


@pytest.mark.parametrize("overlap_wgrad", [False, True], ids=["serial", "overlapped"])
def test_fp8_on_both_legs_trains(overlap_wgrad):
    setup = dataclasses.replace(
        MODEL,
        dist_opt=True,
        overlap_grad_reduce=True,
        config=(*MODEL.config, *FP8_EXPERTS, ("fp8_param", True)),
    )
    in_fp8 = with_options(
        setup, fp8_dispatch=True, fp8_grad_dispatch=True, overlap_wgrad=overlap_wgrad
    )
    for result in run(train, in_fp8):
        losses = result["losses"]
        assert np.isfinite(losses).all() and losses[-1] < losses[0], losses


@pytest.mark.parametrize("overlap_grad_reduce", [False, True], ids=["reduce", "overlap-reduce"])
def test_megatrons_own_overlap_trains_the_same_bits(overlap_grad_reduce):
    """The baseline ``alltoall-overlap`` of ``bench train`` computes what alltoall does."""
    if Version(importlib.metadata.version("megatron-core")) < Version("0.18"):
        pytest.skip("this Megatron has no overlap of its own")
    setup = dataclasses.replace(
        MODEL,
        dispatcher="alltoall",
        microbatches=2,
        dist_opt=True,
        overlap_grad_reduce=overlap_grad_reduce,
    )
    switch = ("overlap_dispatch_backward_with_experts_wgrad", True)
    overlapped = dataclasses.replace(setup, config=(*setup.config, switch))
    for plain, theirs in zip(run(train, setup), run(train, overlapped), strict=True):
        assert theirs["losses"] == plain["losses"]
        for name, gradient in plain["gradients"].items():
            assert np.array_equal(gradient, theirs["gradients"][name]), name


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_overlap_trains_the_same_bits(fused):
    """Two layers, four steps. The same run twice is the control: what differs there is not ours."""
    setup = dataclasses.replace(MODEL, dist_opt=True, overlap_grad_reduce=True, fused=fused)
    first, second = run(train, setup), run(train, setup)
    overlapped = run(train, with_options(setup, overlap_wgrad=True))
    for rank, results in enumerate(zip(first, second, overlapped, strict=True)):
        print(f"rank {rank}: losses", *(result["losses"] for result in results), sep="\n  ")
    for control, plain, ours in zip(second, first, overlapped, strict=True):
        assert control["losses"] == plain["losses"], "the run itself does not repeat"
        assert ours["losses"] == plain["losses"]
        for name, gradient in plain["gradients"].items():
            assert np.array_equal(gradient, control["gradients"][name]), f"{name}: no repeat"
            assert np.array_equal(gradient, ours["gradients"][name]), name


@pytest.mark.parametrize(
    "frozen",
    [r"^(?!.*experts)", r"experts", r"linear_fc1"],
    ids=["all-but-experts", "experts", "first-linear-layers"],
)
def test_overlap_trains_the_same_bits_where_parts_are_frozen(frozen):
    setup = dataclasses.replace(
        MODEL, microbatches=2, dist_opt=True, overlap_grad_reduce=True, frozen=frozen
    )
    plain = run(train, setup)
    overlapped = run(train, with_options(setup, overlap_wgrad=True))
    for one, other in zip(plain, overlapped, strict=True):
        assert one["losses"] == other["losses"]
        for name, gradient in one["gradients"].items():
            assert np.array_equal(gradient, other["gradients"][name]), name
