"""Memory of a rank between nodes: what its node's ranks write into, and the network."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm._native import NativeLibrary, header
from ep_comm.backends.nodes.hosts import HostsFarewell, greet
from ep_comm.backends.nodes.peers import Place
from ep_comm.backends.nvlink.farewell import Farewell
from ep_comm.backends.nvlink.mapping import map_memory
from ep_comm.backends.nvlink.memory import (
    HOST_STRIDE,
    NUM_OPS,
    Notice,
    PeerMemory,
    farewell_flags,
)
from ep_comm.config import EPConfig
from ep_comm.job.meeting import Meeting, meet
from ep_comm.job.store import default_store
from ep_comm.network.settings import messages_of
from ep_comm.network.world import World
from ep_comm.numeric import round_up

_DIRECT_OPS = (header.EP_OP_LOW_LATENCY_DISPATCH, header.EP_OP_LOW_LATENCY_COMBINE)


def nodes_offsets(
    native: NativeLibrary, config: EPConfig, num_nodes: int, ranks_per_node: int
) -> header.NodesOffsets:
    """Return where things stand in the memory of every rank; the same on all ranks.

    With N nodes of L ranks, S = max_tokens_per_rank, rows of B bytes and K = num_topk it is mostly
    4 (L - 1) S B bytes for NVLink, 4 (N - 1) S B for the network, 4 N L S K for plans. Low latency
    adds 8 N L M rows of hidden BF16 elements to the network, with M = low_latency_tokens.
    """
    return native.nodes_offsets(
        header.NodesLayoutArgs(
            max_tokens=config.max_tokens_per_rank,
            row_bytes=config.hidden * config.dtype.itemsize,
            num_topk=config.num_topk,
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            low_latency_tokens=config.low_latency_tokens or 0,
            hidden=config.hidden,
        )
    )


class NodesMemory(PeerMemory):
    """See `PeerMemory`; with network memory besides.

    Args:
        place: This rank's.
        tensor: Its memory for its node's ranks, all zero.
        addresses: That of every rank of its node, as mapped here.
        network: Its network memory, all zero.
        of_ranks: Address of the network memory of every rank, as kernels here reach it; none over
            NVSHMEM, whose kernels know a rank by its number.
        timeout_s: Bound of every wait.
        keep: An object that has to live as long as the mapping.
        farewell: How the ranks of all nodes part.
        queue: Address of an ``ep_network_queue``, for tests, or 0.
        world: Whose the network memory is; None where it is torch's.
    """

    @classmethod
    def of_one_host(
        cls,
        group: dist.ProcessGroup,
        meeting: Meeting,
        offsets: header.NodesOffsets,
        ranks_per_node: int,
        timeout_s: float,
    ) -> NodesMemory:
        """Make memory at each rank of one host, where stores over NVLink are the network.

        Collective, and bounded.
        """
        num_ranks = dist.get_world_size(group)
        place = Place(dist.get_rank(group), ranks_per_node, num_ranks // ranks_per_node)
        num_bytes = offsets.total + offsets.network_total
        mapped = map_memory(group, meeting, num_bytes, timeout_s)
        mapped.own.zero_()
        # It is so everywhere before anybody writes a flag.
        torch.cuda.synchronize()
        meet(group, "use the memory of a Buffer", None, timeout_s)
        flags_of = [farewell_flags(each, offsets, num_ranks) for each in mapped.of_rank]
        return cls(
            place,
            mapped.own,
            [mapped.addresses[rank] for rank in place.neighbours],
            mapped.own[offsets.total :],
            [address + offsets.total for address in mapped.addresses],
            timeout_s,
            mapped.keep,
            Farewell(place.rank, flags_of),
        )

    @classmethod
    def of_hosts(
        cls,
        group: dist.ProcessGroup,
        meeting: Meeting,
        world: World,
        offsets: header.NodesOffsets,
        ranks_per_node: int,
        timeout_s: float,
        has_low_latency: bool,
    ) -> NodesMemory:
        """Make memory at each rank of several hosts, and try the network.

        Collective. All that we wait for is bounded; NVSHMEM allocates between two meetings.

        Raises:
            EPUnsupportedError: The messages of this process's buffers do not fit a queue pair.
            EPStateError: A rank has no memory for it, or the network leads elsewhere.
            EPTimeoutError: Names ranks that did not come, or from which the network brings nothing.
        """
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        place = Place(rank, ranks_per_node, num_ranks // ranks_per_node)
        mapped = map_memory(group, meeting, offsets.total, timeout_s, ranks_per_node)
        mapped.own.zero_()
        # When this returns, it is so everywhere.
        num_messages = messages_of(has_low_latency)
        network = world.allocate(group, offsets.network_total, num_messages, timeout_s)
        whom = place.others if has_low_latency else place.rail[1:]
        greet(world, place, whom, network, offsets, timeout_s, meeting.number)
        return cls(
            place,
            mapped.own,
            mapped.addresses,
            network,
            world.addresses(network, range(num_ranks)),
            timeout_s,
            mapped.keep,
            HostsFarewell(default_store(), meeting.name, rank, num_ranks),
            world=world,
        )

    def __init__(
        self,
        place: Place,
        tensor: Tensor,
        addresses: Sequence[int],
        network: Tensor,
        of_ranks: Sequence[int],
        timeout_s: float,
        keep: object,
        farewell: Farewell,
        queue: int = 0,
        world: World | None = None,
    ) -> None:
        self.place = place
        self.world = world
        self._network_tensor: Tensor | None = network
        # For low latency every rank is a node of its own.
        alone = Place(place.rank, 1, place.num_ranks)
        self._rails = [
            torch.tensor(
                [of_ranks[rank] for rank in each.rail if of_ranks],
                dtype=torch.int64,
                device=tensor.device,
            )
            for each in (place, alone)
        ]
        super().__init__(place.rank, tensor, addresses, timeout_s, keep, farewell)
        waves = place.num_nodes
        self.wave_counters = torch.zeros(waves, dtype=torch.int32, device=tensor.device)
        self.combine_counters = torch.zeros(
            header.EP_NODES_COMBINE_COUNTERS + waves * header.EP_NODES_COMBINE_WAVE_COUNTERS,
            dtype=torch.int32,
            device=tensor.device,
        )
        self._line = torch.zeros(1, dtype=torch.int64, device=tensor.device)

        def network_of(place: Place, rail: Tensor) -> header.Network:
            return header.Network(
                memory=network.data_ptr(),
                memory_of=rail.data_ptr(),
                queue=queue,
                free_at_ns=self._line.data_ptr(),
                num_nodes=place.num_nodes,
                node=place.node,
                pe_stride=place.ranks_per_node,
                pe_first=place.local_rank,
            )

        self.network = network_of(place, self._rails[0])
        self.network_of_ranks = network_of(alone, self._rails[1])

    def _set_place(self, rank: int, num_local_ranks: int) -> None:
        self.rank, self._local_rank = rank, self.place.local_rank
        self.num_ranks, self._num_local_ranks = self.place.num_ranks, num_local_ranks

    def _rank_of(self, peer: int) -> int:
        return self.place.rank_of(peer)

    def _late_ranks(self, peer: int) -> tuple[int, ...]:
        # What another node's rank sends comes through the rank of this node with its number; but
        # low-latency messages come from whoever sent them.
        distance, local_rank = divmod(peer, self.place.ranks_per_node)
        late = self.place.rank_of(peer)
        is_direct = self._fault.op in _DIRECT_OPS
        if is_direct or distance == 0 or local_rank == self.place.local_rank:
            return (late,)
        return (late, self.place.neighbours[local_rank])

    def _allocate_host(self) -> Tensor:
        num_ranks = self.num_ranks
        notice_bytes = 4 * (header.EP_NODES_NOTICE_ASKED + num_ranks)
        progress_bytes = 8 * NUM_OPS * num_ranks
        mailbox_ints = (
            header.EP_NODES_MAILBOX_COUNTS
            + 3 * num_ranks
            + self.place.num_nodes
            + header.EP_MAX_LOCAL_EXPERTS
        )
        starts, total = [], 0
        for size in (ctypes.sizeof(header.Fault), notice_bytes, progress_bytes, 4 * mailbox_ints):
            starts.append(total)
            total += round_up(size, HOST_STRIDE)
        host = torch.zeros(total, dtype=torch.uint8, device="cpu", pin_memory=True)
        addresses = [host.data_ptr() + start for start in starts]
        self.fault_address, self.notice_address = addresses[:2]
        self._progress_address, self.mailbox_address = addresses[2:]
        self._fault = header.Fault.from_address(self.fault_address)
        self._nodes_notice = (ctypes.c_int32 * (notice_bytes // 4)).from_address(
            self.notice_address
        )
        self._words = [
            (ctypes.c_int64 * num_ranks).from_address(self._progress_of(op))
            for op in range(NUM_OPS)
        ]
        self.counts = (ctypes.c_int32 * mailbox_ints).from_address(self.mailbox_address)
        return host

    def _progress_of(self, op: int) -> int:
        return self._progress_address + 8 * op * self.num_ranks

    def _progress_words(self, op: int) -> Iterable[int]:
        return self._words[op]

    @property
    def _has_notice(self) -> bool:
        return self._nodes_notice[0] != header.EP_NOTICE_NONE

    def _take_notice(self) -> Notice:
        left = list(self._nodes_notice)
        self._nodes_notice[0] = header.EP_NOTICE_NONE
        return Notice(
            left[0],
            tuple(left[header.EP_NODES_NOTICE_ERROR :][:4]),
            left[header.EP_NODES_NOTICE_ROWS],
            left[header.EP_NODES_NOTICE_CAPACITY],
            tuple(left[header.EP_NODES_NOTICE_ASKED :]),
        )

    def free(self) -> None:
        """Give the memory back, as `PeerMemory.free` does, and that of the network with it."""
        super().free()
        if self.tensor is not None or self._network_tensor is None:
            return
        network, self._network_tensor = self._network_tensor, None
        if self.world is not None:
            self.world.free(network)  # all ranks have said that they come
