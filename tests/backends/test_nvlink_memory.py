"""The host's side of the memory that ranks write into each other's."""

from __future__ import annotations

import ctypes
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ep_comm import EPOverflowError, EPStateError, EPTimeoutError, EPTooManyTokensError
from ep_comm._native import header
from ep_comm.backends.nvlink import mapping
from ep_comm.backends.nvlink.farewell import Farewell
from ep_comm.backends.nvlink.mapping import allocated_by_all
from ep_comm.backends.nvlink.memory import PeerMemory
from ep_comm.job.meeting import meet
from ep_comm.telemetry.device import RecordAddresses
from ep_comm.telemetry.watch import Wait


@pytest.mark.parametrize("fault", ["none", "before", "in flight", "given up", "late rank"])
def test_memory_is_given_back_only_without_a_fault(fault, monkeypatch):
    """What is in flight may find that a rank does not come while `free` waits for it."""
    done = []

    class Watched:
        def say(self, frees: bool) -> None:
            done.append("said farewell" + " and comes" * frees)

        def wait(self, timeout_s: float) -> list[int]:
            done.append(f"waited {timeout_s:g} s at most")
            return [1, 3] if fault == "late rank" else []

    memory = PeerMemory.__new__(PeerMemory)
    memory.rank, memory._timeout_s, memory._fault = 0, 2.0, header.Fault()
    memory.tensor = memory._keep = object()
    memory._farewell = Watched()

    def give_up() -> None:
        memory._fault.code, memory._fault.peer = header.EP_FAULT_TIMEOUT, 1
        memory._fault.op, memory._fault.phase = header.EP_OP_COMBINE, header.EP_PHASE_ROWS

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
    elif fault == "late rank":
        with pytest.warns(match="rank 0 keeps the memory of its buffer: rank 1, 3 did not .* 2 s"):
            memory.free()
    else:
        memory.free()
        if fault == "none":
            memory.free()  # a second time is nothing
    # Whatever happened to this rank, the others need not wait for it.
    comes = " and comes" if fault in ("none", "late rank") else ""
    assert done[:3] == ["synchronized", f"said farewell{comes}", "synchronized"]
    waits = fault in ("none", "late rank")
    assert done[3:] == (["waited 2 s at most"] if waits else [])
    assert (memory.tensor is None) == (memory._keep is None) == (fault == "none")
    memory._fault.code, memory._is_given_up = header.EP_FAULT_NONE, False  # nothing to leak


def test_a_broken_gpu_does_not_keep_a_failed_buffer_from_being_destroyed(monkeypatch):
    memory = PeerMemory.__new__(PeerMemory)
    memory._fault, memory._is_given_up = header.Fault(), True

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    memory._farewell = Farewell(0, [])
    memory.free()
    memory._is_given_up = False
    with pytest.raises(RuntimeError, match="illegal memory access"):
        memory.free()


def test_long_waits_are_read_from_host_memory():
    memory = PeerMemory.__new__(PeerMemory)
    memory._fault, memory._is_given_up = header.Fault(), False
    memory._progress = progress = header.Progress()
    assert memory.waits() == []
    progress.combine[7] = header.EP_PHASE_ROWS << 32 | 12
    progress.dispatch[1] = header.EP_PHASE_PLAN << 32 | 2**32 - 1
    progress.dispatch[3] = header.EP_PHASE_CREDIT << 32 | 0
    assert memory.waits() == [
        Wait(op="dispatch", phase="plan", epoch=2**32 - 1, rank=1),
        Wait(op="dispatch", phase="credit", epoch=1, rank=3),  # which operation 1 waits for
        Wait(op="combine", phase="rows", epoch=12, rank=7),
    ]
    progress.dispatch[1] = progress.dispatch[3] = progress.combine[7] = 0
    assert memory.waits() == []


def test_each_kind_of_operation_has_its_words(monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=None, **how: zeros(*size, **how))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    memory = PeerMemory(1, zeros(1), [1, 2], 2.0, None, Farewell(1, []))
    for op, name in ((header.EP_OP_DISPATCH, "dispatch"), (header.EP_OP_COMBINE, "combine")):
        words = (ctypes.c_int64 * 2).from_address(memory.peers(op, RecordAddresses(0, 0)).progress)
        words[0] = header.EP_PHASE_ROWS << 32 | 5  # as a kernel would
        assert memory.waits() == [Wait(name, "rows", 5, 0)]
        words[0] = 0
    assert memory.waits() == [] and not memory.has_fault and memory.mailbox.ticket == 0


