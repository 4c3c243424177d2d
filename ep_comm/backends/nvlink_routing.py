"""The index arrays of one routing on the NVLink backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ep_comm.handle import RoutingSizes

if TYPE_CHECKING:
    from ep_comm.backends.nvlink import NVLinkBackend


def whole_vectors(num_topk: int) -> int:
    """K4: `num_topk` rounded up to rows of 16 bytes."""
    return -(-num_topk // 4) * 4


@lru_cache(maxsize=64)
def arena_places(
    num_tokens: int, num_topk: int, num_rows: int, num_ranks: int, num_local_experts: int
) -> tuple[dict[str, tuple[int, int]], int]:
    """(first int32, count) of each index array of one routing, and their total."""
    num_topk4 = whole_vectors(num_topk)
    counts = {
        "topk_idx": num_tokens * num_topk,
        "send_slot": num_tokens * num_ranks,
        "recv_topk_idx": num_rows * num_topk,
        "row_of_k": num_rows * num_topk4,
        "rows_ascending": num_rows * num_topk4,
        "num_sent": num_ranks,
        "num_recv": num_ranks,
        "source_tokens": num_ranks,
        "expert_tokens": num_local_experts,
        "expert_first_row": num_local_experts + 1,
    }
    places, total = {}, 0
    for name, count in counts.items():
        places[name] = (total, count)
        total += -(-count // 4) * 4  # each begins on a multiple of 16 bytes
    return places, total


@dataclass(kw_only=True, eq=False)
class NVLinkRouting:
    """See `ep_comm.handle.Routing`. The index arrays of csrc/ep_comm.h's ``ep_plan_args``, in one
    allocation: row ``source * max_tokens_per_rank + slot`` is a received row.
    """

    backend: NVLinkBackend
    epoch: int
    expert_major: bool
    expert_alignment: int
    num_tokens: int
    num_topk: int
    source: Tensor
    arena: Tensor
    places: dict[str, tuple[int, int]]
    is_new: bool = True

    @property
    def num_topk4(self) -> int:
        return whole_vectors(self.num_topk)

    def address(self, name: str) -> int:
        return self.arena.data_ptr() + 4 * self.places[name][0]

    @cached_property
    def topk_idx(self) -> Tensor:
        return self._array("topk_idx").view(self.num_tokens, self.num_topk)

    @cached_property
    def sizes(self) -> RoutingSizes:
        return self.backend.wait_for_sizes(self)

    @cached_property
    def recv_topk_idx(self) -> Tensor:
        rows = self._array("recv_topk_idx").view(self.backend.num_ranks, -1, self.num_topk)
        return torch.cat([rows[r, :count] for r, count in enumerate(self.sizes.received)])

    def _array(self, name: str) -> Tensor:
        first, count = self.places[name]
        return self.arena[first : first + count]
