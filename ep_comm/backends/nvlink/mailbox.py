"""Where a plan leaves its counts for the host: the one wait of the host in a new dispatch."""

from __future__ import annotations

import ctypes
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
        received, expert_rows = self._places()
        counts = ctypes.c_int32 * self._num_local_experts
        self._packed = memoryview(counts.from_address(memory.mailbox_address + expert_rows))
        self._args = header.MailboxArgs(
            mailbox=memory.mailbox_address,
            fault=memory.fault_address,
            received=memory.mailbox_address + received,
            expert_rows=memory.mailbox_address + expert_rows,
            # The kernels' own bound names the late rank; it begins when they start.
            timeout_ns=int(10 * config.timeout_s * 1e9),
            num_ranks=memory.num_ranks,
            num_experts=self._num_local_experts,
        )

    def wait(self, ticket: int, epoch: int, alignment: int, stream: int) -> tuple[int, int]:
        """Wait for the counts of the plan with that `ticket`: all else here is of that one.

        Args:
            ticket: Number of the plan on its buffer, which its counts carry.
            epoch: Number of its dispatch, for the message.
            alignment: Rows that its expert groups are padded to a multiple of.
            stream: Where it runs, to see where CUDA itself has failed.

        Returns:
            Rows that come, and those of all groups with their padding.

        Raises:
            EPTimeoutError, EPMismatchError: The plan ended with it.
        """
        memory, args = self._memory, self._args
        args.ticket, args.alignment, args.stream = ticket, alignment, stream
        arrived = self._native.mailbox_wait(args)
        memory.check_fault()
        if not arrived:
            raise memory.timeout("dispatch", "plan", (), epoch)
        return args.num_received, args.num_expert_rows

    def _places(self) -> tuple[int, int]:
        """Return where the counts of ranks and of experts begin, in bytes."""
        return header.Mailbox.num_recv_tokens.offset, header.Mailbox.num_tokens_per_expert.offset

    def sizes(self, alignment: int) -> RoutingSizes:
        """Return the counts, of groups that are padded to a multiple of `alignment`."""
        return RoutingSizes(
            sent=tuple(self._sent()),
            received=tuple(self._received()),
            expert_rows=tuple(self._expert_rows()),
            alignment=alignment,
        )

    def packed_expert_rows(self) -> bytes:
        """Return the counts of experts as records keep them: int32."""
        return self._packed.tobytes()

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
