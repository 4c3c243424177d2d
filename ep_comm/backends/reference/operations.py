"""The steps that all operations of the reference backend share: agree, send rows, count them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ep_comm.backends.reference.headers import exchange_headers
from ep_comm.backends.reference.messages import Exchange, Operation, Transport
from ep_comm.config import EPConfig
from ep_comm.errors import EPMismatchError
from ep_comm.telemetry.records import OpRecord, Recorder


class Operations:
    """Operations of one buffer.

    Args:
        transport: Between the ranks of its group.
        config: The buffer's.
        number: The buffer's on its group.
        recorder: Gets a record of each operation.
    """

    def __init__(
        self, transport: Transport, config: EPConfig, number: int, recorder: Recorder
    ) -> None:
        self.transport = transport
        self.config = config
        self.number = number
        self.recorder = recorder
        self.num_local_experts = config.num_experts // transport.num_ranks
        self._exchange_headers = partial(exchange_headers, transport, config, number)

    def _owner(self, topk_idx: Tensor) -> Tensor:
        """Return the rank that owns each selected expert; -1 for dropped entries."""
        return torch.div(topk_idx, self.num_local_experts, rounding_mode="floor")

    def _for_owners(
        self, entries_TK: Tensor, topk_idx: Tensor, sent_tokens: Sequence[Tensor], other: float
    ) -> list[Tensor]:
        """Return for each rank r its entries [n_r, K]: those whose experts it owns, else `other`.

        Args:
            entries_TK: [T, K], one for each selected expert.
            topk_idx: [T, K].
            sent_tokens: For each rank r the tokens [n_r] int64 that go there.
            other: Stands for entries of other ranks.
        """
        owner_TK = self._owner(topk_idx)
        return [
            torch.where(owner_TK[tokens] == r, entries_TK[tokens], other)
            for r, tokens in enumerate(sent_tokens)
        ]

    def _send_rows(
        self,
        record: OpRecord,
        send: Iterable[Tensor],
        recv: Tensor,
        recv_rows: Sequence[int],
        phase: str,
    ) -> Exchange:
        """Send ``send[r]`` to rank r; `recv` takes the rows of all ranks, in rank order."""
        return Exchange(
            self.transport,
            [tensor.contiguous() for tensor in send],
            recv,
            recv_rows,
            Operation(record.op, record.epoch, self.number),
            phase,
        )

    def _record_payload(self, record: OpRecord, send: Sequence[Tensor]) -> None:
        rank = self.transport.rank
        record.rows_to_rank = tuple(len(rows) for rows in send)
        record.wire_bytes_to_rank = tuple(
            0 if r == rank else rows.numel() for r, rows in enumerate(send)
        )

    def _check_received(self, recv_topk_idx: Tensor) -> None:
        """Refuse experts from a peer that cannot be used as an index."""
        if not recv_topk_idx.numel():
            return
        lowest, highest = (int(value) for value in recv_topk_idx.aminmax())
        if lowest < -1 or highest >= self.num_local_experts:
            raise EPMismatchError(
                f"rank {self.transport.rank} received tokens for local expert "
                f"{lowest if lowest < -1 else highest}, and has {self.num_local_experts}"
            )
