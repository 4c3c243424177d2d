"""Where a plan leaves its counts for the host: the one wait of the host in a new dispatch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ep_comm import checks
from ep_comm._native import NativeLibrary, header
from ep_comm.backends.nvlink.memory import PeerMemory
from ep_comm.config import EPConfig
from ep_comm.routing.layout import raise_if_bad
from ep_comm.routing.types import RoutingSizes


class Mailbox:
    """The counts of the last plan.

    Args:
        native: The CUDA library, which waits without the GIL.
        memory: This rank's. Kernels write the mailbox in its host part.
        config: The buffer's.
    """

    def __init__(self, native: NativeLibrary, memory: PeerMemory, config: EPConfig) -> None:
        self._native = native
        self._memory = memory
        self._config = config
        self._num_local_experts = config.num_experts // memory.num_ranks

    def wait(self, ticket: int, epoch: int, stream: int) -> None:
        """Wait for the counts of the plan with that `ticket`: all else here is of that one.

        Args:
            ticket: Number of the plan on its buffer, which its counts carry.
            epoch: Number of its dispatch, for the message.
            stream: Where it runs, to see where CUDA itself has failed.

        Raises:
            EPTimeoutError, EPMismatchError: The plan ended with it.
        """
        memory = self._memory
        arrived = self._native.mailbox_wait(
            memory.mailbox_address,
            memory.fault_address,
            ticket,
            # The kernels' own bound names the late rank; it begins when they start.
            10 * self._config.timeout_s,
            stream,
        )
        memory.check_fault()
        if not arrived:
            raise memory.timeout("dispatch", "plan", (), epoch)

    def num_rows(self, alignment: int | None) -> int:
        """Return the rows that come, or with an `alignment` those of all groups, padded to it.

        It is what the GPU waits for, so it takes no longer than it must.
        """
        if alignment is None:
            return sum(self._received())
        rows = self._expert_rows()
        if alignment == 1:
            return sum(rows)
        return sum([-(-count // alignment) for count in rows]) * alignment  # as ceil_div, at once

    def sizes(self, alignment: int) -> RoutingSizes:
        """Return the counts, of groups that are padded to a multiple of `alignment`."""
        return RoutingSizes(
            sent=tuple(self._sent()),
            received=tuple(self._received()),
            expert_rows=tuple(self._expert_rows()),
            alignment=alignment,
        )

    def _sent(self) -> list[int]:
        return self._memory.mailbox.num_sent_tokens[: self._memory.num_ranks]

    def _received(self) -> list[int]:
        return self._memory.mailbox.num_recv_tokens[: self._memory.num_ranks]

    def _expert_rows(self) -> list[int]:
        return self._memory.mailbox.num_tokens_per_expert[: self._num_local_experts]

    def raise_if_bad(self, source: Tensor, num_topk: int) -> None:
        """Raise what the plan of `source`, whose counts have come, found wrong with its routing.

        Raises:
            EPTooManyTokensError: Some rank's tokens are more than the buffer holds.
            EPRoutingError: Names the first bad entry of this rank.
        """
        content = self._memory.mailbox
        asked_tokens = content.asked_tokens[: self._memory.num_ranks]
        self._check(asked_tokens, content.routing_error, source, num_topk)

    def _check(
        self,
        asked_tokens: Sequence[int],
        routing_error: Sequence[int],
        source: Tensor,
        num_topk: int,
    ) -> None:
        checks.check_num_tokens(asked_tokens, self._config)
        if routing_error[0] != header.EP_ROUTING_OK:
            raise_if_bad(list(routing_error), source, num_topk, self._config.num_experts)
