"""The NVSHMEM world of a process: its memory is where the network between nodes reads and writes.

A process has one, and it is joined once: NVSHMEM allocates and frees with all of its ranks, so a
group that is not the whole of it would wait for ranks that never come. It stays until the process
ends. What NVSHMEM does together is not bounded by us; so all ranks meet before, which is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import _native
from ep_comm._native import NvshmemLibrary
from ep_comm.errors import EPError, EPStateError, EPUnsupportedError
from ep_comm.job.meeting import meet
from ep_comm.network.settings import PLACES_OF_A_MESSAGE, NetworkSettings

_ONE_WORLD = "a process has one NVSHMEM world, and a Buffer between hosts needs one of its group"
_joined: World | None = None


class _Word(NamedTuple):
    """What a rank has to say before its group joins a world.

    Attributes:
        problem: Why it cannot use NVSHMEM, or None where it can.
        version: NVSHMEM's, such as "3.4.5".
        ranks: Global ranks of the world that it has joined, by PE; None without one.
        pe, num_pes: Its place in a world that somebody else has initialised; -1 without one.
        unique_id: By which all join; of rank 0 alone, where it has none yet.
    """

    problem: str | None
    version: str = ""
    ranks: tuple[int, ...] | None = None
    pe: int = -1
    num_pes: int = -1
    unique_id: bytes = b""


class World:
    """NVSHMEM among the ranks of a group: PE r is its rank r.

    Args:
        native: Our library for it.
        ranks: Global ranks, by PE.
        version: NVSHMEM's.
        settings: Those that it began with; None where something else has initialised it.
    """

    def __init__(
        self,
        native: NvshmemLibrary,
        ranks: tuple[int, ...],
        version: str,
        settings: NetworkSettings | None,
    ) -> None:
        self.native = native
        self.ranks = ranks
        self.version = version
        self.settings = settings
        self._messages: dict[int, int] = {}  # to a peer, by address of each buffer's memory

    @classmethod
    def of_group(
        cls, group: dist.ProcessGroup, settings: NetworkSettings, timeout_s: float
    ) -> World:
        """Join the world of a group, or return it where it was joined before. Collective.

        The settings go into this process's environment, where NVSHMEM reads them at its start. An
        NVSHMEM that somebody else has initialised keeps its own.

        Raises:
            EPUnsupportedError: A rank cannot use NVSHMEM, or has started it with other settings;
                ranks have different versions of it; or a rank is in another world. On all ranks;
                nothing was allocated.
            EPStateError: NVSHMEM does not start on a rank; has its words. On all ranks that it lets
                go: they wait in it for each other.
            EPTimeoutError: A rank did not come.
        """
        global _joined
        ranks, rank = tuple(dist.get_process_group_ranks(group)), dist.get_rank(group)
        native = _native.load_nvshmem()
        word = _word(native, rank, settings)
        words = meet(group, "join the NVSHMEM world of a group", word, timeout_s).answers
        check_words(ranks, words)
        assert native is not None  # or the word had said so
        if _joined is not None:
            return _joined
        problem = None
        try:
            # Where NVSHMEM is up nobody waits here.
            native.initialize(words[0].unique_id or None, rank, len(ranks))
        except EPError as error:
            problem = str(error)
        answers = meet(group, "use the NVSHMEM world of a group", problem, timeout_s).answers
        for other, text in enumerate(answers):
            if text is not None:
                raise EPStateError(
                    f"rank {other}: NVSHMEM does not start: {text}. ep-comm doctor shows what its "
                    "host has for it, and docs/network.md what is in the way most often"
                )
        _joined = cls(native, ranks, word.version, settings if word.pe < 0 else None)
        return _joined

    def nic(self, place: int) -> str | None:
        """Return the card and port of the rank with this place on its host, where that is known."""
        for entry in (self.settings and self.settings.nic_mapping) or ():
            card, port, count = entry.rsplit(":", 2)
            if place < int(count):
                return f"{card}:{port}"
            place -= int(count)
        return None

    def allocate(
        self, group: dist.ProcessGroup, num_bytes: int, num_messages: int, timeout_s: float
    ) -> Tensor:
        """Allocate memory that the network reaches, at the same address of the heap on each rank.

        Collective. It stays allocated until `free`, whatever becomes of the tensor.

        Args:
            group: All ranks.
            num_bytes: The same on all of them.
            num_messages: The most that what uses the memory has in flight to one peer.
            timeout_s: Bound of each meeting.

        Returns:
            uint8 [num_bytes] on this process's GPU, all zero: on all ranks before it is returned on
            any.

        Raises:
            EPUnsupportedError: A queue pair has no room for its messages beside those of other
                memory that was not freed. On all ranks; nothing was allocated.
            EPStateError: NVSHMEM has no room for it. On all ranks, where any has none.
            EPTimeoutError: A rank did not come.
        """
        full = self._full_reason(num_messages)
        what_for = "allocate the network memory of a Buffer"
        for rank, text in enumerate(meet(group, what_for, full, timeout_s).answers):
            if text is not None:
                raise EPUnsupportedError(f"rank {rank}: {text}")
        problem, tensor = None, None
        try:
            tensor = tensor_at(self.native.allocate(num_bytes), num_bytes)
            tensor.zero_()
            torch.cuda.synchronize()
        except (EPError, RuntimeError) as error:
            problem = str(error)
        problems = meet(group, "use the network memory of a Buffer", problem, timeout_s).answers
        for rank, text in enumerate(problems):
            if text is not None:  # what others have is not freed: that would take this one too
                raise EPStateError(
                    f"rank {rank}: NVSHMEM has no room for {num_bytes} bytes "
                    f"({num_bytes / 2**20:.0f} MiB) of network memory: {text}. {_heap()}"
                )
        assert tensor is not None  # else this rank's own problem was among them
        self._messages[tensor.data_ptr()] = num_messages
        return tensor

    def _full_reason(self, num_messages: int) -> str | None:
        """Return why a queue pair has no room for so many messages more, or None where it has.

        With more in flight than places NVSHMEM's device code waits for one, without a bound. Only
        where GPUs fill the queue: a proxy thread has one of its own. Settings of an NVSHMEM that
        something else has initialised are not known.
        """
        if self.settings is None or not self.settings.ibgda:
            return None
        total = sum(self._messages.values()) + num_messages
        needed, depth = 2 * total * PLACES_OF_A_MESSAGE, self.settings.queue_depth
        if needed <= depth:
            return None
        return (
            f"NVSHMEM_QP_DEPTH is {depth}, and with this Buffer {len(self._messages) + 1} in this "
            f"process need {needed} over IBGDA: set it before the first one is made, or destroy "
            "others before"
        )

    def addresses(self, memory: Tensor, pes: Sequence[int]) -> Sequence[int]:
        """Return no addresses: NVSHMEM's kernels need a PE's number, not its address."""
        return ()

    def raise_flag(self, flag: int, value: int, pe: int) -> None:
        """Set 64 bits in the memory of another PE, on the current stream.

        Args:
            flag: Their address in this PE's own memory: it is the same there.
            value: What to set them to.
            pe: Whose.
        """
        self.native.raise_flag(flag, value, pe, torch.cuda.current_stream().cuda_stream)

    def free(self, tensor: Tensor) -> None:
        """Give memory back. Collective, and not bounded: only where all ranks are known to come."""
        self._messages.pop(tensor.data_ptr(), None)
        self.native.free(tensor.data_ptr())


def check_words(ranks: Sequence[int], words: Sequence[_Word]) -> None:
    """Raise unless ranks can join a world of all of them, or are in it already.

    Args:
        ranks: Their global ranks, by group rank.
        words: What each has to say.

    Raises:
        EPUnsupportedError: Names the rank that cannot.
    """
    for rank, word in enumerate(words):
        if word.problem is not None:
            raise EPUnsupportedError(
                f"the group spans hosts, and rank {rank} cannot use NVSHMEM: {word.problem}. "
                'EPConfig(backend="reference") does without, slowly'
            )
    for rank, word in enumerate(words):
        if word.version != words[0].version:
            raise EPUnsupportedError(
                f"rank 0 has NVSHMEM {words[0].version}, rank {rank} has {word.version}: install "
                "the same on all hosts"
            )
    for rank, word in enumerate(words):
        if word.ranks is not None and word.ranks != tuple(ranks):
            raise EPUnsupportedError(
                f"rank {rank} of the group of ranks {_listed(ranks)} has joined the NVSHMEM world "
                f"of ranks {_listed(word.ranks)}: {_ONE_WORLD}"
            )
        if word.pe >= 0 and (word.pe, word.num_pes) != (rank, len(ranks)):
            raise EPUnsupportedError(
                f"rank {rank} of {len(ranks)} is PE {word.pe} of {word.num_pes} in the NVSHMEM "
                f"that something else has initialised in its process: {_ONE_WORLD}, in its order"
            )
        mine, first = (each.ranks is not None or each.pe >= 0 for each in (word, words[0]))
        if mine != first:
            has, lacks = (rank, 0) if mine else (0, rank)
            raise EPUnsupportedError(
                f"rank {has} has initialised NVSHMEM before, and rank {lacks} has not: {_ONE_WORLD}"
            )


def tensor_at(address: int, num_bytes: int) -> Tensor:
    """Return uint8 [num_bytes] over device memory that is not torch's; nobody frees it."""
    device = torch.device("cuda", torch.cuda.current_device())
    tensor = torch.as_tensor(_DeviceMemory(address, num_bytes), device=device)
    assert tensor.data_ptr() == address  # a copy would be of no use
    return tensor


class _DeviceMemory:
    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _word(native: NvshmemLibrary | None, rank: int, settings: NetworkSettings) -> _Word:
    """Return what this rank has to say; put the settings in place where it has no world yet."""
    if native is None:
        return _Word(_native.nvshmem_unusable_reason() or "")
    version = native.version
    if _joined is not None:
        problem, before = None, _joined.settings
        if before is not None and before.environment() != settings.environment():
            problem = (
                f"it has started with other settings here, and keeps them: {before.describe()}"
            )
        return _Word(problem, version, _joined.ranks)
    try:
        if native.is_up():
            return _Word(None, version, None, *native.world())
        settings.apply()
        unique_id = native.new_id() if rank == 0 else b""
    except EPError as error:
        return _Word(f"it does not start: {error}")
    return _Word(None, version, unique_id=unique_id)


def _heap() -> str:
    size = os.environ.get("NVSHMEM_SYMMETRIC_SIZE", "not set")
    return (
        f"NVSHMEM_SYMMETRIC_SIZE is {size}: raise it where CUDA's virtual memory is off "
        "(NVSHMEM_DISABLE_CUDA_VMM=1). Else the GPU is full: a smaller max_tokens_per_rank needs "
        "less"
    )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
