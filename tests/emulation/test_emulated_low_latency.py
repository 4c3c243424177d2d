"""Low latency over NVLink, with its kernels run on the CPU: no GPU is needed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from buffer_cases import calls_noted
from emulated_ranks import run_emulated_ranks
from emulation.build import LOW_LATENCY, build
from low_latency_cases import (
    LowLatencyCase,
    check_in_turn,
    check_results,
    run_ahead_of_one,
    run_case,
    run_combined_twice,
    run_two_at_once,
    run_unwaited,
)
from low_latency_ranks import (
    after_four_thousand_million,
    rank_one_stays_away,
    with_a_third_dispatch,
    with_experts_twice,
    with_foreign_experts,
    with_other_formats,
    with_other_handles,
    with_weights_on_one_side,
)
from low_latency_suite import (
    CASES,
    CHANGING,
    CHUNKS,
    HARD,
    TWICE,
    TWO_AT_ONCE,
    changing_operations,
)
from mask_cases import FOUR, THREE, check_steps, one_rank_is_late, ranks_go_one_by_one
from node_cases import PATIENT

from ep_comm import Buffer, EPError

TWO = LowLatencyCase(tokens=(7, 5))
SOON = dict(timeout_s=5)


def on_buffer(rank: int, buffer: Buffer, case: LowLatencyCase) -> dict[str, Any]:
    with calls_noted(buffer):
        results = run_case(rank, buffer, case, "cpu")
        buffer.synchronize()
    return results


def check_case(library, case: LowLatencyCase, **how: Any) -> None:
    config = case.config(**PATIENT)
    check_results(case, run_emulated_ranks(library, case.num_ranks, on_buffer, config, case, **how))


@pytest.mark.parametrize("delay_us", [0, pytest.param(20, marks=pytest.mark.e2e)])
@pytest.mark.parametrize("case", [*CASES, *HARD])
def test_named_cases(library, case, delay_us):
    check_case(library, case, delay_us=delay_us)


# A specialised kernel; entries for which shared memory has no room; own rows and others by
# different blocks.
MANY = dict(tokens=(70, 64), max_tokens=70, num_topk=3)
SIZES = [
    pytest.param(dict(tokens=(9, 12), hidden=2048, num_topk=3), 3, id="2048"),
    pytest.param(dict(tokens=(9, 12), hidden=2048, scales="fp32", split=True), 5, id="2048-fp8"),
    pytest.param(dict(**MANY, hidden=512), 3, id="many-tokens"),
    pytest.param(dict(**MANY, hidden=512, weights_with="combine", split=True), 7, id="many-split"),
    pytest.param(
        dict(tokens=(3, 40, 0), max_tokens=40, room=1024, num_topk=9, hidden=128), 2, id="room"
    ),
]


@pytest.mark.parametrize(("sizes", "num_sms"), SIZES)
def test_sizes(library, sizes, num_sms):
    check_case(library, LowLatencyCase(**sizes), num_sms=num_sms)


def random_case(seed: int) -> LowLatencyCase:
    rng = np.random.default_rng(seed)
    most, experts_per_rank = int(rng.choice([1, 5, 33, 80])), int(rng.choice([1, 3, 8, 40]))
    tokens = tuple(int(n) for n in rng.integers(0, most + 1, rng.integers(1, 5)))
    num_experts = len(tokens) * experts_per_rank
    return LowLatencyCase(
        tokens=tokens,
        max_tokens=most,
        room=most + int(rng.integers(0, 3)),
        experts_per_rank=experts_per_rank,
        num_topk=min(num_experts, int(rng.choice([1, 2, 6, 9, 20]))),
        hidden=int(rng.choice([512, 1024, 1536])),
        scales=(None, None, "fp32", "power_of_two", "ue8m0")[rng.integers(5)],
        weights_with=("dispatch", "combine", "both")[rng.integers(3)],
        split=bool(rng.integers(2)),
        drop=float(rng.choice([0, 0.1, 0.7])),
        routing=("uniform", "zipf")[rng.integers(2)],
        idx_dtype=("int64", "int32")[rng.integers(2)],
        seed=seed,
    )


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(60))
def test_random_cases(library, seed):
    check_case(library, random_case(seed), delay_us=10 * (seed % 2), num_sms=2 + seed % 5)


def combined_twice(rank: int, buffer: Buffer, case: LowLatencyCase) -> dict[str, Any]:
    return run_combined_twice(rank, buffer, case, "cpu")


@pytest.mark.parametrize("case", TWICE)
def test_one_dispatch_is_combined_twice(library, case):
    config = case.config(**PATIENT)
    check_results(case, run_emulated_ranks(library, case.num_ranks, combined_twice, config, case))


def two_at_once(rank: int, buffer: Buffer) -> list[dict[str, Any]]:
    return run_two_at_once(rank, buffer, TWO_AT_ONCE, "cpu")


def test_two_results_are_out_at_once_beside_normal_operations(library):
    results = run_emulated_ranks(library, 3, two_at_once, TWO_AT_ONCE[0].config(**PATIENT))
    for number, case in enumerate(TWO_AT_ONCE):
        check_results(case, [of_rank[number] for of_rank in results], times=2 - number)


def changing(rank: int, buffer: Buffer) -> list[dict[str, Any]]:
    return changing_operations(rank, buffer, "cpu")


@pytest.mark.parametrize("delay_us", [0, 50])
def test_changing_operations_of_one_buffer(library, delay_us):
    config = CHANGING[0].config(**PATIENT)
    results = run_emulated_ranks(library, 2, changing, config, delay_us=delay_us)
    for number, case in enumerate(CHANGING):
        check_results(case, [of_rank[number] for of_rank in results])


# ---- Credits -----------------------------------------------------------------------------------


def unwaited(rank: int, buffer: Buffer, case: LowLatencyCase, steps: int) -> list[dict[str, Any]]:
    return run_unwaited(rank, buffer, case, steps, "cpu")


def check_unwaited(library, case: LowLatencyCase, delay_us: int = 20, **config: Any) -> None:
    results = run_emulated_ranks(
        library, case.num_ranks, unwaited, case.config(**{**PATIENT, **config}), case, 6,
        delay_us=delay_us, unwaited=True,
    )  # fmt: skip
    check_in_turn(case, results)


def of_chunks(num_ranks: int, split: bool) -> LowLatencyCase:
    """Weights with a combine that is split, with a dispatch that is not."""
    weights_with = "combine" if split else "dispatch"
    return dataclasses.replace(
        CHUNKS, tokens=CHUNKS.tokens[:num_ranks], split=split, weights_with=weights_with
    )


@pytest.mark.parametrize("num_ranks", [2, 3, pytest.param(4, marks=pytest.mark.e2e)])
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_operations_that_nobody_waits_for(library, num_ranks, split):
    check_unwaited(library, of_chunks(num_ranks, split))


def ahead_of_one(rank: int, buffer: Buffer, case: LowLatencyCase) -> list[dict[str, Any]]:
    return run_ahead_of_one(rank, buffer, case, "cpu")


def check_ahead_of_one(library, case: LowLatencyCase, **config: Any) -> None:
    config = case.config(**{**PATIENT, **config})
    check_in_turn(case, run_emulated_ranks(library, case.num_ranks, ahead_of_one, config, case))


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.e2e)])
@pytest.mark.parametrize("weights_with", ["dispatch", "combine"])
def test_who_is_ahead_does_not_write_over_what_is_read(library, num_ranks, weights_with):
    case = dataclasses.replace(of_chunks(num_ranks, True), weights_with=weights_with)
    check_ahead_of_one(library, case)


def test_a_credit_waits_for_no_credit(library):
    case = dataclasses.replace(TWO, split=True)
    config = case.config(**PATIENT)
    results = run_emulated_ranks(library, 2, with_a_third_dispatch, config, case)
    for of_operation in zip(*results, strict=True):
        check_results(case, list(of_operation))


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_numbers_of_operations_run_over(library, split):
    case = dataclasses.replace(TWO, split=split)
    config = case.config(**PATIENT)
    results = run_emulated_ranks(library, 2, after_four_thousand_million, config, case)
    for of_operation in zip(*results, strict=True):
        check_results(case, list(of_operation))


# ---- Faults ------------------------------------------------------------------------------------


def test_a_late_rank_is_named(library):
    config = TWO.config(timeout_s=1.0)
    message, _ = run_emulated_ranks(library, 2, rank_one_stays_away, config, TWO, unwaited=True)
    assert message.startswith("low_latency_dispatch #1: rank 0 waited 1 s for rank 1 (phase: plan)")


def test_what_is_no_expert_is_dropped(library):
    case = LowLatencyCase(tokens=(12, 9), num_topk=4, drop=0.4)
    config = case.config(**PATIENT)
    check_results(case, run_emulated_ranks(library, 2, with_foreign_experts, config, case))


def test_an_expert_twice_gets_the_row_once(library):
    case = LowLatencyCase(tokens=(12, 9), num_topk=2)
    config = case.config(**PATIENT)
    counts = run_emulated_ranks(library, 2, with_experts_twice, config, case)
    assert sum(map(sum, counts)) == 21


@pytest.mark.parametrize("_", range(5))  # now and then a block sees it before others have begun
def test_combines_of_different_dispatches_are_a_mismatch(library, _):
    config = TWO.config(timeout_s=20)
    for message in run_emulated_ranks(library, 2, with_other_handles, config, TWO):
        assert "different low_latency_combine calls: handles of different dispatches" in message


@pytest.mark.parametrize("_", range(5))
def test_dispatches_in_different_formats_are_a_mismatch(library, _):
    case = dataclasses.replace(TWO, hidden=128)
    for message in run_emulated_ranks(
        library, 2, with_other_formats, case.config(**SOON), case, delay_us=20
    ):
        assert "made different low_latency_dispatch calls" in message


@pytest.mark.parametrize("_", range(5))
def test_weights_that_some_ranks_alone_bring_are_a_mismatch(library, _):
    config = TWO.config(timeout_s=20)
    for message in run_emulated_ranks(library, 2, with_weights_on_one_side, config, TWO):
        assert "made different low_latency_combine calls" in message


# ---- Masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "delay_us"),
    [
        pytest.param(THREE, 0, id="three"),
        pytest.param(THREE, 20, marks=pytest.mark.e2e, id="three-delays"),
        pytest.param(FOUR, 0, marks=pytest.mark.e2e, id="four"),
        pytest.param(FOUR, 20, id="four-delays"),
    ],
)
def test_a_late_rank_is_masked_and_comes_back(library, case, delay_us):
    config, late = case.config(timeout_s=2.0), case.num_ranks - 1
    ranks = run_emulated_ranks(
        library, case.num_ranks, one_rank_is_late, config, case, late, delay_us=delay_us
    )
    masks = check_steps(case, ranks, 30)
    assert masks == [()] * 4 + [(late,)] * 20 + [()] * 6


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_ranks_go_one_by_one(library, split):
    case = LowLatencyCase(
        tokens=(12, 0, 7, 1), hidden=384, scales="fp32", num_topk=6, drop=0.1, split=split
    )
    config = case.config(timeout_s=20.0)
    ranks = run_emulated_ranks(library, 4, ranks_go_one_by_one, config, case)
    masks = check_steps(case, ranks, 15)
    assert masks == [tuple(range(4 - gone, 4)) for gone in (*range(4), 0) for _ in range(3)]


# ---- Controls: what has to fail ----------------------------------------------------------------

FAILS = (AssertionError, EPError, pytest.fail.Exception)  # the last: nothing was raised


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_words_that_come_in_two_halves_give_wrong_results(library, split):
    case = of_chunks(2, split)
    config = case.config(**SOON)
    with pytest.raises(FAILS):
        check_results(case, run_emulated_ranks(library, 2, on_buffer, config, case, torn=True))


def check_one_after_another(library) -> None:
    """Both forms: a fault may show in one of them alone."""
    for split in (False, True):
        check_unwaited(library, of_chunks(2, split), **SOON)


def check_warps_that_are_late(library) -> None:
    check_unwaited(library, of_chunks(2, False), delay_us=300, **SOON)


def check_the_hardest(library) -> None:
    for case in HARD[:2]:
        check_results(case, run_emulated_ranks(library, 4, on_buffer, case.config(**SOON), case))


def check_mismatches(library) -> None:
    for _ in range(10):
        test_dispatches_in_different_formats_are_a_mismatch(library, 0)


def check_ahead(library) -> None:
    check_ahead_of_one(library, of_chunks(2, True), **SOON)


# What is planted: the file, what stands there, what is put there; and what has to find it.
PLANTED = {
    "rows-are-not-put-back": (
        "low_latency/dispatch/receive.cuh",
        "if (has_word) ptx::store_word(from, waiting_word());",
        "",
        check_one_after_another,
    ),
    "sums-are-not-put-back": (
        "low_latency/combine/receive.cuh",
        "ptx::store_word(incoming.slot(memory, operation, at, r), waiting_word());",
        "",
        check_one_after_another,
    ),
    "credits-are-not-heeded": (
        "low_latency/epochs.cuh",
        "if (operation.has_credits) return true;",
        "return true;",
        check_ahead,
    ),
    "credits-are-given-early": (
        "low_latency/epochs.cuh",
        "mine = begin.received(kind, half)",
        "mine = begin.received(kind, half) + 1",
        check_ahead,
    ),
    "counted-before-all-have-read-it": (
        "low_latency/epochs.cuh",
        "ptx::named_barrier(kStateBarrier, num_threads);",
        "",
        check_warps_that_are_late,
    ),
    "words-of-any-epoch": (
        "low_latency/words.cuh",
        "if (word->w == epoch) return true;",
        "return true;",
        check_one_after_another,
    ),
    "rows-of-ones-as-they-are": (
        "low_latency/dispatch/rows.cuh",
        "if (is_waiting(word)) word.x = 0xffff7fffu;",
        "",
        check_the_hardest,
    ),
    "sums-before-their-rows-are-copied": (
        "low_latency/combine/send.cuh",
        "ptx::copy_wait<1>();",
        "",
        check_one_after_another,
    ),
    "headers-of-combines-are-not-looked-at": (
        "low_latency/combine/roles.cuh",
        "if (operation.alive >> r & 1) receive_header(",
        "if (false) receive_header(",
        lambda library: test_combines_of_different_dispatches_are_a_mismatch(library, 0),
    ),
    "who-sees-a-mismatch-tells-nothing": (
        "low_latency/epochs.cuh",
        "abort != 0 && abort != mismatch_of(operation.kind, operation.epoch)",
        "abort != 0",
        check_mismatches,
    ),
}


@pytest.mark.e2e
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(library, tmp_path, name):
    file, piece, instead, check = PLANTED[name]
    check(library)
    with pytest.raises(FAILS):
        check(build(tmp_path, LOW_LATENCY, (file, piece, instead)))
