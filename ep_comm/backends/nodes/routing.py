"""The index arrays of one routing between nodes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ep_comm._native import header
from ep_comm.backends.nodes.peers import Place
from ep_comm.backends.nvlink.routing import NVLinkRouting, entry_size
from ep_comm.numeric import round_up


def relay_ints(ranks_per_node: int, num_topk: int) -> int:
    """Return the int32 numbers of a relay entry."""
    return ranks_per_node + num_topk


@lru_cache(maxsize=64)
def arena_places(
    num_tokens: int,
    num_topk: int,
    num_entries: int,
    num_relay_entries: int,
    max_tokens: int,
    ranks_per_node: int,
    num_nodes: int,
    num_local_experts: int,
) -> tuple[dict[str, tuple[int, int]], int]:
    """Return (first int32, count) of each index array of one routing, and their total."""
    num_ranks = ranks_per_node * num_nodes
    counts = {
        "topk_idx": num_tokens * num_topk,
        "send_slot": num_tokens * ranks_per_node,
        "entries": num_entries * entry_size(num_topk),
        "num_sent": num_ranks,
        "num_recv": num_ranks,
        "first_of_source": num_ranks,
        "source_tokens": num_ranks,
        "expert_tokens": num_local_experts,
        "expert_first_row": num_local_experts + 1,
        "node_slot": num_tokens * num_nodes,
        "node_tokens": max_tokens * num_nodes,
        "num_to_node": num_nodes,
        "num_relayed": num_nodes,
        "relay_first": num_nodes,
        "num_pushed": ranks_per_node,
        "relay": num_relay_entries * relay_ints(ranks_per_node, num_topk),
    }
    places, total = {}, 0
    for name, count in counts.items():
        places[name] = (total, count)
        total += round_up(count, 4)  # each begins on a multiple of 16 bytes
    return places, total


_NODES_ARRAYS = tuple(name for name, _ in header.NodesRouting._fields_)


def native_routings(
    arena: int, places: dict[str, tuple[int, int]], entries: int, **sizes: int
) -> tuple[header.Routing, header.NodesRouting]:
    """Return the index arrays in the allocation at address `arena`, for kernels.

    Args:
        arena: The allocation.
        places: What stands where in it.
        entries: Address of the received rows' entries, where they are not in it.
        sizes: Fields of ``ep_routing`` that are no arrays.
    """
    addresses = {name: arena + 4 * first for name, (first, _) in places.items()}
    if not places["entries"][1]:
        addresses["entries"] = entries
    nodes = header.NodesRouting(**{name: addresses.pop(name) for name in _NODES_ARRAYS})
    num_topk4 = round_up(sizes["num_topk"], 4)
    return header.Routing(**addresses, **sizes, num_topk4=num_topk4), nodes


@dataclass(kw_only=True, eq=False)
class NodesRouting(NVLinkRouting):
    """See `NVLinkRouting`. Relay entries come with the received rows' entries.

    Attributes:
        place: This rank's.
        nodes: The arrays that ep_comm.h's ``ep_nodes_routing`` adds.
    """

    place: Place
    nodes: header.NodesRouting

    def allocate_relay(self, num_relayed: int) -> None:
        """Allocate the entries of so many relayed rows."""
        ints = relay_ints(self.place.ranks_per_node, self.num_topk)
        relay = self.arena.new_empty(num_relayed * ints)
        self.memory = (*self.memory, relay)
        self.nodes.relay = relay.data_ptr()
