"""A run of ``ep-comm bench overlap`` that never was."""

from __future__ import annotations

import dataclasses

from ep_comm.bench.ops.probe import Limit
from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.ops.settings import Shape
from ep_comm.bench.overlap.run import Price, Run
from ep_comm.bench.overlap.settings import GemmShape, OverlapSettings

SETTINGS = OverlapSettings(
    shape=Shape(tokens=24, hidden=512, experts=8, topk=3),
    routing=RoutingSpec(),
    sms=(0, 16),
    layouts=("expert", "rank"),
    fp8=True,
    gemms=(GemmShape(256, 512, 128),),
    experts=None,
    runs=3,
)


def made_up_price(case: str, num_sms: int | None, lost: float, **others) -> Price:
    kept = dict(
        case=case,
        layout="expert",
        gemm="4096x4096x7168",
        tiles=512,
        num_sms=num_sms,
        alone=(222.0, 223.0, 221.0),
        beside=(489.0,) * 3,
        lost=(lost - 5, lost, lost + 7),
        serial=(230.0,) * 3,
        wire_bytes=58.7e6,
        num_wrong=0,
    )
    return Price(**{**kept, **others})


def made_up_run(*more: Price) -> Run:
    prices = (
        made_up_price("dispatch, cached", 0, 186),
        made_up_price("dispatch, cached", 64, 170),
        made_up_price("dispatch, cached", 24, 237),
        made_up_price("NCCL alltoall dispatch", None, 404, layout=None),
    )
    wanted = dataclasses.replace(SETTINGS, sms=(0, 64, 24), gemms=(GemmShape(4096, 4096, 7168),))
    return Run(
        settings=wanted,
        num_ranks=2,
        available_sms=132,
        limit=Limit(gb_per_s_by_sms={16: 355.0, 32: 370.0}),
        backend="nvlink (2 GPUs)",
        gemm_us={"4096x4096x7168": 307.0},
        prices=prices + more,
    )
