"""Megatron's flex dispatcher with its DeepEP backend, over ours, against its alltoall."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from megatron_cases import CLOSE, CLOSE_BF16
from megatron_model import Setup, assert_close_runs, train
from own_name import install
from ranks import run_ranks, stop_pool

pytest.importorskip("megatron.core")

POOL = "flex"  # of processes in which `import deep_ep` finds ours
FLEX = (("moe_flex_dispatcher_backend", "deepep"), ("moe_enable_deepep", True))
SETUPS = {
    "fp32": Setup(),
    "bf16": Setup(bf16=True),
    "dropping": Setup(config=(("moe_expert_capacity_factor", 0.7),)),
    "microbatches": Setup(microbatches=3),
    "recomputed": Setup(
        config=(("recompute_granularity", "selective"), ("recompute_modules", ["moe"]))
    ),
}


@pytest.fixture(scope="module", autouse=True)
def megatron_processes():
    # Before they import Megatron, which looks for it once.
    run_ranks(2, install, pool=POOL)
    if torch.cuda.device_count() > 1:
        run_ranks(2, install, pool=POOL, backend="nccl")
    yield
    stop_pool(POOL)


def train_over_ours(rank: int, setup: Setup) -> dict:
    from megatron.core.transformer.moe import fused_a2a

    fused_a2a._buffer = None
    results = train(rank, setup)
    if setup.dispatcher == "flex":
        assert type(fused_a2a._buffer).__module__ == "ep_comm.deep_ep.buffer"
    return results


def check_trains_like_alltoall(setup: Setup, backend: str) -> None:
    def run(setup: Setup) -> list[dict]:
        return run_ranks(2, train_over_ours, setup, pool=POOL, backend=backend, timeout_s=300)

    ours = run(dataclasses.replace(setup, dispatcher="flex", config=(*setup.config, *FLEX)))
    assert ours[0]["losses"][-1] < ours[0]["losses"][0]
    theirs = run(dataclasses.replace(setup, dispatcher="alltoall"))
    assert_close_runs(ours, theirs, CLOSE_BF16 if setup.bf16 else CLOSE)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron runs on CPU where there is no GPU")
@pytest.mark.parametrize("name", SETUPS)
def test_trains_like_alltoall(name):
    check_trains_like_alltoall(SETUPS[name], "gloo")


@pytest.mark.multi_gpu
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)
def test_trains_like_alltoall_on_gpus():
    sizes = (("hidden_size", 256), ("ffn_hidden_size", 256), ("moe_ffn_hidden_size", 256))
    setup = Setup(te=True, bf16=True, seq=64, lr=1e-3, config=sizes)
    check_trains_like_alltoall(setup, "nccl")
