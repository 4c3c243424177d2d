"""How a buffer between hosts begins and ends: the network is tried, and memory freed by all."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm._native import header
from ep_comm.backends.nodes.peers import Place
from ep_comm.backends.nvlink.farewell import Farewell
from ep_comm.errors import EPStateError, EPTimeoutError
from ep_comm.job.meeting import values_of
from ep_comm.network.world import World

_POLL_S = 1e-3
_COMES, _KEEPS = "comes", "keeps"


def greet(
    world: World,
    place: Place,
    whom: Sequence[int],
    memory: Tensor,
    offsets: header.NodesOffsets,
    timeout_s: float,
    number: int,
) -> None:
    """Raise a flag at each rank that messages will go to, and wait for theirs.

    Collective, and bounded. So a network that is silent, or that leads elsewhere, is known before
    anything is built on it.

    Args:
        world: How it is reached.
        place: This rank's.
        whom: The other ranks: those of the rail, or all where there is low latency.
        memory: Its network memory, all zero on all ranks.
        offsets: Where things stand in it.
        timeout_s: Bound of the wait.
        number: The buffer's, for errors.

    Raises:
        EPTimeoutError: Names the ranks from which nothing came.
        EPStateError: A message came from another rank than it should.
    """
    first = memory.data_ptr() + offsets.network_greetings
    for rank in whom:
        distance = (rank - place.rank) % place.num_ranks
        world.raise_flag(first + 8 * distance, 1 + place.rank, rank)
    flags = memory[offsets.network_greetings :][: 8 * place.num_ranks].view(torch.int64)
    deadline = time.monotonic() + timeout_s
    while True:
        words = flags.tolist()
        came = {rank: words[(place.rank - rank) % place.num_ranks] for rank in whom}
        if all(came.values()):
            break
        if time.monotonic() > deadline:
            raise EPTimeoutError(
                op="create",
                phase="a first message over the network",
                rank=place.rank,
                late_ranks=tuple(sorted(rank for rank, word in came.items() if not word)),
                epoch=number,
                timeout_s=timeout_s,
            )
        time.sleep(_POLL_S)
    for rank, word in came.items():
        if word != 1 + rank:
            raise EPStateError(
                f"rank {place.rank}: what NVSHMEM brought from rank {rank} says that it is of rank "
                f"{word - 1}: its PEs are not the ranks of the group in order"
            )


class HostsFarewell(Farewell):
    """See `Farewell`. What is said stands in torch.distributed's store.

    NVSHMEM frees memory with all ranks at once, and would wait for one that does not come without a
    bound. So it takes more than knowing that the others write here no more: all must know the same.
    That is one word in the store, which only the first who knows enough can set: free, or who is to
    blame that all memory is kept. Whoever was about to give up just then finds it there, and comes.

    Args:
        store: Where they meet; kept, for the group may be gone by then.
        name: The buffer's, the same on all ranks and of no other one.
        rank, num_ranks: This one, and all.
    """

    def __init__(self, store: dist.Store, name: str, rank: int, num_ranks: int) -> None:
        self.masked: tuple[int, ...] = ()
        self._store = store
        self._word = f"{name}/farewell"
        self._keys = [f"{self._word}/{each}" for each in range(num_ranks)]
        self._rank = rank

    def say(self, frees: bool = True) -> None:
        """Tell all ranks that this one writes to nobody any more, and whether it comes to free."""
        with contextlib.suppress(dist.DistError):  # `wait` then names all others
            self._store.set(self._keys[self._rank], _COMES if frees else _KEEPS)

    def wait(self, timeout_s: float) -> list[int]:
        """Wait until all are known to come, and return whose fault it is where they do not.

        Where the store is gone nobody can be known to come: all others are named.
        """
        try:
            values, late = values_of(self._store, self._keys, timeout_s)
            if not late:
                late = tuple(r for r, word in enumerate(values) if word.decode() != _COMES)
            return json.loads(self._store.compare_set(self._word, "", json.dumps(late)))
        except dist.DistError:
            return [rank for rank in range(len(self._keys)) if rank != self._rank]
