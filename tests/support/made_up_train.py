"""A run of ``ep-comm bench train`` that never was."""

from __future__ import annotations

from example_runs import CONFIGS

from ep_comm.bench.train.profile import Bar, Profile
from ep_comm.bench.train.results import Block, Inspection, LayerTimes, TrainRun
from ep_comm.bench.train.settings import make_train_settings

TINY = CONFIGS / "tiny-cpu.yaml"
SMALL = ("--num-layers", "1", "--seq-length", "32", "--micro-batch-size", "2")


def settings(**changes):
    asked = dict(
        config=TINY,
        extra=SMALL,
        variants="alltoall,ep_comm,ep_comm-overlap",
        microbatches="1,2",
        blocks=2,
        steps=2,
        warmup=1,
    )
    return make_train_settings(**{**asked, **changes})


def made_up_run(*, device: str = "cuda") -> TrainRun:
    """Steps of 12, 10 and 8 ms; in the second block ep_comm is as slow as alltoall."""
    found = settings()
    base_ms = {"alltoall": 12.0, "ep_comm": 10.0, "ep_comm-overlap": 8.0}
    backward_ms = {"alltoall": 7.0, "ep_comm": 6.0, "ep_comm-overlap": 5.2}
    profile = Profile(
        kernels=50, copies=4, waits=3, wait_us=100, host_us=900, busy_us=800,
        communication_us=300, exposed_us=200, wall_us=1100,
    )  # fmt: skip
    timeline = (
        Bar(name="combine_kernel", stream=13, start_us=0, duration_us=900),
        Bar(name="nvjet_gemm", stream=7, start_us=50, duration_us=1500),
    )

    def inspection(name: str) -> Inspection:
        backward = backward_ms[name]
        on_gpu = dict(
            step=profile, layer_forward=profile, layer_backward=profile, backward_bars=timeline
        )
        return Inspection(
            phases_ms={"dispatch": 1.0, "expert": 2.0, "combine": 1.0},
            imbalance={"rank": 1.1, "expert": 1.5},
            layer=LayerTimes(
                forward=(3.0, 3.0, 9.0),
                backward=(backward, backward, 99.0),
                total=(3 + backward,) * 3,
                combine=() if name == "alltoall" else (1.0, 1.0, 5.0),
                hidden=(0.7, 0.8, 3.0) if name == "ep_comm-overlap" else (),
            ),
            **(on_gpu if device == "cuda" else {}),
        )

    def block(name: str, count: int, index: int) -> Block:
        slow = 2.0 if (name, index) == ("ep_comm", 1) else 0.0
        ms = count * (base_ms[name] + slow)
        return Block(
            variant=name,
            microbatches=count,
            block=index,
            step_ms=(ms, ms + 1, ms - 1),
            host_ms=(ms,) * 3,
            loss=5.5,
            peak_bytes={"alltoall": 10, "ep_comm": 11, "ep_comm-overlap": 12}[name] * 2**30,
            num_allocations=3 if name == "ep_comm" else 0,
        )

    config = dict(num_layers=2, hidden_size=128, num_experts=8, moe_ffn_hidden_size=64)
    config |= dict(moe_router_topk=2, micro_batch_size=2, seq_length=32, manual_gc=True)
    config |= dict(expert_model_parallel_size=2, moe_permute_fusion=False)
    return TrainRun(
        settings=found,
        configs={name: config for name in found.variants},
        vocab_size=257,
        device=device,
        num_ranks=2,
        inspections={name: inspection(name) for name in found.variants},
        blocks=[
            block(name, count, index)
            for index in range(2)
            for name in found.order(index)
            for count in found.microbatches
        ],
    )
