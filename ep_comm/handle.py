"""The routing of one dispatch, kept for its combine, its backward and further cached dispatches."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from ep_comm.errors import EPArgumentError
from ep_comm.events import EventOverlap
from ep_comm.fp8 import Payload
from ep_comm.routing.types import Routing, RowLayout
from ep_comm.session import Session

if TYPE_CHECKING:
    from typing_extensions import Self

_next_id = itertools.count(1)
_handles: weakref.WeakValueDictionary[int, DispatchHandle] = weakref.WeakValueDictionary()


class Handle:
    """What a dispatch leaves for its combine: there is one, in the process that made it."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: dict) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} belongs to its process and cannot be pickled")


@dataclass(kw_only=True, eq=False)
class DispatchHandle(Handle):
    """Where every row of one dispatch went. Made by `Buffer.dispatch`; read-only.

    Attributes:
        session: The session of the buffer that made it, which is the only one that accepts it.
        routing: Where the rows went, as the backend keeps it.
        during_backward: See `Buffer.dispatch`. The last dispatch with this handle gave it.
        event: Completion of the last asynchronous operation with this handle.
    """

    session: Session = field(repr=False)
    routing: Routing = field(repr=False)
    during_backward: Callable[[], None] | None = field(default=None, repr=False)
    event: EventOverlap = field(default_factory=EventOverlap, repr=False)

    @cached_property
    def id(self) -> int:
        """The number that `handle_by_id` knows it by, from when it is first asked for."""
        number = next(_next_id)
        _handles[number] = self
        return number

    @property
    def layout(self) -> RowLayout:
        """Order of the received rows, see `Buffer.dispatch`."""
        return self.routing.layout

    @property
    def expert_alignment(self) -> int:
        """Rows of each local expert are padded to a multiple of this; 1 in the rank layout."""
        return self.routing.expert_alignment

    @property
    def topk_idx(self) -> Tensor:
        """[T, K] int32, the experts of this rank's own tokens; -1 is dropped."""
        return self.routing.topk_idx

    @property
    def recv_topk_idx(self) -> Tensor | None:
        """[N, K] local expert indices of the received rows, -1 elsewhere; rank layout only.

        Their type is that of the `topk_idx` that was dispatched, int32 for a routing map. None in
        the expert layout.
        """
        return self.routing.recv_topk_idx

    @property
    def num_recv_tokens_per_rank(self) -> tuple[int, ...]:
        """Rows received from each rank."""
        return self.routing.sizes.received

    @property
    def tokens_per_expert(self) -> Tensor:
        """[E_local] int64 on the CPU, received tokens before padding: those with room.

        After a dispatch with ``num_worst_tokens`` reading it waits for the GPU.
        """
        return _on_cpu(self.routing.sizes.expert_rows)

    @property
    def padded_tokens_per_expert(self) -> Tensor:
        """[E_local] int64 on the CPU, rows of each expert's group in the output.

        After a dispatch with ``expert_capacity`` each is that number, and nothing is waited for.
        """
        routing = self.routing
        if routing.capacity is not None and routing.expert_capacity is not None:
            num_local_experts = routing.capacity // routing.expert_capacity
            return _on_cpu((routing.expert_capacity,) * num_local_experts)
        return _on_cpu(routing.sizes.padded_expert_rows)

    @property
    def device_tokens_per_rank(self) -> Tensor:
        """[R] int32 on the buffer's device: `num_recv_tokens_per_rank`, without a wait."""
        return self.routing.device_tokens_per_rank

    @property
    def device_tokens_per_expert(self) -> Tensor:
        """[E_local] int32 on the buffer's device: tokens of each local expert, no padding."""
        return self.routing.device_tokens_per_expert

    @property
    def device_expert_offsets(self) -> Tensor:
        """[E_local + 1] int32 on the buffer's device: first row of each group, then the last's end.

        Expert layout only.
        """
        return self.routing.device_expert_offsets

    @property
    def num_tokens(self) -> int:
        """T: tokens that this rank dispatched, and that combine gives back."""
        return self.routing.num_tokens

    @property
    def num_topk(self) -> int:
        """K: entries of ``topk_idx`` a token."""
        return self.routing.num_topk

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors that it keeps, on the buffer's device: `recv_topk_idx` is one."""
        return self.routing.num_bytes

    @property
    def num_recv_tokens(self) -> int:
        """N: copies of tokens that this rank received, one per (token, destination rank)."""
        return self.routing.sizes.num_received

    @property
    def num_rows(self) -> int:
        """Rows of dispatch's output and of combine's input."""
        return self.routing.num_rows


def _on_cpu(counts: tuple[int, ...]) -> Tensor:
    """Return an int64 tensor, in a fifth of the time that ``torch.tensor`` takes."""
    return torch.from_numpy(np.array(counts, dtype=np.int64))


def checked_handle(handle: object, session: Session) -> DispatchHandle:
    """Return `handle`, which is one of the buffer's own.

    Raises:
        EPArgumentError: It is none, or another buffer's.
        EPStateError: Ranks were masked since it was made.
    """
    if not isinstance(handle, DispatchHandle):
        raise EPArgumentError(f"handle must be a DispatchHandle, got {type(handle).__name__}")
    session.check_own(handle.session)
    return handle


def handle_by_id(handle_id: int) -> DispatchHandle:
    """Return the living handle of that id: library ops can carry integers, but no objects."""
    return _handles[handle_id]


class DispatchOutput(NamedTuple):
    """Result of `Buffer.dispatch`, in the order of DeepEP's return tuple.

    Attributes:
        recv_x: Rows, or (FP8 rows, scales). [N, H] in the rank layout, [M, H] in the expert
            layout, where M counts padding; `num_worst_tokens` rows where that was given. Scales of
            the rank layout are [N, H / 128]; for those of the expert layout see
            `ep_comm.fp8.split_scales`.
        recv_topk_idx: Rank layout: [N, K] local expert indices, -1 where another rank owns the
            expert; see `DispatchHandle.recv_topk_idx`, which it is. Expert layout: None.
        recv_topk_weights: FP32; [N, K] in the rank layout, [M] in the expert layout (the
            probability of each row, 0 in padding); None where none were sent.
        num_recv_tokens_per_expert_list: Rows of each local expert's group, padding included. In the
            rank layout, which has no groups, tokens of each local expert. [] with
            `num_worst_tokens`: see `DispatchHandle.device_expert_offsets`.
        handle: Pass it to `Buffer.combine`, or to `Buffer.dispatch` to repeat the routing.
        event: Completion of the operation.
        recv_edge: What takes the gradient of FP8 rows, since autograd would make that FP8 too: BF16
            of their shape. Pass it, beside them, to the function that computes with them, which
            returns their gradient as its. Every element is NaN: it is not to be read. None of other
            rows.
    """

    recv_x: Payload
    recv_topk_idx: Tensor | None
    recv_topk_weights: Tensor | None
    num_recv_tokens_per_expert_list: list[int]
    handle: DispatchHandle
    event: EventOverlap
    recv_edge: Tensor | None = None


class CombineOutput(NamedTuple):
    """Result of `Buffer.combine`.

    Attributes:
        combined_x: [T, H], the sum of each token's rows; +0 for a token that went nowhere.
        combined_topk_weights: [T, K] FP32, each entry from the rank that owns its expert, 0 where
            dropped; their sums with `add_weights`; None where none were passed.
        event: Completion of the operation.
    """

    combined_x: Tensor
    combined_topk_weights: Tensor | None
    event: EventOverlap
