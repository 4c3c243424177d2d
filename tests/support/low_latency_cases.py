"""Cases of low-latency dispatch and combine, for any backend: run on a rank, then checked.

The functions that run take a buffer and a device. They make all inputs first and read all results
last: in between nothing waits for a GPU, so that virtual ranks (virtual_ranks.py) can run
them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import low_latency_oracle as oracle
import numpy as np
import torch
from cases import Case, assert_same, to_numpy, to_torch
from oracle import fp32_to_bf16

from ep_comm import Buffer, EPConfig, LowLatencyDispatchOutput

# Weights that a sum may meet; the first is the pattern that receivers wait on.
WEIGHT_BITS = [
    *(0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001, 0xFFC00000, 0x7FC00000, 0x7F800000, 0xFF800000),
    *(0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F7FFFFF, 0x3F800000, 0xBF4CCCCD),
]
_POISON = -7.0
# The first two cancel, rounded or not rounded; added to one of them first, the third is lost but
# for a few bits.
_CANCELLING = (1.0, -1.0, 2.0**-20)


@dataclass(frozen=True, kw_only=True)
class LowLatencyCase(Case):
    """One dispatch and its combine.

    Attributes:
        max_tokens: ``num_max_dispatch_tokens_per_rank``.
        room: ``EPConfig.low_latency_tokens``; None is `max_tokens`.
        scales: None is BF16; or a form of `low_latency_oracle`.
        weights_with: "dispatch", "combine", or "both".
        split: Receive by hooks.
        every_value: Rows of every 16-bit value, and weights of every kind of NaN.
        cancelling: Weights and expert outputs of which any other order of the sums, a product that
            is not rounded, or another rounding between gives other bits.
    """

    max_tokens: int = 12
    room: int | None = None
    hidden: int = 64
    scales: str | None = None
    weights_with: str = "dispatch"
    split: bool = False
    every_value: bool = False
    cancelling: bool = False

    def config(self, **changes: Any) -> EPConfig:
        room = self.room or self.max_tokens
        return super().config(**{"low_latency_tokens": room, **changes})

    def rows(self, rank: int, num_rows: int, salt: int) -> np.ndarray:
        if self.every_value:
            return every_value(rank, num_rows, self.hidden)
        rows = super().rows(rank, num_rows, salt)
        if self.scales is None or salt != 2:
            return rows
        # In FP8 an Inf decides what becomes of its whole block: only some tokens have them.
        infinite = (rows & 0x7FFF) == 0x7F80
        infinite[::8] = False
        rows[infinite] = 0x3F80
        rows[1::8, : oracle.BLOCK] &= 0x8000  # zeros of both signs
        return rows

    def weights(self, rank: int) -> np.ndarray:
        shape = (self.tokens[rank], self.num_topk)
        if self.cancelling:  # one for all experts of a token
            return self.probabilities(rank, (shape[0], 1), salt=3).repeat(shape[1], axis=1)
        if not self.every_value:
            return self.probabilities(rank, shape, salt=3)
        count = shape[0] * shape[1]
        bits = np.resize(np.array(WEIGHT_BITS, np.uint32), count + rank)[rank:]
        return bits.view(np.float32).reshape(shape)

    def expert_outputs(self, rank: int) -> np.ndarray:
        """[E, R M, hidden], garbage behind the rows that came among them."""
        num_rows = self.num_ranks * self.max_tokens
        if self.cancelling:
            row = np.random.default_rng(self.seed).standard_normal(self.hidden)
            of_experts = np.resize(_CANCELLING, self.experts_per_rank)[:, None, None]
            values = np.resize(_CANCELLING, rank + 1)[rank] * of_experts * row
            shape = (self.experts_per_rank, num_rows, self.hidden)
            return fp32_to_bf16(np.broadcast_to(values, shape).astype(np.float32))
        rows = self.rows(rank, self.experts_per_rank * num_rows, salt=4)
        return rows.reshape(self.experts_per_rank, num_rows, self.hidden)

    def how_to_dispatch(self) -> dict[str, bool]:
        return dict(
            use_fp8=self.scales is not None,
            round_scale=self.scales in ("power_of_two", "ue8m0"),
            use_ue8m0=self.scales == "ue8m0",
            return_recv_hook=self.split,
        )


def every_value(rank: int, num_rows: int, hidden: int) -> np.ndarray:
    """Rows that count through all 16-bit values. In each 5 two are nearly or wholly ones."""
    counting = [row for row in range(num_rows) if row % 5 < 3]
    first = np.uint32(rank * len(counting) * hidden)
    rows = np.full((num_rows, hidden), 0xFFFF, np.uint16)
    values = first + np.arange(len(counting) * hidden, dtype=np.uint32)
    rows[counting] = (values & 0xFFFF).astype(np.uint16).reshape(-1, hidden)
    elements = np.arange(hidden)
    # One element of each word differs: in turn any of the 8.
    rows[3::5, elements % 8 == elements // 8 % 8] = 0xFFFE
    return rows


class Inputs(NamedTuple):
    """Of one rank, as tensors, and the poisoned memory of what is written."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    weights: torch.Tensor
    y: torch.Tensor
    out: torch.Tensor
    recv_stats: torch.Tensor
    wait_stats: torch.Tensor

    @classmethod
    def of_case(cls, case: LowLatencyCase, rank: int, device: str) -> Inputs:
        tokens = case.tokens[rank]
        idx_dtype = np.int32 if case.idx_dtype == "int32" else np.int64
        poison = np.full((tokens, case.hidden), _POISON, np.float32)
        return cls(
            x=to_torch(case.rows(rank, tokens, salt=2), device),
            topk_idx=to_torch(case.topk_idx(rank).astype(idx_dtype), device),
            weights=to_torch(case.weights(rank), device),
            y=to_torch(case.expert_outputs(rank), device),
            out=to_torch(poison, device).bfloat16(),
            recv_stats=to_torch(np.full(case.experts_per_rank, 100, np.int32), device),
            wait_stats=to_torch(np.full(case.num_ranks, 100, np.int64), device),
        )


