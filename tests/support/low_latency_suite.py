"""The low-latency cases that every backend has to pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from cases import wait_for_stream
from low_latency_cases import Inputs, LowLatencyCase, as_numpy, combine, dispatch, run_case

from ep_comm import Buffer

Case = LowLatencyCase
CASES = [
    Case(tokens=(7,)),
    Case(tokens=(7, 5), weights_with="combine"),
    Case(tokens=(0, 9), drop=0.3, weights_with="both", split=True),
    Case(tokens=(0, 0), weights_with="combine", split=True),
    Case(tokens=(6, 0, 11), num_topk=5, experts_per_rank=3, idx_dtype="int32", hidden=8),
    Case(tokens=(6, 8, 11), routing="one_expert", weights_with="combine", split=True),
    Case(tokens=(12, 1, 12), routing="last_rank", num_topk=4, hidden=136, room=32),
    Case(tokens=(9, 8, 7, 6), num_topk=8, experts_per_rank=2, ranks_per_node=2, drop=0.1),
    Case(tokens=(3, 3, 3, 3), drop=1.0, weights_with="combine"),
    Case(tokens=(9, 8, 7), num_topk=9, experts_per_rank=3, cancelling=True, drop=0.1),
    Case(tokens=(12,), num_topk=3, experts_per_rank=3, cancelling=True, weights_with="combine"),
    Case(tokens=(12, 0, 7), scales="fp32", hidden=384, num_topk=4, drop=0.2, max_tokens=13),
    Case(tokens=(12, 5), scales="power_of_two", hidden=128, weights_with="combine", split=True),
    Case(tokens=(9, 10, 8, 12), scales="ue8m0", hidden=512, num_topk=4, split=True, max_tokens=14),
    Case(tokens=(9,), scales="ue8m0", hidden=1024, routing="zipf", max_tokens=9),
]
_HARD = dict(tokens=(26, 26, 26, 26), max_tokens=26, hidden=1024, num_topk=6, every_value=True)
HARD = [
    Case(**_HARD),
    Case(**_HARD, weights_with="combine", split=True),
    Case(**_HARD, scales="fp32"),
    Case(**_HARD, scales="power_of_two", split=True),
    Case(**_HARD, scales="ue8m0"),
]
TWICE = [
    Case(tokens=(7, 5), weights_with="combine"),
    Case(tokens=(0, 9, 4), drop=0.3, split=True),
]
_TWO = dict(split=True, num_topk=3)
TWO_AT_ONCE = [
    Case(tokens=(7, 0, 12), seed=1, hidden=512, scales="ue8m0", weights_with="combine", **_TWO),
    Case(tokens=(5, 9, 3), seed=2, hidden=512, drop=0.2, max_tokens=9, **_TWO),
]


def changing_operations(rank: int, buffer: Buffer, device: str) -> list[dict[str, Any]]:
    return [run_case(rank, buffer, case, device) for case in CHANGING]


CHANGING = [
    Case(
        tokens=tuple(np.random.default_rng(seed).integers(0, 13, 2).tolist()),
        hidden=512,
        seed=seed,
        scales=(None, "fp32", "power_of_two", "ue8m0")[seed % 4],
        weights_with=("dispatch", "combine", "both")[seed % 3],
        split=seed % 2 == 0,
    )
    for seed in range(12)
]


GRAPH = LowLatencyCase(tokens=(9, 12), scales="ue8m0", hidden=512, num_topk=4, drop=0.1)
LARGE = LowLatencyCase(
    tokens=(128, 128), max_tokens=128, scales="fp32", hidden=7168, num_topk=8, experts_per_rank=18
)
SMALL = LowLatencyCase(tokens=(7, 5), scales="fp32", hidden=128, num_topk=3, max_tokens=7)


def replays(rank: int, case: LowLatencyCase, seeds: range) -> list[dict[str, Any]]:
    """Two layers in one graph, replayed with changing routing and poisoned outputs."""
    with torch.cuda.stream(torch.cuda.Stream()), Buffer(None, case.config()) as buffer:
        layers = [Inputs.of_case(case, rank, "cuda") for _ in range(2)]
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, stream=torch.cuda.current_stream(), capture_error_mode="relaxed"
        ):
            outs = [dispatch(buffer, case, given) for given in layers]
            for out in outs[:: -1 if case.split else 1]:
                if case.split:
                    out.hook()
            backs = [
                combine(buffer, case, given, out.handle)
                for given, out in zip(layers, outs, strict=True)
            ]
            for back in backs:
                if case.split:
                    back.hook()
        results = []
        for seed in seeds:
            for given, salt in zip(layers, (0, 1000), strict=True):
                fresh = Inputs.of_case(dataclasses.replace(case, seed=seed + salt), rank, "cuda")
                for static, new in zip(given, fresh, strict=True):
                    static.copy_(new)
            for out in outs:
                for tensor in (out.recv_x[0].view(torch.uint8), out.recv_count):
                    tensor.fill_(77)
            graph.replay()
            wait_for_stream()
            buffer.synchronize()
            both = zip(layers, outs, strict=True)
            results += [as_numpy(case, given, out) for given, out in both]
        return results


SHAPES = {1: [(1, 1)], 2: [(2, 1)], 3: [(3, 1)], 4: [(2, 2), (4, 1)]}
# Several chunks to a rank, of which the last has fewer rows.
CHUNKS = LowLatencyCase(
    tokens=(40, 33, 64, 9), max_tokens=64, hidden=640, num_topk=6, experts_per_rank=3, drop=0.1
)
