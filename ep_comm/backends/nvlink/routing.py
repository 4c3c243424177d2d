"""The index arrays of one routing on the NVLink backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ep_comm._native import header
from ep_comm.blank import Make
from ep_comm.numeric import round_up
from ep_comm.routing.types import Routing, RoutingSizes

Places = dict[str, tuple[int, int]]  # first int32 and number of them, by the array's name


def entry_size(num_topk: int) -> int:
    """Return the int32 numbers that a received row's entry takes."""
    return 3 * round_up(num_topk, 4)


@lru_cache(maxsize=64)
def arena_places(
    num_tokens: int,
    num_topk: int,
    num_entries: int,
    num_ranks: int,
    num_local_experts: int,
    num_token_words: int,
) -> tuple[Places, int]:
    """Return where each index array of one routing stands, and the int32 of all."""
    counts = index_counts(num_ranks, num_local_experts) | {
        "topk_idx": num_tokens * num_topk,
        "send_slot": num_tokens * num_ranks,
        "entries": num_entries * entry_size(num_topk),
    }
    if num_token_words:  # else rows travel by slot
        counts["token_bits"] = num_token_words
    return place_arrays(counts)


def index_counts(num_ranks: int, num_local_experts: int) -> dict[str, int]:
    """Return the int32 of the arrays that every routing has, whatever its tokens."""
    return {
        "num_sent": num_ranks,
        "num_recv": num_ranks,
        "first_of_source": num_ranks,
        "source_tokens": num_ranks,
        "expert_tokens": num_local_experts,
        "expert_first_row": num_local_experts + 1,
    }


def place_arrays(counts: dict[str, int]) -> tuple[Places, int]:
    """Return where arrays of so many int32 stand in one allocation, and its int32."""
    places, total = {}, 0
    for name, count in counts.items():
        places[name] = (total, count)
        total += round_up(count, 4)  # each begins on a multiple of 16 bytes
    return places, total


def array_addresses(arena: int, places: Places, entries: int) -> dict[str, int]:
    """Return the address of each array in the allocation at address `arena`.

    Where that has no entries of rows, they are at address `entries`.
    """
    addresses = {name: arena + 4 * first for name, (first, _) in places.items()}
    if not places["entries"][1]:
        addresses["entries"] = entries
    return addresses


@lru_cache(maxsize=1024)
def native_routing(
    arena: int, sizes: tuple[int, ...], entries: int, last_entry: int, expert_major: bool
) -> header.Routing:
    """Return the index arrays in the allocation at address `arena`, for kernels; never change it.

    Their `sizes` are the arguments of `arena_places`. torch gives the same addresses again and
    again, and to fill one in costs 4 µs.
    """
    num_tokens, num_topk, *_ = sizes
    return header.Routing(
        **array_addresses(arena, arena_places(*sizes)[0], entries),
        num_tokens=num_tokens,
        num_topk=num_topk,
        num_topk4=round_up(num_topk, 4),
        expert_major=expert_major,
        last_entry=last_entry,
    )


