"""Low latency between nodes, with its kernels run on the CPU: no GPU is needed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from buffer_cases import calls_noted
from emulated_nodes import run_emulated_nodes
from low_latency_cases import (
    Inputs,
    LowLatencyCase,
    as_numpy,
    check_in_turn,
    check_results,
    combine,
    dispatch,
    run_ahead_of_one,
    run_case,
    run_combined_twice,
    run_two_at_once,
    run_unwaited,
)
from low_latency_suite import (
    CASES,
    CHANGING,
    CHUNKS,
    HARD,
    SHAPES,
    TWICE,
    TWO_AT_ONCE,
    changing_operations,
)
from node_cases import PATIENT

from ep_comm import Buffer, EPError, EPMismatchError, EPRoutingError, EPTimeoutError
from ep_comm._native import header
from ep_comm.errors import EPStateError, EPUnsupportedError

QUICK = [
    pytest.param((2, 1), dataclasses.replace(CHUNKS, tokens=(40, 64)), id="2x1"),
    pytest.param((2, 2), dataclasses.replace(CHUNKS, scales="fp32"), id="2x2-fp8"),
    pytest.param(
        (4, 1), dataclasses.replace(CHUNKS, split=True, weights_with="combine"), id="4x1-split"
    ),
]


def on_buffer(rank: int, buffer: Buffer, case: LowLatencyCase) -> dict[str, Any]:
    with calls_noted(buffer):
        results = run_case(rank, buffer, case, "cpu")
        buffer.synchronize()
    return results


def check_case(library, shape: tuple[int, int], case: LowLatencyCase, **how: Any) -> None:
    results = run_emulated_nodes(library, *shape, on_buffer, case.config(**PATIENT), case, **how)
    check_results(case, results)


@pytest.mark.parametrize(("shape", "case"), QUICK)
def test_operations(library, shape, case):
    check_case(library, shape, case)


NAMED = [
    pytest.param(shape, case, id=f"{i}-{shape[0]}x{shape[1]}")
    for i, case in enumerate([*CASES, *HARD])
    for shape in SHAPES[case.num_ranks]
]


@pytest.mark.e2e
@pytest.mark.parametrize(("shape", "case"), NAMED)
@pytest.mark.parametrize("carried", [False, True])
def test_named_cases(library, shape, case, carried):
    check_case(library, shape, case, carried=carried, delay_us=20 if carried else 0)


def combined_twice(rank: int, buffer: Buffer, case: LowLatencyCase) -> dict[str, Any]:
    return run_combined_twice(rank, buffer, case, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", TWICE)
def test_one_dispatch_is_combined_twice(library, case):
    shape = SHAPES[case.num_ranks][0]
    config = case.config(**PATIENT)
    check_results(case, run_emulated_nodes(library, *shape, combined_twice, config, case))


def two_at_once(rank: int, buffer: Buffer) -> list[dict[str, Any]]:
    return run_two_at_once(rank, buffer, TWO_AT_ONCE, "cpu")


@pytest.mark.slow
def test_two_results_are_out_at_once_beside_normal_operations(library):
    config = TWO_AT_ONCE[0].config(**PATIENT)
    results = run_emulated_nodes(library, 3, 1, two_at_once, config)
    for number, case in enumerate(TWO_AT_ONCE):
        check_results(case, [of_rank[number] for of_rank in results], times=2 - number)


def changing(rank: int, buffer: Buffer) -> list[dict[str, Any]]:
    return changing_operations(rank, buffer, "cpu")


@pytest.mark.slow
def test_changing_operations_of_one_buffer(library):
    config = CHANGING[0].config(**PATIENT)
    results = run_emulated_nodes(library, 2, 1, changing, config, delay_us=20)
    for number, case in enumerate(CHANGING):
        check_results(case, [of_rank[number] for of_rank in results])


def unwaited(rank: int, buffer: Buffer, case: LowLatencyCase, steps: int) -> list[dict[str, Any]]:
    return run_unwaited(rank, buffer, case, steps, "cpu")


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), pytest.param((4, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_operations_that_nobody_waits_for(library, shape, split):
    """A network that is late: a credit that is not heeded would show in what is written over."""
    num_ranks = shape[0] * shape[1]
    weights_with = "combine" if split else "dispatch"
    case = dataclasses.replace(
        CHUNKS, tokens=CHUNKS.tokens[:num_ranks], split=split, weights_with=weights_with
    )
    results = run_emulated_nodes(
        library, *shape, unwaited, case.config(**PATIENT), case, 5,
        network_us=1000, delay_us=20, unwaited=True,
    )  # fmt: skip
    check_in_turn(case, results)


def ahead_of_one(rank: int, buffer: Buffer, case: LowLatencyCase) -> list[dict[str, Any]]:
    return run_ahead_of_one(rank, buffer, case, "cpu")


@pytest.mark.parametrize("shape", [(2, 1), pytest.param((2, 2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("weights_with", ["dispatch", "combine"])
def test_who_is_ahead_does_not_write_over_what_is_read(library, shape, weights_with):
    case = dataclasses.replace(
        CHUNKS,
        tokens=CHUNKS.tokens[: shape[0] * shape[1]],
        split=True,
        weights_with=weights_with,
    )
    config = case.config(timeout_s=30)
    results = run_emulated_nodes(library, *shape, ahead_of_one, config, case)
    check_in_turn(case, results)


@pytest.mark.parametrize("shape", [(2, 1), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_flags_before_their_data_give_wrong_results(library, shape):
    """The control: on such a network the same test has to fail."""
    case = dataclasses.replace(CHUNKS, tokens=CHUNKS.tokens[: shape[0] * shape[1]], hidden=1024)
    with pytest.raises((AssertionError, EPError)):
        check_case(library, shape, case, early_flags=True, network_us=5000)


def one_does_not_come(rank: int, buffer: Buffer, case: LowLatencyCase) -> str:
    given = Inputs.of_case(case, rank, "cpu")
    if rank == 3:
        buffer._session.backend.give_up()
        return ""
    out = dispatch(buffer, case, given)
    with pytest.raises(EPTimeoutError) as error:
        buffer.synchronize()
    assert error.value.late_ranks == (3,)
    assert not out.recv_count.any()
    return str(error.value)


def test_who_is_late_is_named(library):
    """And no other: nobody relays."""
    case = LowLatencyCase(tokens=(7, 5, 3, 9))
    texts = run_emulated_nodes(library, 2, 2, one_does_not_come, case.config(timeout_s=2), case)
    for rank, text in enumerate(texts[:3]):
        start = f"low_latency_dispatch #1: rank {rank} waited 2 s for rank 3 (phase: plan)"
        assert text.startswith(start)


def with_other_handles(rank: int, buffer: Buffer, case: LowLatencyCase) -> str:
    """Ranks combine different dispatches: of the same sizes, so that only the epochs tell."""
    given = Inputs.of_case(case, rank, "cpu")
    handles = [dispatch(buffer, case, given).handle for _ in range(2)]
    with pytest.raises(EPMismatchError) as caught:
        combine(buffer, case, given, handles[rank])
        buffer.synchronize()
    return str(caught.value)


@pytest.mark.parametrize("_", range(5))  # now and then a block sees it before others have begun
def test_combines_of_different_dispatches_are_a_mismatch(library, _):
    case = LowLatencyCase(tokens=(7, 5))
    for message in run_emulated_nodes(
        library, 2, 1, with_other_handles, case.config(timeout_s=20), case
    ):
        assert "different low_latency_combine calls: handles of different dispatches" in message


def with_wrong_experts(rank: int, buffer: Buffer, case: LowLatencyCase) -> dict[str, Any]:
    given = Inputs.of_case(case, rank, "cpu")
    given.topk_idx[given.topk_idx < 0] = case.num_experts + rank
    out = dispatch(buffer, case, given)
    combine(buffer, case, given, out.handle)
    results = {name: array.copy() for name, array in as_numpy(case, given, out).items()}
    message = rf"token \d+, entry \d, no expert has number {case.num_experts + rank}\."
    with pytest.raises(EPRoutingError, match=message):
        dispatch(buffer, case, given)
    combine(buffer, case, given, dispatch(buffer, case, given).handle)  # it was said once
    return results


def test_what_is_no_expert_is_dropped(library):
    case = LowLatencyCase(tokens=(12, 9), num_topk=4, drop=0.4)
    config = case.config(**PATIENT)
    check_results(case, run_emulated_nodes(library, 2, 1, with_wrong_experts, config, case))


def with_a_third(rank: int, buffer: Buffer, case: LowLatencyCase) -> None:
    given = Inputs.of_case(case, rank, "cpu")
    outs = [dispatch(buffer, case, given) for _ in range(2)]
    with pytest.raises(EPStateError, match="results of the last 2 may be out at once"):
        dispatch(buffer, case, given)
    for out in outs:
        out.hook()
    with pytest.raises(EPUnsupportedError, match="between nodes cannot be masked"):
        buffer.mask_rank(1 - rank)
    combine(buffer, case, given, outs[1].handle).hook()
    buffer.synchronize()


def test_refusals_leave_the_buffer_as_it_was(library):
    case = LowLatencyCase(tokens=(7, 5), split=True)
    run_emulated_nodes(library, 2, 1, with_a_third, case.config(**PATIENT), case)


def without_the_last(
    rank: int, buffer: Buffer, case: LowLatencyCase, masked: int
) -> dict[str, Any] | None:
    """The last rank does nothing, and the others' kernels find that it is masked."""
    given = Inputs.of_case(case, rank, "cpu")
    if rank == masked:
        return None
    low_latency = buffer._session.backend.low_latency
    offset = header.NodesLowLatencyState.masked.offset // 4
    low_latency._state[0, offset + masked // 32] = 1 << masked % 32
    for _ in range(3):
        given.recv_stats.fill_(100)
        out = dispatch(buffer, case, given)
        combine(buffer, case, given, out.handle)
    buffer.synchronize()
    return as_numpy(case, given, out)


@pytest.mark.parametrize("shape", [(3, 1), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_kernels_leave_masked_ranks_out(library, shape):
    """No host masks ranks between nodes yet; the kernels would heed it."""
    masked = shape[0] * shape[1] - 1
    case = dataclasses.replace(CHUNKS, tokens=CHUNKS.tokens[: masked + 1], split=False)
    config = case.config(timeout_s=20)
    results = run_emulated_nodes(library, *shape, without_the_last, config, case, masked)
    check_results(case, results, masked=(masked,))


def after_four_thousand_million(
    rank: int, buffer: Buffer, case: LowLatencyCase
) -> list[dict[str, Any]]:
    """As `run_case`, while the operations' numbers run out of 32 bits."""
    backend = buffer._session.backend
    first = 2**32 - 4
    half, halves = first // 2, ((first // 2,) * 2,) * 2
    state = header.NodesLowLatencyState(sent=(first, first), received=halves)
    words = torch.frombuffer(bytearray(state), dtype=torch.int32)
    backend.low_latency._state[0, : len(words)] = words
    credits = backend.memory._network_tensor[backend.offsets.low_latency_credits :]
    credits[: 8 * 2 * 2 * case.num_ranks].view(torch.int64).fill_(half)
    results = []
    for _ in range(8):
        got = run_case(rank, buffer, case, "cpu")
        results.append({name: array.copy() for name, array in got.items()})
    buffer.synchronize()
    assert int(backend.low_latency._state[0, 0]) & 0xFFFFFFFF == 2**31 + 4
    return results


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_numbers_of_operations_run_over(library, split):
    case = LowLatencyCase(tokens=(7, 5), split=split)
    config = case.config(timeout_s=30)
    results = run_emulated_nodes(library, 2, 1, after_four_thousand_million, config, case)
    for of_operation in zip(*results, strict=True):
        check_results(case, list(of_operation))
