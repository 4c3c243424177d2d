"""The host's side of the memory that ranks write into each other's."""

from __future__ import annotations

import pytest
import torch

from ep_comm import EPTimeoutError
from ep_comm._native import structs
from ep_comm.backends.nvlink_memory import NodeMemory


@pytest.mark.parametrize("fault", ["none", "before", "in flight", "given up"])
def test_memory_is_given_back_only_without_a_fault(fault, monkeypatch):
    """What is in flight may find that a rank does not come while `free` waits for it."""
    done = []
    memory = NodeMemory.__new__(NodeMemory)
    memory.rank, memory._timeout_s, memory._fault = 0, 2.0, structs.Fault()
    memory.tensor = memory._keep = object()
    memory._wait_for_all = lambda: done.append("waited for all")

    def give_up() -> None:
        memory._fault.code, memory._fault.peer = structs.EP_FAULT_TIMEOUT, 1
        memory._fault.op, memory._fault.phase = structs.EP_OP_COMBINE, structs.EP_PHASE_ROWS

    def synchronize() -> None:
        done.append("synchronized")
        if fault == "in flight":
            give_up()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    if fault == "before":
        give_up()
    memory._is_given_up = False
    if fault == "given up":  # this rank alone knows
        memory.give_up()
    if fault == "in flight":
        with pytest.raises(EPTimeoutError, match="waited 2 s for rank 1"):
            memory.free()
    else:
        memory.free()
    expected = ["synchronized", "waited for all"]
    assert done == expected[: {"in flight": 1, "none": 2}.get(fault, 0)]
    assert (memory.tensor is None) == (memory._keep is None) == (fault == "none")
    memory._fault.code, memory._is_given_up = structs.EP_FAULT_NONE, False  # nothing to leak
