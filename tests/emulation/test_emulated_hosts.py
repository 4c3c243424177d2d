"""The backend between nodes on several hosts, with kernels on the CPU and an NVSHMEM that is fake.

What is real: how memory is made, mapped and given back, who greets whom, and all operations.
"""

from __future__ import annotations

import pytest
from buffer_cases import check_results, run_case
from cases import Case
from emulated_hosts import run_emulated_hosts
from node_cases import PATIENT, case_of
from virtual_nodes import check_wire_bytes

from ep_comm import Buffer


def run_on_buffer(rank: int, buffer: Buffer, case: Case) -> dict:
    return {**run_case(rank, case, buffer), "text": buffer.describe()}


@pytest.mark.parametrize("shape", [(2, 2), pytest.param((3, 1), marks=pytest.mark.slow)])
def test_operations(library, shape):
    case = case_of(shape)
    results, pes = run_emulated_hosts(library, *shape, run_on_buffer, case.config(**PATIENT), case)
    texts = [result.pop("text") for result in results]
    check_results(case, results, check_wire_bytes)
    num_nodes, size = shape
    rail = ", ".join(map(str, range(1 % size, num_nodes * size, size)))
    assert f"nodes ({num_nodes} of {size} GPUs over NVSHMEM 3.4.5, 4 SMs; " in texts[1 % size]
    assert f"; rail of rank {1 % size}: {rail}, NIC not known; " in texts[1 % size]
    for rank in range(num_nodes * size):
        calls = [call[0] for call in pes.calls if call[1] == rank]
        assert calls == ["allocate", *["raise_flag"] * (num_nodes - 1), "free"]
        # Each greets its rail alone.
        greeted = {call[3] for call in pes.calls if call[:2] == ("raise_flag", rank)}
        assert greeted == {r for r in range(rank % size, num_nodes * size, size) if r != rank}


def greets_alone(rank: int, buffer: Buffer) -> None:
    pass


def test_with_low_latency_all_ranks_greet_all(library):
    config = case_of((2, 2)).config(**PATIENT, low_latency_tokens=4)
    _, pes = run_emulated_hosts(library, 2, 2, greets_alone, config)
    for rank in range(4):
        greeted = {call[3] for call in pes.calls if call[:2] == ("raise_flag", rank)}
        assert greeted == set(range(4)) - {rank}


def one_fails(rank: int, buffer: Buffer, case: Case) -> None:
    run_case(rank, case, buffer)
    if rank == 2:
        buffer._session.backend.give_up()


def test_nobody_frees_where_one_has_failed(library):
    case = case_of((2, 2))
    with pytest.warns(UserWarning, match="keeps the memory of its buffer: rank 2 did not destroy"):
        _, pes = run_emulated_hosts(library, 2, 2, one_fails, case.config(**PATIENT), case)
    assert {call[0] for call in pes.calls} == {"allocate", "raise_flag"}
