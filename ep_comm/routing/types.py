"""The routing of one dispatch, as every backend keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

RowLayout = Literal["expert", "rank"]


@dataclass(frozen=True)
class RoutingSizes:
    """Counts of one routing that the host knows.

    Attributes:
        sent: Rows sent to each rank; the own entry counts rows that stay.
        received: Rows received from each rank.
        expert_rows: Received tokens of each local expert, without padding.
        alignment: Rows of each group are padded to a multiple of this.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    expert_rows: tuple[int, ...]
    alignment: int

    @cached_property
    def padded_expert_rows(self) -> tuple[int, ...]:
        """Rows of each local expert's group."""
        return tuple(-(-rows // self.alignment) * self.alignment for rows in self.expert_rows)

    @cached_property
    def num_received(self) -> int:
        """Rows received from all ranks: N."""
        return sum(self.received)

    @cached_property
    def num_expert_rows(self) -> int:
        """Rows of the expert-major output: M."""
        return sum(self.padded_expert_rows)

    def num_rows(self, layout: RowLayout) -> int:
        """Rows of the output in `layout`."""
        return self.num_received if layout == "rank" else self.num_expert_rows


class Routing:
    """Where the tokens of one dispatch went. A backend's own kind adds what its kernels need.

    Attributes:
        num_tokens, num_topk: T and K of this rank's own tokens.
        layout: Order of the received rows.
        expert_alignment: Rows of each local expert are padded to a multiple of this; 1 in the rank
            layout.
        capacity: Rows of the output, where the caller said how many; else None.
        sizes: The counts. With a `capacity`, on a GPU, asking for them waits for it, bounded.
        topk_idx, recv_topk_idx, device_tokens_per_expert, device_expert_offsets, num_bytes: See
            `ep_comm.DispatchHandle`, which shows them.
    """

    num_tokens: int
    num_topk: int
    layout: RowLayout
    expert_alignment: int
    capacity: int | None
    sizes: RoutingSizes
    topk_idx: Tensor
    recv_topk_idx: Tensor | None
    device_tokens_per_expert: Tensor
    device_expert_offsets: Tensor
    num_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows of dispatch's output and of combine's input."""
        return self.sizes.num_rows(self.layout) if self.capacity is None else self.capacity

    @property
    def row_weights_shape(self) -> tuple[int, ...]:
        """Shape of the probabilities that come with the rows: [M] or [N, K]."""
        if self.layout == "expert":
            return (self.num_rows,)
        return (self.num_rows, self.num_topk)

    @property
    def token_weights_shape(self) -> tuple[int, int]:
        """Shape of the probabilities of this rank's own tokens: [T, K]."""
        return (self.num_tokens, self.num_topk)
