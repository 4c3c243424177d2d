"""A replay takes as long as what was captured: on GPUs, by the records of the dispatches.

It prints both times: ``pytest -s``. Processes are those of test_megatron_gpu.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from megatron_gpu import MARKS, MODEL
from megatron_model import BATCH, make_config, make_model, parallel_state
from ranks import run_ranks

from ep_comm.routing.capture import Sizes, read

pytestmark = MARKS

STEPS, WARM_UP, LAYERS = 20, 3, 3
# So much travels that the host is done before: in training it is slower than in the benchmark.
TOKENS, HIDDEN, EXPERTS, TOPK = 8192, 7168, 64, 4
MOST_APART = 0.03
SETUP = dataclasses.replace(
    MODEL,
    seq=TOKENS // BATCH,
    config=(
        *MODEL.config,
        ("num_layers", LAYERS),
        ("hidden_size", HIDDEN),
        ("num_attention_heads", 56),
        ("moe_ffn_hidden_size", 256),
        ("num_moe_experts", EXPERTS),
        ("moe_router_topk", TOPK),
    ),
)


def capture_and_replay(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Kernel times in µs of the slowest rank: in steps of MoE layers, and of ``ep-comm bench``.

    Each layer gets the same tokens in each step, so it has one routing, and many samples of it. The
    GPUs are aligned before each dispatch, as the benchmark does it: a rank that is late elsewhere
    is no matter of the routing.
    """
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.bench.ops.routing import RoutingSpec
    from ep_comm.bench.ops.run import run
    from ep_comm.bench.ops.settings import Settings, shape_of_flags
    from ep_comm.bench.timing import Stopwatch
    from ep_comm.megatron import EPOptions, RoutingCapture
    from ep_comm.megatron.layer import moe_layers

    setup = dataclasses.replace(SETUP, ep=num_ranks)
    parallel_state(setup)
    model = make_model(setup, make_config(setup, None), EPOptions())
    layers = [layer for _, layer in moe_layers(model)]

    device = torch.device("cuda", torch.cuda.current_device())
    watch = Stopwatch(device, STEPS)
    for layer in layers:
        align_before_dispatch(layer.token_dispatcher, watch)
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(LAYERS, setup.seq, BATCH, HIDDEN, generator=generator)
    hidden[..., 0] = 4.0  # what all tokens share makes the first experts hot
    hidden = hidden.to(layers[0].router.weight.dtype).to(device)
    with torch.no_grad():
        for layer in layers:
            layer.router.weight[:, 0] = torch.linspace(0.4, -0.4, EXPERTS, device=device)

    def step() -> None:
        for layer, tokens in zip(layers, hidden, strict=True):
            output, _ = layer(tokens.clone().requires_grad_())
            output.backward(torch.ones_like(output))

    for _ in range(WARM_UP):
        step()
    capture = RoutingCapture(model, folder)
    buffer = layers[0].token_dispatcher.buffer
    before = buffer.records.num_operations
    for number in range(1, STEPS + 1):
        step()
        capture.step(number)
    buffer.synchronize()
    capture.close()
    records = buffer.records.since(before)
    dispatches = [r for r in records if r.op == "dispatch" and not r.is_backward]
    captured_us = watch.slowest([1e6 * record.seconds for record in dispatches])
    torch.distributed.barrier()  # all files are written

    spec = RoutingSpec.of_flags(None, None, None, replay=folder)
    settings = Settings(
        shape=shape_of_flags(None, spec),
        routing=spec,
        sms=(0,),
        fp8=False,
        layout="expert",
        iters=LAYERS * STEPS,
    )
    settings.check()
    found = run(settings, device, lambda text: None)
    (fresh,) = (result for result in found.results if result.case == "dispatch, fresh")
    return dict(
        backend=found.backend,
        captured_us=captured_us,
        replayed_us=fresh.samples.kernel,
        rank_imbalance=found.rank_imbalance,
        expert_imbalance=found.expert_imbalance,
        void=found.limit.is_void,
    )


def align_before_dispatch(dispatcher: Any, watch: Any) -> None:
    dispatch = dispatcher.token_dispatch

    def token_dispatch(*args: Any) -> Any:
        watch.align()
        return dispatch(*args)

    dispatcher.token_dispatch = token_dispatch


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_replayed_dispatch_takes_as_long_as_the_captured_one(num_ranks, tmp_path):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    found, *others = run_ranks(
        num_ranks, capture_and_replay, num_ranks, tmp_path,
        timeout_s=300, pool="megatron-gpu", backend="nccl",
    )  # fmt: skip
    assert [path.name[-2:] for path in sorted(tmp_path.glob("step-*"))] == [
        "01", "02", "04", "08", "16",
    ]  # fmt: skip
    first, last = read(tmp_path / "step-00000001"), read(tmp_path)
    assert last.sizes == Sizes(EXPERTS, TOPK, HIDDEN, num_ranks) and last.layers == (1, 2, 3)
    for one, other in zip(first.topk_idx, last.topk_idx, strict=True):  # each layer has one routing
        for rows, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(rows, same)
    assert len(found["captured_us"]) == len(found["replayed_us"]) == LAYERS * STEPS
    captured, replayed = (median(found[f"{what}_us"]) for what in ("captured", "replayed"))
    print(
        f"{found['backend']}, {num_ranks} ranks, fullest rank {found['rank_imbalance']:.2f} and "
        f"expert {found['expert_imbalance']:.2f} of the mean: captured {captured:.1f} µs, replayed "
        f"{replayed:.1f} µs, "
        f"{replayed / captured - 1:+.1%}" + (" VOID: slow links" if found["void"] else "")
    )
    assert found["expert_imbalance"] > 2  # uniform routing would be no test
    assert abs(replayed / captured - 1) <= MOST_APART
