"""The routing of one dispatch, as every backend keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
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
        expert_rows: Received tokens of each local expert, without padding; with `expert_capacity`
            those that its group has room for.
        alignment: Rows of each group are padded to a multiple of this.
        expert_capacity: Rows of each group, where the caller said how many; else None.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    expert_rows: tuple[int, ...]
    alignment: int
    expert_capacity: int | None = None

    @cached_property
    def padded_expert_rows(self) -> tuple[int, ...]:
        """Rows of each local expert's group."""
        if self.expert_capacity is not None:
            return (self.expert_capacity,) * len(self.expert_rows)
        alignment = self.alignment
        if alignment == 1:
            return self.expert_rows
        # Of a list: a generator costs each of many experts a good part of a microsecond.
        return tuple([-(-rows // alignment) * alignment for rows in self.expert_rows])

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


@dataclass(kw_only=True, eq=False)
class Routing:
    """Where the tokens of one dispatch went. A backend's own kind adds what its kernels need.

    Attributes:
        num_tokens: T, this rank's own tokens.
        num_topk: K.
        layout: Order of the received rows.
        expert_alignment: Rows of each local expert are padded to a multiple of this; 1 in the rank
            layout.
        capacity: Rows of the output, where the caller said how many; else None.
        expert_capacity: Rows of each local expert's group, where the caller said how many.
        recv_topk_idx: See `ep_comm.DispatchHandle`, like all that follows but `sizes`.
        sizes: The counts. With a `capacity`, on a GPU, asking for them waits for it, bounded.
        topk_idx: The experts of the own tokens.
        device_tokens_per_rank: The counts of sources, on the device.
        device_tokens_per_expert: The counts of experts, on the device.
        device_expert_offsets: Where groups begin, on the device.
        num_bytes: Memory that is kept.
    """

    num_tokens: int
    num_topk: int
    layout: RowLayout
    expert_alignment: int
    capacity: int | None
    expert_capacity: int | None = None
    recv_topk_idx: Tensor | None = None
    # A backend sets these, or computes them when they are first asked for.
    sizes: RoutingSizes = field(init=False, repr=False)
    topk_idx: Tensor = field(init=False, repr=False)
    device_tokens_per_rank: Tensor = field(init=False, repr=False)
    device_tokens_per_expert: Tensor = field(init=False, repr=False)
    device_expert_offsets: Tensor = field(init=False, repr=False)
    num_bytes: int = field(init=False, repr=False)

    @cached_property
    def num_rows(self) -> int:
        """Rows of dispatch's output and of combine's input."""
        return self.sizes.num_rows(self.layout) if self.capacity is None else self.capacity

    @cached_property
    def row_weights_shape(self) -> tuple[int, ...]:
        """Shape of the probabilities that come with the rows: [M] or [N, K]."""
        if self.layout == "expert":
            return (self.num_rows,)
        return (self.num_rows, self.num_topk)

    @cached_property
    def token_weights_shape(self) -> tuple[int, int]:
        """Shape of the probabilities of this rank's own tokens: [T, K]."""
        return (self.num_tokens, self.num_topk)
