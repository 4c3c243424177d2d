"""Where a plan between nodes leaves its counts for the host."""

from __future__ import annotations

from torch import Tensor

from ep_comm._native import header
from ep_comm.backends.nodes.memory import NodesMemory
from ep_comm.backends.nvlink.mailbox import Mailbox


class NodesMailbox(Mailbox):
    """See `Mailbox`; the counts are those of ``ep_nodes_plan_args.mailbox``."""

    _memory: NodesMemory

    def _counts(self, first: int, count: int) -> list[int]:
        start = header.EP_NODES_MAILBOX_COUNTS + first
        return self._memory.counts[start : start + count]

    def _places(self) -> tuple[int, int]:
        start = header.EP_NODES_MAILBOX_COUNTS
        return 4 * (start + self._first_received), 4 * (start + self._first_expert)

    @property
    def _first_received(self) -> int:
        return 2 * self._memory.num_ranks

    @property
    def _first_expert(self) -> int:
        return 3 * self._memory.num_ranks + self._memory.place.num_nodes

    def _sent(self) -> list[int]:
        return self._counts(self._memory.num_ranks, self._memory.num_ranks)

    def _received(self) -> list[int]:
        return self._counts(self._first_received, self._memory.num_ranks)

    def _expert_rows(self) -> list[int]:
        return self._counts(self._first_expert, self._num_local_experts)

    @property
    def num_relayed(self) -> int:
        """Rows that the network brings, of the plan whose counts have come."""
        return sum(self._counts(3 * self._memory.num_ranks, self._memory.place.num_nodes))

    def raise_if_bad(self, source: Tensor, num_topk: int) -> None:
        """Raise what the plan of `source` found wrong, as `Mailbox.raise_if_bad` does."""
        asked_tokens = self._counts(0, self._memory.num_ranks)
        error = self._memory.counts[header.EP_NODES_MAILBOX_ERROR :][:4]
        self._check(asked_tokens, error, source, num_topk)
