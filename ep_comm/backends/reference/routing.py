"""One routing, as the reference backend keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ep_comm.routing.types import Routing, RoutingSizes


@dataclass(kw_only=True, eq=False)
class ReferenceRouting(Routing):
    """See `ep_comm.routing.types.Routing`.

    Attributes:
        epoch: Number of the dispatch that exchanged the routing; tells handles of different
            dispatches apart.
        sent_tokens: For each rank r, the tokens [n_r] int64 that went there, ascending.
        expert_row_NK: [N, K] int64, for each received row its rows in the expert-major output,
            in the order of ``recv_topk_idx``; -1 where the expert is not local, or the output has
            no such row.
        num_dropped: Tokens for which groups of a given size have no room.
        is_counted: Whether the caller has what was dropped counted; it is then no error.
    """

    sizes: RoutingSizes
    topk_idx: Tensor
    epoch: int
    sent_tokens: tuple[Tensor, ...]
    expert_row_NK: Tensor
    num_dropped: int
    is_counted: bool

    @cached_property
    def num_bytes(self) -> int:
        """All index tensors, and the received rows' experts in the rank layout."""
        tensors = [self.topk_idx, self.expert_row_NK, *self.sent_tokens]
        if self.recv_topk_idx is not None:
            tensors.append(self.recv_topk_idx)
        return sum(tensor.nbytes for tensor in tensors)

    @cached_property
    def device_tokens_per_rank(self) -> Tensor:
        """The counts, moved to the device when they are first asked for, as all of these are."""
        return self._on_device(self.sizes.received)

    @cached_property
    def device_tokens_per_expert(self) -> Tensor:
        """The counts, and of a group no more than there is room for."""
        tokens = self._on_device(self.sizes.expert_rows)
        if self.capacity is None or self.layout == "rank":
            return tokens
        return torch.minimum(tokens, self.device_expert_offsets.diff())

    @cached_property
    def device_expert_offsets(self) -> Tensor:
        """The running sum of the padded counts, cut off at the capacity."""
        ends = torch.tensor((0, *self.sizes.padded_expert_rows), device="cpu").cumsum(0)
        if self.capacity is not None:
            ends = ends.clamp(max=self.capacity)
        return ends.to(self.topk_idx.device, torch.int32)

    def _on_device(self, counts: tuple[int, ...]) -> Tensor:
        return torch.tensor(counts, dtype=torch.int32, device=self.topk_idx.device)
