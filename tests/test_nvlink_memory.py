"""The host's side of the memory that ranks write into each other's."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from ep_comm._native import structs
from ep_comm.backends.nvlink_memory import NodeMemory


@pytest.mark.parametrize("fault", ["none", "before", "in flight"])
def test_memory_is_given_back_only_without_a_fault(fault, monkeypatch):
    """What is in flight may find that a rank does not come while `free` waits for it."""
    memory = mock.Mock(spec=NodeMemory, _fault=structs.Fault(), _wait_for_all=mock.Mock())
    memory.tensor = memory._keep = object()
    type(memory).has_fault = NodeMemory.has_fault

    def give_up() -> None:
        memory._fault.code = structs.EP_FAULT_TIMEOUT

    if fault == "before":
        give_up()
    synchronize = give_up if fault == "in flight" else lambda: None
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    NodeMemory.free(memory)
    assert memory._wait_for_all.called == (fault == "none")
    assert (memory.tensor is None) == (memory._keep is None) == (fault == "none")
