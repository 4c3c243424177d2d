"""Settings of ``ep-comm bench low-latency``, and a run of it that never was."""

from __future__ import annotations

import dataclasses

from ep_comm.bench.low_latency.clocks import HOST_CALLS, Times
from ep_comm.bench.low_latency.floors import Floors
from ep_comm.bench.low_latency.run import HostResult, Result, Run
from ep_comm.bench.low_latency.settings import Settings
from ep_comm.bench.ops.probe import Limit
from ep_comm.bench.ops.routing import RoutingSpec

SETTINGS = Settings(tokens=(3,), hidden=(256,), topk=2, experts=5, replays=10, backend="reference")
GPU_SETTINGS = dataclasses.replace(SETTINGS, backend="nvlink", tokens=(1, 9))
OPERATIONS = [
    "dispatch",
    "dispatch of a pair",
    "combine",
    "dispatch + combine",
    "dispatch of a pair, own weights",
    "combine, own weights",
    "dispatch + combine, own weights",
    "dispatch of a pair, general kernel",
    "combine, general kernel",
    "dispatch + combine, general kernel",
    "send of dispatch",
    "receive of dispatch",
    "send of combine",
    "receive of combine",
    "four phases",
]
FLOORS = Floors(limit=Limit(gb_per_s_by_sms={16: 331.0, 32: 340.0}), one_way_us=0.7)


def groups(num_groups: int, topk_groups: int) -> RoutingSpec:
    return RoutingSpec(kind="group-limited", num_groups=num_groups, topk_groups=topk_groups)


def made_up_run(floors: Floors | None = FLOORS, wrong: int = 0) -> Run:
    """Operations take 10 µs times their place, hosts 20."""
    settings = Settings(tokens=(8, 128), hidden=(7168,))
    results, host = [], []
    for point in settings.points(7168):
        for i, name in enumerate(OPERATIONS):
            p50 = 10.0 * (1 + i)
            times = Times(p50=p50, p99=1.5 * p50, max=3 * p50, samples=9500)
            results.append(
                Result(
                    operation=name,
                    hidden=7168,
                    tokens=point.tokens,
                    room=point.room,
                    num_sms=0,
                    graph=times if floors else None,
                    eager=dataclasses.replace(times, p50=p50 + 1),
                    kernel=times if name == "combine" else None,
                    mean_us=p50 - 1 if name == "dispatch + combine" else None,
                    floor_us=4.0 if name == "dispatch + combine" and floors else None,
                    wrong=wrong,
                )
            )
        fast = Times(p50=20, p99=24, max=99, samples=200)
        host.append(HostResult(point=point, times=dict.fromkeys(HOST_CALLS, fast)))
    for tokens in settings.tokens:
        alltoall = Times(p50=33, p99=35, max=44, samples=500)
        results.append(
            Result(
                operation="NCCL alltoall", hidden=7168, tokens=tokens, room=None, num_sms=None,
                graph=alltoall if floors else None, eager=alltoall, wrong=0,
            )
        )  # fmt: skip
    return Run(
        settings=settings, num_ranks=2, num_experts=288, backend="nvlink (2 GPUs)", floors=floors,
        step_ns=32, results=results, host=host,
    )  # fmt: skip
