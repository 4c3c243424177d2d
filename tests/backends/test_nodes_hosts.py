"""The beginning and the end of a buffer between hosts. Nothing here needs a GPU or a network."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fake_nvshmem import FakeNvshmem, FakePes
from ranks import run_ranks

from ep_comm import EPStateError, EPTimeoutError
from ep_comm._native import header
from ep_comm.backends.nodes.hosts import HostsFarewell, greet
from ep_comm.backends.nodes.memory import NodesMemory
from ep_comm.backends.nodes.peers import Place
from ep_comm.job.meeting import meet
from ep_comm.job.store import default_store
from ep_comm.network.world import World


def parted(words: list[str], timeout_s: float = 20.0) -> list[list[int]]:
    """What each rank finds that waits, where the others have said this ("" is nothing)."""
    store = dist.HashStore()
    ranks = [HostsFarewell(store, "buffer", rank, len(words)) for rank in range(len(words))]
    for rank, word in zip(ranks, words, strict=True):
        if word:
            rank.say(word == "frees")
    waiting = [rank for rank, word in zip(ranks, words, strict=True) if word == "frees"]
    with ThreadPoolExecutor(len(words)) as pool:
        return list(pool.map(lambda rank: rank.wait(timeout_s), waiting))


def test_memory_is_freed_by_all_or_by_none():
    assert parted(["frees"] * 3) == [[]] * 3
    assert parted(["frees", "keeps", "frees"]) == [[1]] * 2  # at once
    assert parted(["frees", "", "keeps", "frees"], 0.3) == [[1]] * 2


def test_who_gives_up_last_learns_what_the_others_have_done():
    """Rank 1 comes when rank 0 has given up: it keeps its memory too, and the other way round."""
    store = dist.HashStore()
    first, second = (HostsFarewell(store, "buffer", rank, 2) for rank in range(2))
    first.say(True)
    assert first.wait(0.2) == [1]
    second.say(True)
    assert second.wait(20) == [1]
    # Rank 0 sees that all come; rank 1 would have given up at this moment.
    store = dist.HashStore()
    first, second = (HostsFarewell(store, "buffer", rank, 2) for rank in range(2))
    for rank in (first, second):
        rank.say(True)
    assert first.wait(20) == []
    store.delete_key("buffer/farewell/0")  # as if it had come too late for rank 1
    assert second.wait(0.2) == []


class GoneStore(dist.HashStore):
    def set(self, key, value) -> None:
        raise dist.DistNetworkError("broken pipe")

    def wait(self, keys, timeout) -> None:
        raise dist.DistNetworkError("connection reset by peer")


def test_nobody_frees_when_the_store_is_gone():
    farewell = HostsFarewell(GoneStore(), "buffer", 1, 3)
    farewell.say(True)
    assert farewell.wait(20) == [0, 2]


def memory_of_two(rank: int, fault: str) -> tuple[bool, list[str]]:
    """Free the memory of a buffer on two hosts, and return whether NVSHMEM's was freed."""
    native = FakeNvshmem()
    world = World(native, (0, 1), "3.4.5", None)
    meeting = meet(None, "make a Buffer", None, 10.0)
    store = default_store()
    memory = NodesMemory.__new__(NodesMemory)
    memory.rank, memory._timeout_s, memory._fault = rank, 2.0, header.Fault()
    memory.world, memory._is_given_up = world, False
    memory.tensor = memory._keep = object()
    memory._network_tensor = torch.zeros(8, dtype=torch.uint8)
    memory._farewell = HostsFarewell(store, meeting.name, rank, 2)
    memory.place = Place(rank, 1, 2)

    def synchronize() -> None:
        if rank == 1 and fault == "in flight":
            memory._fault.code, memory._fault.op = header.EP_FAULT_TIMEOUT, header.EP_OP_COMBINE
            memory._fault.phase, memory._fault.peer = header.EP_PHASE_ROWS, 1

    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", synchronize)
        if rank == 1 and fault == "given up":
            memory.give_up()
        if rank == 1 and fault in ("given up", "none"):
            memory.free()
        elif rank == 1:
            with pytest.raises(EPTimeoutError, match="waited 2 s for rank 0"):
                memory.free()
        elif fault == "none":
            memory.free()
            memory.free()
        else:
            with pytest.warns() as caught:
                memory.free()
            texts = [str(each.message) for each in caught]
    was_freed = memory._network_tensor is None
    memory._fault.code, memory._is_given_up = header.EP_FAULT_NONE, False  # nothing to leak
    assert native.calls == (["free"] if was_freed else [])
    return was_freed, texts


