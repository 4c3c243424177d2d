"""What tests of copy engines share, on GPUs and on the CPU."""

from __future__ import annotations

from buffer_cases import run_case
from capacity_cases import exact_and_roomy
from cases import Case
from fp8_cases import dispatch_all_ways

from ep_comm import Buffer

BY_COPY = dict(wire="copy-engine")


def check_dense_bytes(case: Case, topk_idx: list, rank: int, got: dict) -> None:
    """All T rows go to every other rank; a combine brings back what came from each."""
    for other in range(case.num_ranks):
        sent = 0 if other == rank else case.tokens[rank] * case.row_bytes
        assert got["dispatch_wire_bytes"][other] == sent
        hits = sum(
            any(expert >= 0 and expert // case.experts_per_rank == rank for expert in token)
            for token in topk_idx[other]
        )
        returned = 0 if other == rank else hits * case.row_bytes
        assert got["combine_wire_bytes"][other] == returned


def run_on_buffer(rank: int, buffer: Buffer, case: Case) -> dict:
    return run_case(rank, case, buffer)


def fp8_on_buffer(rank: int, buffer: Buffer, case: Case) -> dict:
    return dispatch_all_ways(rank, case, buffer)


def capacity_on_buffer(rank: int, buffer: Buffer, case: Case) -> None:
    exact_and_roomy(rank, case, buffer)
