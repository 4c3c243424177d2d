"""Settings of ``ep-comm bench``, and a run of it that never was."""

from __future__ import annotations

from ep_comm.bench.ops.probe import Limit
from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.ops.run import Result, Run
from ep_comm.bench.ops.settings import Settings, Shape
from ep_comm.bench.timing import Samples

SETTINGS = Settings(
    shape=Shape(tokens=16, hidden=128, experts=8, topk=3),
    routing=RoutingSpec(),
    sms=(0, 24),
    fp8=True,
    layout="expert",
    iters=3,
)
LIMIT = Limit(gb_per_s_by_sms={16: 331.0, 32: 333.0})
SLOW = Limit(gb_per_s_by_sms={16: 210.0, 32: 319.9})


def made_up_run(limit: Limit) -> Run:
    """100 µs at 333 GB/s are 33.3 MB."""

    def result(case: str, num_sms: int | None, call_us: float, kernel: bool) -> Result:
        return Result(
            case=case,
            num_sms=num_sms,
            samples=Samples(
                call=(call_us, call_us + 1, call_us - 1),
                host=(40.0, 41.0, 42.0),
                host_idle=(50.0, 51.0, 52.0),
                idle=(call_us + 60,) * 3,
                kernel=(call_us - 20,) * 3 if kernel else (),
                unaligned=(call_us + 5,) * 3,
            ),
            wire_bytes=33.3e6,
            floor_bytes=33.3e6,
            logical_bytes=66_600_000,
        )

    return Run(
        settings=SETTINGS,
        num_ranks=4,
        backend="nvlink (4 GPUs)",
        buffer_bytes=2**30,
        limit=limit,
        rank_imbalance=1.01,
        expert_imbalance=1.2,
        results=(
            result("dispatch, fresh", 0, 120, False),
            result("combine", 0, 110, True),
            result("dispatch, fresh", 24, 150, False),
            result("combine", 24, 140, True),
            result("NCCL alltoall dispatch", None, 400, False),
        ),
    )
