"""Handles: how much memory each keeps, and several of them alive at once, used in any order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from buffer_cases import check_grad_weights, check_recv_probs, on_gpus, rows_of_token
from cases import Case, assert_same, to_numpy, to_torch
from oracle import combine, expert_rows, rank_rows
from ranks import run_ranks
from virtual_ranks import run_virtual_ranks

from ep_comm import Buffer, DispatchHandle, EPConfig

MAX_TOKENS = 4096  # far more than come
_SIZES = dict(hidden=64, num_topk=3, alignment=8)
CASES = [
    Case(tokens=(40, 3, 25), seed=1, **_SIZES),
    Case(tokens=(0, 31, 17), seed=2, layout="rank", drop=0.2, **_SIZES),
    Case(tokens=(64, 50, 1), seed=3, routing="zipf", **_SIZES),
]
ROUNDS = 3


def layout_of(case: Case, rank: int) -> list:
    topk_idx = [case.topk_idx(r) for r in range(case.num_ranks)]
    if case.layout == "rank":
        return rank_rows(topk_idx, rank, case.experts_per_rank)
    return expert_rows(topk_idx, rank, case.experts_per_rank, case.alignment)[0]


class Inputs(NamedTuple):
    """Of one rank, made before the first operation: to make them waits for the GPU."""

    x: torch.Tensor
    topk: torch.Tensor
    probs: torch.Tensor
    y: torch.Tensor
    grad_probs: torch.Tensor

    @classmethod
    def of_case(cls, case: Case, rank: int) -> Inputs:
        topk, num_rows = case.topk_idx(rank), len(layout_of(case, rank))
        arrays = (
            case.rows(rank, case.tokens[rank], salt=2),
            topk,
            case.probabilities(rank, topk.shape, salt=3),
            case.rows(rank, num_rows, salt=4),
            case.probabilities(rank, probs_shape(case, num_rows), salt=6),
        )
        return cls(*(to_torch(array, case.device) for array in arrays))


def probs_shape(case: Case, num_rows: int) -> tuple[int, ...]:
    return (num_rows,) if case.layout == "expert" else (num_rows, case.num_topk)


def in_another_order(rank: int, buffer: Buffer, cases: list[Case]) -> list[dict[str, np.ndarray]]:
    """What each case gives; nothing waits for the GPU before all have been started."""
    inputs = [Inputs.of_case(case, rank) for case in cases]
    rounds = []
    for _ in range(ROUNDS):
        outs = []
        for i, (case, given) in enumerate(zip(cases, inputs, strict=True)):
            how = dict(layout=case.layout, expert_alignment=case.alignment, async_finish=i == 1)
            out = buffer.dispatch(given.x, given.topk, given.probs, **how)
            out.event.current_stream_wait()
            outs.append(out)
        first, second, third = (out.handle for out in outs)
        # Beside each other: a combine, a cached dispatch, and a plan over the last one's memory.
        back = [buffer.combine(inputs[0].y, first, inputs[0].grad_probs, async_finish=True)]
        again = [buffer.dispatch(inputs[1].x, topk_weights=inputs[1].probs, handle=second)]
        other = buffer.dispatch(inputs[0].x, inputs[0].topk, expert_alignment=cases[0].alignment)
        back.append(buffer.combine(inputs[1].y, second, inputs[1].grad_probs, async_finish=True))
        again.append(buffer.dispatch(inputs[0].x, topk_weights=inputs[0].probs, handle=first))
        back[0].event.current_stream_wait()
        back[1].event.current_stream_wait()
        again.append(buffer.dispatch(inputs[2].x, topk_weights=inputs[2].probs, handle=third))
        # Nobody else keeps this handle: its memory is used again as soon as that may be.
        handle, other = other.handle, None
        unused = buffer.combine(inputs[0].y, handle, async_finish=True)
        del handle
        back.append(buffer.combine(inputs[2].y, third, inputs[2].grad_probs))
        unused.event.current_stream_wait()
        rounds.append((outs, back, [again[1], again[0], again[2]], unused))
    results = []
    for outs, back, again, unused in rounds:
        assert_same(to_numpy(unused.combined_x), to_numpy(back[0].combined_x), "let go at once")
        for case, out, summed, repeated in zip(cases, outs, back, again, strict=True):
            check_bytes(case, rank, out.handle)
            recv_x, recv_probs = to_numpy(out.recv_x), to_numpy(out.recv_topk_weights)
            assert_same(to_numpy(repeated.recv_x), recv_x, "cached dispatch")
            assert_same(to_numpy(repeated.recv_topk_weights), recv_probs, "its probabilities")
            results.append(
                dict(
                    x=recv_x,
                    probs=recv_probs,
                    combined=to_numpy(summed.combined_x),
                    grad_weights=to_numpy(summed.combined_topk_weights),
                )
            )
    return results


def check_bytes(case: Case, rank: int, handle: DispatchHandle) -> None:
    """They follow from the tokens that this rank has and the rows that came."""
    num_tokens, num_received = case.tokens[rank], handle.num_recv_tokens
    experts = 0 if handle.recv_topk_idx is None else handle.recv_topk_idx.nbytes
    if handle.session.config.backend == "nvlink":
        entries = 4 * 3 * 4 * num_received  # K of 3 takes the room of 4
        own = 4 * num_tokens * (case.num_topk + case.num_ranks)
        assert own + entries <= handle.num_bytes - experts <= own + entries + 512
    else:
        sent = 8 * sum(handle.routing.sizes.sent)
        entries = (4 * num_tokens + 8 * num_received) * case.num_topk
        assert handle.num_bytes == sent + entries + experts


def check(cases: list[Case], results: list[list[dict]]) -> None:
    """Against the oracle, every round."""
    for number in range(ROUNDS * len(cases)):
        case = cases[number % len(cases)]
        got = [of_rank[number] for of_rank in results]
        ranks = range(case.num_ranks)
        topk_idx = [case.topk_idx(r) for r in ranks]
        x = [case.rows(r, case.tokens[r], salt=2) for r in ranks]
        probs = [case.probabilities(r, topk_idx[r].shape, salt=3) for r in ranks]
        layouts = [layout_of(case, r) for r in ranks]
        y = [case.rows(r, len(layouts[r]), salt=4) for r in ranks]
        grad_probs = [
            case.probabilities(r, probs_shape(case, len(layouts[r])), salt=6) for r in ranks
        ]
        zero = np.zeros(case.hidden, case.np_dtype)
        for r in ranks:
            rows = [x[row.source][row.token] if row else zero for row in layouts[r]]
            want = np.array(rows, case.np_dtype).reshape(-1, case.hidden)
            assert_same(got[r]["x"], want, f"rows of {case} on {r}")
            check_recv_probs(case, topk_idx, probs, layouts[r], r, got[r]["probs"])
            sums = [
                combine(
                    topk_idx[r][token],
                    rows_of_token(case, layouts, y, r, token),
                    case.node_size,
                    case.num_ranks,
                    case.hidden,
                    case.np_dtype,
                )
                for token in range(case.tokens[r])
            ]
            want = np.array(sums, case.np_dtype).reshape(-1, case.hidden)
            assert_same(got[r]["combined"], want, f"sums of {case} on {r}")
            check_grad_weights(case, topk_idx[r], layouts, grad_probs, r, got[r]["grad_weights"])


def on_reference(rank: int, cases: list[Case], config: EPConfig) -> list[dict[str, np.ndarray]]:
    return in_another_order(rank, Buffer(None, config), cases)


def test_handles_in_another_order():
    config = CASES[0].config(max_tokens_per_rank=MAX_TOKENS)
    check(CASES, run_ranks(3, on_reference, CASES, config))


@pytest.mark.gpu
@pytest.mark.parametrize("delay_us", [0, 100, 1000])
def test_handles_in_another_order_on_a_gpu(delay_us):
    cases = [on_gpus(case, "nvlink") for case in CASES]
    config = cases[0].config(max_tokens_per_rank=MAX_TOKENS)
    check(cases, run_virtual_ranks(3, in_another_order, config, cases, delay_us=delay_us))