@dataclass(kw_only=True, eq=False)
class NVLinkRouting(Routing):
    """See `ep_comm.routing.types.Routing`. The index arrays of ep_comm.h's ``ep_routing``.

    Where the host waits for the counts, the entries of received rows are an allocation of their
    own, as large as what came. Until the first dispatch copies them there they are the buffer's.

    Attributes:
        native: The arrays for kernels.
        ticket: Number of the plan on its buffer, from 1; its counts carry it.
        stream: The caller's, to which the memory of the arrays belongs.
        arena: The arrays whose size is known before the plan.
        memory: All of them, to keep alive what kernels read.
        is_captured: The plan is in a CUDA graph: each replay of it changes the arrays.
        first: The common part of the plan and of the first dispatch; None after that one.
        wait_for_kernels: Waits until the counts are in device memory.
        known_expert_rows: Rows of each expert, in int32, for records. None with a capacity: to ask
            would be to wait for the GPU.
    """

    native: header.Routing
    ticket: int
    stream: int
    arena: Tensor
    places: Places
    memory: tuple[Tensor, ...]
    is_captured: bool
    first: FirstDispatch | None
    wait_for_kernels: Callable[[], None] = field(repr=False)
    known_expert_rows: bytes = field(default=b"", init=False, repr=False)
    _sizes: RoutingSizes | None = field(default=None, init=False, repr=False)

    def allocate_entries(self, num_received: int, make: Make) -> None:
        """Allocate the entries of so many rows, to be used instead of the buffer's.

        `native` is this routing's alone: it has no capacity.

        Kernels look at no entry behind the last, not even where another rank's handle is that of
        another dispatch, whose call has the same tag by chance: what it sends too many goes where
        the last row does.
        """
        # At least one: it is what rows that should not have come find.
        num_entries = max(1, num_received)
        size = num_entries * entry_size(self.num_topk)
        entries = make((size,), (1,), torch.int32)
        if num_received == 0:
            entries.fill_(-1)
        self.memory = (self.arena, entries)
        self.native.entries = entries.data_ptr()
        self.native.last_entry = num_entries - 1

    @property
    def num_bytes(self) -> int:
        """The index arrays, and the received rows' experts in the rank layout."""
        experts = () if self.recv_topk_idx is None else (self.recv_topk_idx,)
        return sum(tensor.nbytes for tensor in (*self.memory, *experts))

    def array(self, name: str) -> Tensor:
        """Return one of the arrays that `arena_places` knows, as a view."""
        first, count = self.places[name]
        return self.arena[first : first + count]

    @cached_property
    def topk_idx(self) -> Tensor:
        """The experts [T, K] that the plan found."""
        first, _ = self.places["topk_idx"]  # one call of torch's: `array` and a view are two
        shape, stride = (self.num_tokens, self.num_topk), (self.num_topk, 1)
        return self.arena.as_strided(shape, stride, first)

    @property
    def sizes(self) -> RoutingSizes:
        """The counts: set by the first dispatch, if that waits for them; else read from the device.

        Reading waits for the kernels. Those of a captured plan are read each time.
        """
        if self._sizes is not None:
            return self._sizes
        self.wait_for_kernels()
        sizes = RoutingSizes(
            sent=tuple(self.array("num_sent").tolist()),
            received=tuple(self.array("num_recv").tolist()),
            expert_rows=tuple(self.array("expert_tokens").tolist()),
            alignment=self.expert_alignment,
            expert_capacity=self.expert_capacity,
        )
        if not self.is_captured:
            self._sizes = sizes
        return sizes

    @sizes.setter
    def sizes(self, sizes: RoutingSizes) -> None:
        self._sizes = sizes

    @property
    def device_tokens_per_rank(self) -> Tensor:
        """The plan's counts; no copy."""
        return self.array("num_recv")

    @property
    def device_tokens_per_expert(self) -> Tensor:
        """The plan's counts; no copy."""
        return self.array("expert_tokens")

    @property
    def device_expert_offsets(self) -> Tensor:
        """The plan's offsets; no copy."""
        return self.array("expert_first_row")


class FirstDispatch(NamedTuple):
    """The common part of a plan and of the dispatch that follows it.

    Attributes:
        source: The plan's topk_idx or routing_map.
        stream: Where they run.
        num_sms: SMs that they occupy.
        record: Address of their record.
        selects_weights: Whether probabilities are selected by the plan's experts in between.
        in_one: Whether rows are pushed and expanded by one kernel, on the stream of the plan.
        number: Of their operation on the buffer, from 1.
        overflow_stats: What the plan counts in.
    """

    source: Tensor
    stream: int
    num_sms: int
    record: int
    selects_weights: bool
    in_one: bool
    number: int
    overflow_stats: Tensor | None