def dispatch(buffer: Buffer, case: LowLatencyCase, given: Inputs) -> LowLatencyDispatchOutput:
    weights = given.weights if case.weights_with != "combine" else None
    return buffer.low_latency_dispatch(
        given.x,
        given.topk_idx,
        case.max_tokens,
        case.num_experts,
        weights,
        cumulative_local_expert_recv_stats=given.recv_stats,
        dispatch_wait_recv_cost_stats=given.wait_stats,
        **case.how_to_dispatch(),
    )


def combine(buffer: Buffer, case: LowLatencyCase, given: Inputs, handle: Any) -> Any:
    weights = given.weights if case.weights_with != "dispatch" else None
    return buffer.low_latency_combine(
        given.y,
        given.topk_idx,
        weights,
        handle,
        return_recv_hook=case.split,
        out=given.out,
        combine_wait_recv_cost_stats=given.wait_stats,
    )


def run_case(rank: int, buffer: Buffer, case: LowLatencyCase, device: str) -> dict[str, Any]:
    given = Inputs.of_case(case, rank, device)
    out = dispatch(buffer, case, given)
    if case.split:
        out.hook()
    back = combine(buffer, case, given, out.handle)
    if case.split:
        back.hook()
    assert back.combined_x is given.out
    return as_numpy(case, given, out)


def run_combined_twice(
    rank: int, buffer: Buffer, case: LowLatencyCase, device: str
) -> dict[str, Any]:
    """One dispatch and two combines, as DeepEP's own test has it; the results are of the second."""
    given = Inputs.of_case(case, rank, device)
    first = given._replace(out=given.out.clone())
    out = dispatch(buffer, case, given)
    if case.split:
        out.hook()
    for inputs in (first, given):
        back = combine(buffer, case, inputs, out.handle)
        if case.split:
            back.hook()
    results = as_numpy(case, given, out)
    assert_same(to_numpy(first.out), results["combined"], "the first combine")
    return results


def run_unwaited(
    rank: int, buffer: Buffer, case: LowLatencyCase, steps: int, device: str
) -> list[dict[str, Any]]:
    """Operations follow one another unwaited, of other routings. Rank 1 is late now and then."""
    cases = [dataclasses.replace(case, seed=seed) for seed in range(steps)]
    inputs = [Inputs.of_case(each, rank, device) for each in cases]
    kept = []
    for step, (each, given) in enumerate(zip(cases, inputs, strict=True)):
        if rank == 1 and step % 3 == 1:
            time.sleep(0.3)
        out = dispatch(buffer, each, given)
        if case.split:
            out.hook()
        back = combine(buffer, each, given, out.handle)
        if case.split:
            back.hook()
        kept.append((out, back))
    buffer.synchronize()
    return [
        as_numpy(each, given, out)
        for each, given, (out, _) in zip(cases, inputs, kept, strict=True)
    ]


def run_ahead_of_one(
    rank: int, buffer: Buffer, case: LowLatencyCase, device: str
) -> list[dict[str, Any]]:
    """Rank 1 is late to receive: what the others send next would go where the first still is."""
    cases = [dataclasses.replace(case, seed=seed) for seed in range(3)]
    inputs = [Inputs.of_case(each, rank, device) for each in cases]

    def in_turns(send: Callable[[int], Any]) -> list[Any]:
        sent = [send(0), send(1)]
        if rank == 1:
            time.sleep(1)
        sent[0].hook()
        sent.append(send(2))
        for each in sent[1:]:
            each.hook()
        return sent

    outs = in_turns(lambda i: dispatch(buffer, cases[i], inputs[i]))
    in_turns(lambda i: combine(buffer, cases[i], inputs[i], outs[i].handle))
    buffer.synchronize()
    return [as_numpy(*each) for each in zip(cases, inputs, outs, strict=True)]


def check_in_turn(case: LowLatencyCase, results: list[list[dict[str, Any]]]) -> None:
    """Compare what each rank got of operations of `case` with seeds from 0 on."""
    for seed, of_operation in enumerate(zip(*results, strict=True)):
        check_results(dataclasses.replace(case, seed=seed), list(of_operation))


