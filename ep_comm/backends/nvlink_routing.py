"""The index arrays of one routing on the NVLink backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ep_comm._native import structs
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
        "recv_topk_idx": num_rows * num_topk4,
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


@lru_cache(maxsize=1024)
def native_routing(
    arena: int,
    num_tokens: int,
    num_topk: int,
    num_rows: int,
    num_ranks: int,
    num_local_experts: int,
    expert_major: bool,
) -> structs.Routing:
    """The index arrays in the allocation at address `arena`, for kernels; not to be changed.

    torch gives the same addresses again and again, and to fill one in costs 4 µs.
    """
    places, _ = arena_places(num_tokens, num_topk, num_rows, num_ranks, num_local_experts)
    addresses = [arena + 4 * first for first, _ in places.values()]
    return structs.Routing(*addresses, num_tokens, num_topk, whole_vectors(num_topk), expert_major)


@dataclass(kw_only=True, eq=False)
class NVLinkRouting:
    """See `ep_comm.handle.Routing`. The index arrays of csrc/ep_comm.h's ``ep_routing``, in one
    allocation: row ``source * max_tokens_per_rank + slot`` is a received row.

    Attributes:
        native: The same for kernels.
        number: Of the plan, from 1; the ticket of its counts.
        stream: The caller's, to which the memory of these arrays belongs.
        first: What the plan leaves to the dispatch that follows it; None afterwards.
        recv_topk_idx: Rank layout: written by the first dispatch.
    """

    backend: NVLinkBackend
    native: structs.Routing
    number: int
    expert_alignment: int
    capacity: int | None
    num_tokens: int
    num_topk: int
    source: Tensor
    stream: int
    arena: Tensor
    places: dict[str, tuple[int, int]]
    first: FirstDispatch | None
    recv_topk_idx: Tensor | None = None

    def array(self, name: str) -> Tensor:
        first, count = self.places[name]
        return self.arena[first : first + count]

    @cached_property
    def topk_idx(self) -> Tensor:
        return self.array("topk_idx").view(self.num_tokens, self.num_topk)

    @cached_property
    def sizes(self) -> RoutingSizes:
        if self.capacity is None:
            return self.backend.wait_for_sizes(self)
        self.backend.wait_for_kernels()
        counts = (self.array(n).tolist() for n in ("num_sent", "num_recv", "expert_tokens"))
        return RoutingSizes(*map(tuple, counts), self.expert_alignment)

    @property
    def device_tokens_per_expert(self) -> Tensor:
        return self.array("expert_tokens")

    @property
    def device_expert_offsets(self) -> Tensor:
        return self.array("expert_first_row")


class FirstDispatch(NamedTuple):
    """What belongs to both a plan and the dispatch that follows it.

    Attributes:
        stream: Where they run.
        num_sms: That they occupy.
        record: Address of their record.
        selects_weights: Whether probabilities are selected by the plan's experts in between.
        in_one: Whether rows are pushed and expanded by one kernel, on the stream of the plan.
        is_captured: In a CUDA graph.
    """

    stream: int
    num_sms: int
    record: int
    selects_weights: bool
    in_one: bool
    is_captured: bool
