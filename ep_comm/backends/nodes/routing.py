"""The index arrays of one routing between nodes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ep_comm._native import header
from ep_comm.backends.nodes.peers import Place
from ep_comm.backends.nvlink.routing import (
    NVLinkRouting,
    Places,
    array_addresses,
    entry_size,
    index_counts,
    place_arrays,
)
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
) -> tuple[Places, int]:
    """Return where each index array of one routing stands, and the int32 of all."""
    return place_arrays(
        index_counts(ranks_per_node * num_nodes, num_local_experts)
        | {
            "topk_idx": num_tokens * num_topk,
            "send_slot": num_tokens * ranks_per_node,
            "entries": num_entries * entry_size(num_topk),
            "node_slot": num_tokens * num_nodes,
            "node_tokens": max_tokens * num_nodes,
            "num_to_node": num_nodes,
            "num_relayed": num_nodes,
            "relay_first": num_nodes,
            "num_pushed": ranks_per_node,
            "relay": num_relay_entries * relay_ints(ranks_per_node, num_topk),
        }
    )


_NODES_ARRAYS = tuple(name for name, _ in header.NodesRouting._fields_)


def native_routings(
    arena: int, places: Places, entries: int, **sizes: int
) -> tuple[header.Routing, header.NodesRouting]:
    """Return the index arrays in the allocation at address `arena`, for kernels.

    Args:
        arena: The allocation.
        places: What stands where in it.
        entries: Address of the received rows' entries, where they are not in it.
        sizes: Fields of ``ep_routing`` that are no arrays.
    """
    addresses = array_addresses(arena, places, entries)
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