def run_two_at_once(
    rank: int, buffer: Buffer, cases: list[LowLatencyCase], device: str
) -> list[dict[str, Any]]:
    """Two dispatches are out, then two combines, and their hooks are called in either order.

    Beside them run normal operations, whose result is checked here. Of one buffer, so that the
    cases have one size; all are `split`.
    """
    first, second = cases
    inputs = [Inputs.of_case(case, rank, device) for case in cases]
    ones = torch.ones(3, first.hidden, dtype=torch.bfloat16, device=device)
    topk = to_torch(np.full((3, 1), (rank + 1) % first.num_experts), device)

    def normal_operations() -> torch.Tensor:
        sent = buffer.dispatch(ones, topk)
        return buffer.combine(sent.recv_x, sent.handle).combined_x

    outs = [dispatch(buffer, case, given) for case, given in zip(cases, inputs, strict=True)]
    normal = [normal_operations()]
    outs[1].hook()
    outs[0].hook()
    backs = [combine(buffer, second, inputs[1], outs[1].handle)]
    normal.append(normal_operations())
    backs.append(combine(buffer, first, inputs[0], outs[0].handle))
    backs[0].hook()
    third = dispatch(buffer, first, inputs[0])  # beside a combine that is out
    backs[1].hook()
    third.hook()
    for result in normal:
        assert_same(to_numpy(result), to_numpy(ones), "normal operations beside")
    return [
        as_numpy(case, given, out) for case, given, out in zip(cases, inputs, outs, strict=True)
    ]


def as_numpy(case: LowLatencyCase, given: Inputs, out: LowLatencyDispatchOutput) -> dict[str, Any]:
    """What one rank has at the end."""
    recv_x, scales = out.recv_x if isinstance(out.recv_x, tuple) else (out.recv_x, None)
    num_rows = case.num_ranks * case.max_tokens
    assert recv_x.shape == (case.experts_per_rank, num_rows, case.hidden)
    assert recv_x.is_contiguous()
    results = dict(
        x=to_numpy(recv_x if scales is None else recv_x.view(torch.uint8)),
        counts=to_numpy(out.recv_count),
        src_info=to_numpy(out.handle.recv_src_info),
        combined=to_numpy(given.out),
        recv_stats=to_numpy(given.recv_stats),
        wait_stats=to_numpy(given.wait_stats),
    )
    if scales is not None:
        assert scales.stride(1) == 1 and scales.stride(2) == -(-num_rows // 4) * 4
        results["scales"] = to_numpy(scales)
    return results


def check_results(
    case: LowLatencyCase,
    results: Sequence[dict[str, Any] | None],
    times: int = 1,
    masked: tuple[int, ...] = (),
) -> None:
    """Against the oracle. Rows of each expert were counted `times` times.

    Nothing came from ranks in `masked`, and nothing went to their experts. Of ranks without a
    result nothing is looked at.
    """
    per_rank, hidden = case.experts_per_rank, case.hidden
    topk_idx = [case.topk_idx(r) for r in range(case.num_ranks)]
    for r, topk in enumerate(topk_idx):
        topk[np.isin(topk // per_rank, masked) | (r in masked)] = -1
    ranks = [r for r in range(case.num_ranks) if r not in masked]
    x = {r: case.rows(r, case.tokens[r], salt=2) for r in ranks}
    sent = {r: [_sent(row, case.scales) for row in rows] for r, rows in x.items()}
    y = {r: case.expert_outputs(r) for r in ranks}
    outputs: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    for r in ranks:
        got = results[r]
        for expert, rows in enumerate(oracle.received(topk_idx, r, per_rank)):
            for place, (source, token) in enumerate(rows):
                of_token = outputs.setdefault((source, token), {})
                of_token[r * per_rank + expert] = y[r][expert, place]
            if got is None:
                continue
            where = f"expert {expert} of rank {r}"
            assert got["counts"][expert] == len(rows), where
            for place, (source, token) in enumerate(rows):
                assert got["src_info"][expert, place] == source * case.max_tokens + token, where
                data, scales = sent[source][token]
                np.testing.assert_array_equal(got["x"][expert, place], data, where)
                if scales is not None:
                    row = got["scales"][expert, place]
                    np.testing.assert_array_equal(row.view(np.uint32), scales.view(np.uint32))
        if got is not None:
            np.testing.assert_array_equal(got["recv_stats"], 100 + times * got["counts"])
            assert (got["wait_stats"] >= 100).all() and got["counts"].dtype == np.int32
    for r in ranks:
        if results[r] is None:
            continue
        weights = case.weights(r)
        want = [
            oracle.combine(topk_idx[r][t], weights[t], outputs.get((r, t), {}), per_rank, hidden)
            for t in range(case.tokens[r])
        ]
        want_rows = np.array(want, np.uint16).reshape(-1, hidden)
        assert_same(results[r]["combined"], want_rows, f"combined on rank {r}")


def _sent(row: np.ndarray, scales: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    return (oracle.arrived(row), None) if scales is None else oracle.quantize(row, scales)
