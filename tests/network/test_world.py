"""The NVSHMEM world of a process: who joins it, who is refused, and its memory. No NVSHMEM here."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fake_nvshmem import HEAP_BYTES, FakeNvshmem, host_tensor_at
from ranks import run_ranks

from ep_comm import EPStateError, EPUnsupportedError, NetworkSettings, _native
from ep_comm.network import world as world_module
from ep_comm.network.settings import MESSAGES_TO_A_PEER, PLACES_OF_A_MESSAGE, messages_of
from ep_comm.network.world import World, _Word, check_words

HERE = _Word(None, "3.4.5")


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (_Word("pip install it"), "rank 1 cannot use NVSHMEM: pip install it. EPConfig"),
        (HERE._replace(version="3.5.19"), "rank 0 has NVSHMEM 3.4.5, rank 1 has 3.5.19"),
        (
            HERE._replace(ranks=(4, 6, 8)),
            "rank 1 of the group of ranks 4, 6 has joined the NVSHMEM world of ranks 4, 6, 8",
        ),
        (HERE._replace(ranks=(6, 4)), "has joined the NVSHMEM world of ranks 6, 4"),
        (HERE._replace(ranks=(4, 6)), "rank 1 has initialised NVSHMEM before, and rank 0 has not"),
        (HERE._replace(pe=0, num_pes=2), "rank 1 of 2 is PE 0 of 2 in the NVSHMEM that something"),
        (HERE._replace(pe=1, num_pes=4), "rank 1 of 2 is PE 1 of 4 in the NVSHMEM that something"),
        (HERE._replace(pe=1, num_pes=2), "rank 1 has initialised NVSHMEM before, and rank 0 has"),
    ],
    ids=[
        "no library", "another version", "larger world", "another order", "joined alone",
        "other PE", "more PEs", "initialised alone",
    ],
)  # fmt: skip
def test_ranks_that_cannot_join(second, text):
    with pytest.raises(EPUnsupportedError, match=text):
        check_words((4, 6), [HERE, second])


def test_ranks_that_can_join():
    check_words((4, 6), [HERE, HERE])
    check_words((4, 6), [HERE._replace(ranks=(4, 6))] * 2)
    check_words((4, 6), [HERE._replace(pe=rank, num_pes=2) for rank in range(2)])


def use(patch: pytest.MonkeyPatch, native: FakeNvshmem | None) -> None:
    """Have this process find that library, and be in no world yet."""
    patch.setattr(_native, "load_nvshmem", lambda: native)
    patch.setattr(world_module, "_joined", None)
    patch.setattr(world_module, "tensor_at", host_tensor_at)
    patch.setattr(torch.cuda, "synchronize", lambda: None)
    patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))


def of(group: dist.ProcessGroup, **settings) -> World:
    return World.of_group(group, NetworkSettings(**settings), 10.0)


def join(rank: int) -> None:
    native = FakeNvshmem()
    everyone = dist.group.WORLD
    first_two = dist.new_group([0, 1])
    with pytest.MonkeyPatch.context() as patch:
        use(patch, native)
        patch.delenv("NVSHMEM_IB_SL", raising=False)
        world = of(everyone, service_level=3, nic_mapping=("mlx5_0:1:2", "mlx5_1:1:1"))
        # The settings are there before NVSHMEM is, and one rank makes the id.
        assert os.environ["NVSHMEM_IB_SL"] == "3"
        assert native.calls == (["new_id", "initialize"] if rank == 0 else ["initialize"])
        assert native.pes.calls[-1] == ("initialize", 0, b"an id with \0 in it", rank, 3)
        assert world.ranks == (0, 1, 2) and world.version == "3.4.5"
        assert [world.nic(place) for place in range(4)] == [
            "mlx5_0:1", "mlx5_0:1", "mlx5_1:1", None,
        ]  # fmt: skip
        # A second buffer of the group is in the same one, with the same settings.
        again = World.of_group(everyone, NetworkSettings.from_environment(), 10.0)
        assert again is world and native.calls.count("initialize") == 1
        with pytest.raises(EPUnsupportedError, match="rank 0 .* started with other settings .* 3"):
            of(everyone, service_level=5)
        assert os.environ["NVSHMEM_IB_SL"] == "3"
        if rank < 2:
            with pytest.raises(
                EPUnsupportedError, match="joined the NVSHMEM world of ranks 0, 1, 2"
            ):
                World.of_group(first_two, NetworkSettings.from_environment(), 10.0)


def test_a_group_joins_once_and_no_other_group_can():
    run_ranks(3, join, fresh=True)


def join_what_is_up(rank: int) -> None:
    native = FakeNvshmem()
    with pytest.MonkeyPatch.context() as patch:
        use(patch, native)
        patch.delenv("NVSHMEM_IB_SL", raising=False)
        native.up = (1 - rank, 2)
        with pytest.raises(EPUnsupportedError, match="rank 0 of 2 is PE 1 of 2 in the NVSHMEM"):
            of(dist.group.WORLD, service_level=3)
        native.up = (rank, 2)
        world = of(dist.group.WORLD, service_level=3)
        assert native.pes.calls == [("initialize", 0, None, rank, 2)]
        assert "NVSHMEM_IB_SL" not in os.environ
        assert world.settings is None and world.nic(0) is None


def test_what_somebody_else_has_initialised_is_joined_in_order_only():
    run_ranks(2, join_what_is_up, fresh=True)


def cannot_join(rank: int) -> list[str]:
    texts, native = [], FakeNvshmem()
    with pytest.MonkeyPatch.context() as patch:
        use(patch, native if rank == 0 else None)
        patch.setattr(_native, "nvshmem_unusable_reason", lambda: "install ep_comm[nvshmem-cu13]")
        with pytest.raises(EPUnsupportedError) as caught:
            of(dist.group.WORLD)
        texts.append(str(caught.value))
        assert native.calls in ([], ["new_id"])  # nobody has begun what the other does not
        patch.setattr(_native, "load_nvshmem", lambda: native)
        if rank == 0:
            native.fails["new_id"] = "no interface eth9"
        with pytest.raises(EPUnsupportedError) as caught:
            of(dist.group.WORLD)
        texts.append(str(caught.value))
        native.fails = {"initialize": "transport ibrc: no device"} if rank == 1 else {}
        with pytest.raises(EPStateError) as caught:
            of(dist.group.WORLD)
        texts.append(str(caught.value))
        assert "allocate" not in native.calls and world_module._joined is None
    return texts


def test_why_nvshmem_cannot_be_used_is_said():
    for texts in run_ranks(2, cannot_join, fresh=True):
        assert "rank 1 cannot use NVSHMEM: install ep_comm[nvshmem-cu13]" in texts[0]
        assert (
            "rank 0 cannot use NVSHMEM: it does not start: libep_comm_nvshmem: no int" in texts[1]
        )
        assert "rank 1: NVSHMEM does not start: libep_comm_nvshmem: transport ibrc" in texts[2]


def allocate(rank: int) -> str:
    native, group = FakeNvshmem(), dist.group.WORLD
    with pytest.MonkeyPatch.context() as patch:
        use(patch, native)
        world = of(group, symmetric_size=1 << 25)
        tensor = world.allocate(group, 1000, 120, 10.0)
        assert tensor.dtype == torch.uint8 and tensor.shape == (1000,) and not tensor.any()
        # It is the heap's, which lives on without the tensor.
        tensor[3] = 9
        assert native.pes.heaps[0][3] == 9
        world.raise_flag(tensor.data_ptr() + 8, 41, 0)
        assert tensor[8:16].view(torch.int64).item() == 41
        world.free(tensor)
        assert native.calls[-2:] == ["raise_flag", "free"]
        if rank == 1:
            native._taken = HEAP_BYTES - 100  # others have room
        with pytest.raises(EPStateError) as caught:
            world.allocate(group, 5 << 20, 120, 10.0)
    return str(caught.value)


def test_memory_of_the_heap():
    for text in run_ranks(2, allocate, fresh=True):
        assert text.startswith("rank 1: NVSHMEM has no room for 5242880 bytes (5 MiB) of network")
        assert "nvshmem_align: out of memory. NVSHMEM_SYMMETRIC_SIZE is 33554432: raise it" in text


def messages(rank: int) -> str:
    """Room for two buffers, one of them with low latency, on rank 0; on rank 1 one is left over."""
    native, group = FakeNvshmem(), dist.group.WORLD
    needed = 2 * PLACES_OF_A_MESSAGE * (messages_of(True) + messages_of(False))
    with pytest.MonkeyPatch.context() as patch:
        use(patch, native)
        world = of(group, ibgda=True, queue_depth=needed)
        first = world.allocate(group, 1000, messages_of(True), 10.0)
        second = world.allocate(group, 1000, messages_of(False), 10.0)
        world.free(second)
        second = world.allocate(group, 1000, messages_of(False), 10.0)  # others' are given back
        if rank == 0:
            world.free(first)
        num_calls = len(native.calls)
        with pytest.raises(EPUnsupportedError) as caught:
            world.allocate(group, 1000, messages_of(False), 10.0)
        assert len(native.calls) == num_calls  # nothing was allocated, on rank 0 neither
        # A proxy thread has a queue of its own.
        world.settings = NetworkSettings(queue_depth=needed)
        world.allocate(group, 1000, messages_of(True), 10.0)
    return str(caught.value)


def test_messages_of_all_buffers_fit_a_queue_pair():
    assert messages_of(True) == MESSAGES_TO_A_PEER == messages_of(False) + 20
    for text in run_ranks(2, messages, fresh=True):
        assert text.startswith(
            "rank 1: NVSHMEM_QP_DEPTH is 1760, and with this Buffer 3 in this process need 2560 "
            "over IBGDA: set it before the first one is made"
        )
