"""Ranks as nodes of equally many, and their numbers in kernels."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """A rank's place among `num_nodes` nodes of `ranks_per_node` consecutive ranks.

    Kernels number ranks from their own node on, backwards: peer k L + l is rank l of the node k
    before.
    """

    rank: int
    ranks_per_node: int
    num_nodes: int

    @property
    def num_ranks(self) -> int:
        """Ranks of all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def node(self) -> int:
        """The rank's node."""
        return self.rank // self.ranks_per_node

    @property
    def local_rank(self) -> int:
        """The rank's number in its node."""
        return self.rank % self.ranks_per_node

    def rank_of(self, peer: int) -> int:
        """Return the rank that kernels call `peer`."""
        distance, local_rank = divmod(peer, self.ranks_per_node)
        return (self.node - distance) % self.num_nodes * self.ranks_per_node + local_rank

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The ranks of its node, by local rank."""
        first = self.node * self.ranks_per_node
        return tuple(range(first, first + self.ranks_per_node))

    @property
    def others(self) -> tuple[int, ...]:
        """All ranks but its own, the next one first."""
        return tuple((self.rank + i) % self.num_ranks for i in range(1, self.num_ranks))

    @property
    def rail(self) -> tuple[int, ...]:
        """The ranks with its local rank: its own, then that of each node after."""
        return tuple(
            (self.node + k) % self.num_nodes * self.ranks_per_node + self.local_rank
            for k in range(self.num_nodes)
        )
