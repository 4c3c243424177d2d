"""--ep-fp8-direct with Transformer Engine itself, on GPUs: every bit as without it.

All tests share two processes, as those of test_megatron_gpu.py.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from typing import Any

import numpy as np
import pytest
from megatron_gpu import FP8_EXPERTS, FP8_LAYER, MODEL, differing, layer_step, with_options
from megatron_model import Setup, train
from packaging.version import Version
from ranks import run_ranks, stop_pool

from ep_comm.megatron.support import _MIN_TE_DIRECT


def _te_is_new_enough() -> bool:
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    version = Version(importlib.metadata.version("transformer-engine"))
    return version >= Version(_MIN_TE_DIRECT)


pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(
        not _te_is_new_enough() or importlib.util.find_spec("megatron.core") is None,
        reason=f"needs Transformer Engine {_MIN_TE_DIRECT} and megatron-core",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def processes():
    yield
    stop_pool("megatron-gpu-direct")


def run(function: Any, *args: Any) -> list[dict]:
    return run_ranks(2, function, *args, timeout_s=300, pool="megatron-gpu-direct", backend="nccl")


def both_ways(setup: Setup, **options: Any) -> tuple[Setup, Setup]:
    """With rows that are dequantised, and with rows as they came."""
    plain = with_options(setup, fp8_dispatch=True, **options)
    return plain, with_options(setup, fp8_dispatch=True, fp8_direct=True, **options)


@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("overlap_wgrad", [False, True], ids=["serial", "overlapped"])
def test_a_layer_has_the_same_bits(overlap_wgrad, fused, skewed):
    """Output, gradient of the input, and every weight's; skewed: a rank without rows."""
    setups = both_ways(
        dataclasses.replace(FP8_LAYER, fused=fused),
        overlap_wgrad=overlap_wgrad,
        fp8_grad_dispatch=True,
    )
    plain, direct = (run(layer_step, setup, skewed) for setup in setups)
    assert (direct[1]["num_rows"] == 0) == skewed
    assert differing(plain, direct) == set()
    assert direct[0]["stores"] == ([0, 0] if overlap_wgrad else [])
    assert plain[0]["tensors"]["output"].any() and len(plain[0]["tensors"]) > 10


def test_quantised_parameters_and_padded_routing():
    """As Megatron recommends it: --fp8-param-gather --moe-router-padding-for-fp8."""
    setup = dataclasses.replace(
        FP8_LAYER, dist_opt=True, config=(*FP8_LAYER.config, ("fp8_param", True))
    )
    plain, direct = (run(layer_step, each, False) for each in both_ways(setup))
    assert differing(plain, direct) == set()


def test_groups_of_one_size():
    plain, direct = (
        run(layer_step, each, False) for each in both_ways(FP8_LAYER, capacity_factor=2.0)
    )
    assert differing(plain, direct) == set()


@pytest.mark.parametrize(
    "overlap",
    ["none", "wgrad", "1f1b", "recompute"],
)
def test_training_has_the_same_bits(overlap):
    """Two layers, four steps of two micro-batches: cached weights, gradients that add up."""
    more: dict[str, tuple] = {
        "1f1b": (("overlap_moe_expert_parallel_comm", True), ("delay_wgrad_compute", True)),
        "recompute": (("recompute_granularity", "selective"), ("recompute_modules", ["moe"])),
    }
    setup = dataclasses.replace(
        MODEL,
        microbatches=2,
        dist_opt=True,
        overlap_grad_reduce=True,
        config=(*MODEL.config, *FP8_EXPERTS, ("fp8_param", True), *more.get(overlap, ())),
    )
    setups = both_ways(setup, fp8_grad_dispatch=True, overlap_wgrad=overlap == "wgrad")
    for plain, direct in zip(*(run(train, each) for each in setups), strict=True):
        assert plain["losses"] == direct["losses"] and np.isfinite(plain["losses"]).all()
        for name, gradient in plain["gradients"].items():
            assert np.array_equal(gradient, direct["gradients"][name]), name