@pytest.mark.parametrize("fault", ["none", "given up", "in flight"])
def test_memory_of_a_failed_buffer_stays(fault):
    (first, texts), (second, _) = run_ranks(2, memory_of_two, fault)
    assert first == second == (fault == "none")
    assert not texts if fault == "none" else "keeps the memory of its buffer: rank 1" in texts[0]


def greeted(
    silent: bool = False,
    timeout_s: float = 20.0,
    swapped: bool = False,
    lost: tuple[int, int] | None = None,
    ranks_per_node: int = 1,
) -> list:
    """Four ranks, on a node each or on two; with two they all greet all.

    Rank 2 may send nothing, 1 and 2 may be each other's PEs, and nothing may get from one rank to
    another.
    """
    pes = FakePes(4)
    offsets = header.NodesOffsets(network_greetings=512)

    def greets(rank: int) -> str:
        native = FakeNvshmem(pes, rank)
        memory = pes.heaps[rank][:1024]
        if silent and rank == 2:
            native.raise_flag = lambda *args: None
        if lost is not None and rank == lost[0]:
            arrives = native.raise_flag
            native.raise_flag = lambda flag, value, pe, stream: (
                pe == lost[1] or arrives(flag, value, pe, stream)
            )
        if swapped:
            swap, send = {1: 2, 2: 1}, native.raise_flag
            native.raise_flag = lambda flag, value, pe, stream: send(
                flag, value, swap.get(pe, pe), stream
            )
        try:
            place = Place(rank, ranks_per_node, 4 // ranks_per_node)
            greet(
                World(native, (0, 1, 2, 3), "3.4.5", None), place,
                place.rail[1:] if ranks_per_node == 1 else place.others, memory, offsets,
                timeout_s, 6,
            )  # fmt: skip
        except (EPStateError, EPTimeoutError) as error:
            return str(error)
        return ""

    for heap in pes.heaps:
        heap[:1024] = 0
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        stream = SimpleNamespace(cuda_stream=1)
        patch.setattr(torch.cuda, "current_stream", lambda: stream)
        return list(pool.map(greets, range(4)))


def test_the_network_is_tried_before_it_is_used():
    assert greeted() == [""] * 4
    start = time.monotonic()
    texts = greeted(silent=True, timeout_s=0.5)
    assert time.monotonic() - start < 10
    assert texts[2] == ""  # it hears the others
    assert texts[3].startswith(
        "create #6: rank 3 waited 0.5 s for rank 2 (phase: a first message over the network). "
        "There is no buffer"
    )


def test_a_way_across_rails_that_low_latency_needs_is_tried():
    """From the second card of one host to the first of another nothing gets through."""
    assert greeted(ranks_per_node=2) == [""] * 4
    texts = greeted(ranks_per_node=2, lost=(1, 2), timeout_s=0.5)
    assert [bool(text) for text in texts] == [False, False, True, False]
    assert "rank 2 waited 0.5 s for rank 1 (phase: a first message over the network)" in texts[2]


def test_a_world_in_another_order_is_found_out():
    assert any("its PEs are not the ranks of the group in order" in text for text in greeted(
        swapped=True, timeout_s=1.0
    ))  # fmt: skip
