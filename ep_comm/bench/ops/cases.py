"""The calls that are measured: each a function of the number of the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ep_comm import Buffer, fp8
from ep_comm.bench.ops.alltoall import AllToAll
from ep_comm.bench.ops.routing import NUM_SETS, routing_of
from ep_comm.bench.ops.settings import Settings


@dataclass(frozen=True, kw_only=True)
class InputSet:
    """What one rank sends in one call.

    Attributes:
        x: [T, hidden] BF16.
        x_fp8: The same as FP8 rows and scales, where they are asked for.
        topk_idx: [T, K] int64.
        topk_weights: [T, K] FP32.
    """

    x: Tensor
    x_fp8: tuple[Tensor, Tensor] | None
    topk_idx: Tensor
    topk_weights: Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation to measure.

    Attributes:
        name: In the tables.
        call: The i-th call, on set i modulo `NUM_SETS`. One of a buffer takes further arguments of
            its operation.
        wire_bytes_to_rank: Payload and scale bytes that the last call sent to each rank, 0 to its
            own.
        logical_bytes: Of one rank: a row for each expert of each token.
    """

    name: str
    call: Callable[..., object]
    wire_bytes_to_rank: Callable[[], Sequence[int]]
    logical_bytes: int


def make_inputs(settings: Settings, rank: int, device: torch.device) -> list[InputSet]:
    """Draw `NUM_SETS` sets of this rank's inputs, each with rows and routing of its own.

    They are rotated, so that no input is in L2 when its turn comes again.
    """
    tokens, hidden, experts, topk = settings.shape
    sets = []
    for i in range(NUM_SETS):
        seed = rank * NUM_SETS + i
        topk_idx, topk_weights = routing_of(
            settings.routing, tokens, experts, topk, rank=rank, number=i, seed=seed
        )
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(tokens, hidden, generator=generator, device=device).bfloat16()
        sets.append(
            InputSet(
                x=x,
                x_fp8=fp8.quantize(x) if settings.fp8 else None,
                topk_idx=topk_idx.to(device),
                topk_weights=topk_weights.to(device),
            )
        )
    return sets