def test_a_masked_rank_is_not_told_and_its_memory_not_touched():
    flags_of = [torch.zeros(3, dtype=torch.int32) for _ in range(3)]
    farewell = Farewell(0, flags_of)
    farewell.masked = (1,)
    farewell.say()
    assert [flags.tolist() for flags in flags_of] == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_memory_begins_anew_when_ranks_are_masked(monkeypatch):
    """As it was at first, and to be freed only once no rank is masked any more."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=None, **how: zeros(*size, **how))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    offsets = header.BufferOffsets(low_latency_dispatch=64, total=128)
    tensor = torch.full((128,), 7, dtype=torch.uint8)
    memory = PeerMemory(1, tensor, [1, 2, 3], 2.0, None, Farewell(1, [zeros(3)] * 3))
    memory._fault.op, memory._fault.code = header.EP_OP_COMBINE, header.EP_FAULT_TIMEOUT
    memory._fault.phase = header.EP_PHASE_ROWS
    memory._notice.code, memory.mailbox.ticket = header.EP_NOTICE_OVERFLOW, 5
    memory._progress.combine[2] = header.EP_PHASE_ROWS << 32 | 12
    memory.has_diverged = True
    memory.give_up()
    on_device = (memory.counters, memory._epochs, memory._waits, memory.abort)
    for counts in on_device:
        counts.fill_(3)
    for masked in ((0,), ()):
        memory.restart(offsets, masked)
        memory.check()
        assert memory.waits() == [] and memory.mailbox.ticket == 0 and not memory.has_diverged
        assert not any(counts.any() for counts in on_device)
        assert not tensor[:64].any() and (tensor[64:] == 0xFF).all()
        assert memory._farewell.masked == masked and memory._may_be_written_to == bool(masked)


def test_farewell_waits_for_all_and_names_who_is_late():
    flags_of = [torch.zeros(3, dtype=torch.int32) for _ in range(3)]
    farewells = [Farewell(rank, flags_of) for rank in range(3)]
    farewells[1].say()
    assert farewells[0].wait(0.05) == [0, 2]
    farewells[0].say()
    last = threading.Timer(0.1, farewells[2].say)
    start = time.monotonic()  # before the timer's thread: this one may be held up behind it
    last.start()
    assert farewells[0].wait(20) == [] and 0.05 < time.monotonic() - start < 10
    last.join()  # it has told rank 0 first
    assert farewells[1].wait(0) == farewells[2].wait(0) == []


def one_rank_has_no_memory(rank: int) -> str:
    def allocate() -> torch.Tensor:
        if rank == 1:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 339.00 MiB.")
        return torch.zeros(4)

    with pytest.raises(EPStateError) as caught:
        allocated_by_all(None, allocate, 10.0)
    assert torch.equal(allocated_by_all(None, lambda: torch.ones(3), 10.0), torch.ones(3))
    return str(caught.value)


def test_memory_that_one_rank_lacks_is_said_on_all():
    for message in run_ranks(3, one_rank_has_no_memory):
        assert message.startswith("rank 1 cannot allocate the memory of a buffer: out of memory.")


def test_too_many_tokens_that_nobody_waited_for_end_the_buffer(monkeypatch):
    """Some ranks may have begun another operation by then; an overflow concerns one rank alone."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=None, **how: zeros(*size, **how))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    memory = PeerMemory(1, zeros(1), [1, 2], 2.0, None, Farewell(1, []))
    notice = memory._notice
    notice.num_rows, notice.capacity, notice.code = 9, 4, header.EP_NOTICE_OVERFLOW
    with pytest.raises(EPOverflowError, match="received 9 rows"):
        memory.check()
    memory.check()  # said once
    assert not memory.has_diverged
    notice.asked_tokens[1], notice.capacity, notice.code = 12, 8, header.EP_NOTICE_TOO_MANY
    with pytest.raises(EPTooManyTokensError) as caught:
        memory.check()
    assert (caught.value.num_tokens, caught.value.max_tokens) == ((0, 12), 8)
    assert memory.has_diverged and not memory.has_fault


def memory_of_a_group(rank: int) -> list[int]:
    """What is done on GPUs, with memory of the host: allocate, meet, map, meet."""
    import torch.distributed._symmetric_memory as symmetric_memory

    zeros, tensors = torch.zeros, []
    offsets = header.BufferOffsets(farewells=256, low_latency_dispatch=3072, total=4096)

    def allocate(num_bytes: int, **_) -> torch.Tensor:
        tensors.append(torch.full((num_bytes,), 7, dtype=torch.uint8))
        return tensors[0]

    mapped = SimpleNamespace(buffer_ptrs=[100, 200], get_buffer=lambda r, *_: tensors[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *size, pin_memory=None, **how: zeros(*size, **how))
        for name in ("synchronize", "current_device"):
            patch.setattr(torch.cuda, name, lambda: 0)
        patch.setattr(symmetric_memory, "empty", allocate)
        patch.setattr(mapping, "_mapped", lambda tensor, name, rank, num_ranks: mapped)
        meeting = meet(None, "make a Buffer", None, 10.0)
        memory = PeerMemory.of_group(dist.group.WORLD, meeting, offsets, 10.0)
    assert not memory.tensor[:3072].any() and (memory.tensor[3072:] == 0xFF).all()
    assert (memory.rank, memory.num_ranks) == (rank, 2)
    return memory._addresses[:2]


def test_memory_of_a_group_is_mapped_when_all_have_theirs():
    assert run_ranks(2, memory_of_a_group) == [[100, 200]] * 2