def buffer_cases(buffer: Buffer, inputs: list[InputSet], settings: Settings) -> list[Case]:
    """Return dispatch and combine of `buffer`. Collective."""
    layout = settings.layout
    tokens, hidden, _, topk = settings.shape
    bf16_bytes = tokens * topk * hidden * 2
    fp8_bytes = tokens * topk * (hidden + hidden // fp8.BLOCK * 4)
    dispatched = [buffer.dispatch(s.x, s.topk_idx, s.topk_weights, layout=layout) for s in inputs]

    def last_call() -> Sequence[int]:
        records = buffer.records
        return records.since(records.num_operations - 1)[-1].wire_bytes_to_rank

    def fresh(i: int, quantized: bool = False, **how) -> object:
        s = inputs[i % NUM_SETS]
        x: Any = s.x_fp8 if quantized else s.x  # there where FP8 is asked for
        return buffer.dispatch(x, s.topk_idx, s.topk_weights, layout=layout, **how)

    def cached(i: int, quantized: bool = False, **how) -> object:
        s = inputs[i % NUM_SETS]
        x: Any = s.x_fp8 if quantized else s.x
        handle = dispatched[i % NUM_SETS].handle
        return buffer.dispatch(x, topk_weights=s.topk_weights, handle=handle, **how)

    def without_host_wait(i: int, **how) -> object:
        num_rows = dispatched[i % NUM_SETS].handle.num_rows
        return fresh(i, num_worst_tokens=max(num_rows, 1), **how)

    def combine(i: int, **how) -> object:
        out = dispatched[i % NUM_SETS]
        rows: Any = out.recv_x  # one tensor: they were dispatched in BF16
        return buffer.combine(rows, out.handle, **how)

    def case(
        name: str, call: Callable[..., object], logical_bytes: int = bf16_bytes, **how
    ) -> Case:
        return Case(
            name=name,
            call=partial(call, **how),
            wire_bytes_to_rank=last_call,
            logical_bytes=logical_bytes,
        )

    cases = [
        case("dispatch, fresh", fresh),
        case("dispatch, fresh, no host wait", without_host_wait),
        case("dispatch, cached", cached),
        case("combine", combine),
    ]
    if settings.fp8:
        both = dict(wire_dtype=fp8.FP8_DTYPE, recv_dtype=fp8.FP8_DTYPE)
        to_bf16 = dict(quantized=True, recv_dtype=torch.bfloat16)
        cases += [
            case("FP8 dispatch, fresh", fresh, fp8_bytes, quantized=True),
            case("FP8 dispatch, fresh, no host wait", without_host_wait, fp8_bytes, quantized=True),
            case("FP8 dispatch, cached", cached, fp8_bytes, quantized=True),
            case("FP8 dispatch to BF16, fresh", fresh, fp8_bytes, **to_bf16),
            case("FP8 dispatch to BF16, cached", cached, fp8_bytes, **to_bf16),
            case("FP8 dispatch, quantising, fresh", fresh, fp8_bytes, **both),
        ]
    return cases


def graph_cases(cases: list[Case]) -> list[Case]:
    """Return a dispatch and a combine of `buffer_cases` as CUDA graphs, with the SMs of now."""
    by_name = {case.name: case for case in cases}
    return [
        _in_graphs("dispatch, fresh, CUDA graph", by_name["dispatch, fresh, no host wait"]),
        _in_graphs("combine, CUDA graph", by_name["combine"]),
    ]


def _in_graphs(name: str, case: Case) -> Case:
    """Return a case that replays the same work, from a graph for each set."""
    graphs: list[torch.cuda.CUDAGraph] = []
    wire_bytes: list[Sequence[int]] = []
    for i in range(NUM_SETS):
        case.call(i)
        wire_bytes.append(case.wire_bytes_to_rank())
        graphs.append(torch.cuda.CUDAGraph())
        # NCCL's own thread may ask for events meanwhile.
        with torch.cuda.graph(graphs[i], capture_error_mode="thread_local"):
            case.call(i)
    last = 0

    def replay(i: int) -> None:
        nonlocal last
        last = i % NUM_SETS
        graphs[last].replay()

    return dataclasses.replace(
        case, name=name, call=replay, wire_bytes_to_rank=lambda: wire_bytes[last]
    )


def alltoall_cases(alltoall: AllToAll, inputs: list[InputSet], settings: Settings) -> list[Case]:
    """Return dispatch and combine by NCCL, as Megatron's alltoall does them. Collective."""
    tokens, hidden, experts, topk = settings.shape
    row_bytes = hidden * 2
    # As Megatron's router gives them.
    maps = [s.x.new_zeros(tokens, experts, dtype=torch.bool) for s in inputs]
    probs = [s.topk_weights.new_zeros(tokens, experts) for s in inputs]
    for s, map_TE, probs_TE in zip(inputs, maps, probs, strict=True):
        map_TE.scatter_(1, s.topk_idx, True)
        probs_TE.scatter_(1, s.topk_idx, s.topk_weights)
    last_rows: list[int] = []

    def dispatch(i: int) -> tuple:
        j = i % NUM_SETS
        out = alltoall.dispatch(inputs[j].x, maps[j], probs[j])
        last_rows[:] = out[2].sent
        return out

    dispatched = [dispatch(i) for i in range(NUM_SETS)]

    def combine(i: int) -> object:
        rows, _, permutation = dispatched[i % NUM_SETS]
        last_rows[:] = permutation.received
        return alltoall.combine(rows, permutation)

    def last_call() -> Sequence[int]:
        return [0 if r == alltoall.rank else rows * row_bytes for r, rows in enumerate(last_rows)]

    return [
        Case(
            name=name,
            call=call,
            wire_bytes_to_rank=last_call,
            logical_bytes=tokens * topk * row_bytes,
        )
        for name, call in (
            ("NCCL alltoall dispatch", dispatch),
            ("NCCL alltoall combine", combine),
        )
    ]
