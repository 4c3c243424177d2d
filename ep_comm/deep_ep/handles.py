"""Handles as DeepEP has them: tuples, whose items are made when somebody looks at one.

Most callers only pass a handle on. To read its items costs copies between GPU and host.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep_comm.deep_ep.kept import KeptProperty, Readable, for_reader
from ep_comm.deep_ep.sized import SizedBuffer
from ep_comm.errors import EPArgumentError
from ep_comm.events import is_captured


class _MadeOf(NamedTuple):
    """What a handle has in a tuple's places: to set attributes takes a dispatch half a µs more.

    Attributes:
        native: The handle of the native buffer.
        buffer: That buffer.
        tensor: What else is needed.
        was_captured: See `Readable`.
    """

    native: Any
    buffer: SizedBuffer
    tensor: Any
    was_captured: bool


class _Handle(Readable, tuple):
    """A tuple of fixed length, whose items are not there at first.

    Attributes:
        native, buffer: See `_MadeOf`.
    """

    _NOTHING: tuple[None, ...]  # behind `_MadeOf`, for the length
    # These read a place of any tuple.
    native: Any = _MadeOf.native
    buffer: SizedBuffer = _MadeOf.buffer
    _tensor: Any = _MadeOf.tensor
    was_captured: bool = _MadeOf.was_captured

    def __new__(cls, native: Any, buffer: SizedBuffer, tensor: Tensor | None) -> _Handle:
        return tuple.__new__(cls, (native, buffer, tensor, is_captured()) + cls._NOTHING)

    def _made(self) -> tuple:
        raise NotImplementedError

    @KeptProperty
    def _items(self) -> tuple:
        return self._made()

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:  # a tuple's looks at what it is made of
        return self is not other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of an ep_comm buffer>"


class NormalHandle(_Handle):
    """The handle of `Buffer.dispatch`.

    Its items are those of DeepEP within a node: (rank_prefix_matrix, channel_prefix_matrix,
    recv_channel_prefix_matrix, recv_src_idx, is_token_in_rank, send_head). There are no channels
    here: all are None but the first, [R, R] int32, and the fifth, which is the caller's. Of the
    first only the own column is known: entry r of it counts the rows that ranks 0 to r sent here.
    The other entries are -1.

    Args:
        native: The handle of the native buffer, a `DispatchHandle`.
        buffer: That buffer.
        tensor: ``is_token_in_rank``.
    """

    _NOTHING = (None,) * 2

    def _made(self) -> tuple:
        received = list(accumulate(self.native.num_recv_tokens_per_rank))
        num_ranks, rank = len(received), self.buffer.native.rank
        matrix = torch.full((num_ranks, num_ranks), -1, dtype=torch.int32, device="cpu")
        matrix[:, rank] = torch.tensor(received, dtype=torch.int32, device="cpu")
        matrix = matrix.to(self.native.topk_idx.device)
        return matrix, None, None, None, self._tensor, None


class LowLatencyHandleTuple(_Handle):
    """The handle of `Buffer.low_latency_dispatch`.

    With M = num_max_dispatch_tokens_per_rank, R ranks and E experts on each, its items are
    DeepEP's: (src_info [E, R M] int32, layout_range [E, R] int64, M, hidden, num_experts).
    ``src_info`` is the token, at its rank, that each row is a copy of. ``layout_range`` is, for
    each expert and rank, the first row from there, times 2^32, plus their number. Look at them when
    the rows have come.

    Args:
        native: The handle of the native buffer, a `LowLatencyHandle`.
        buffer: That buffer.
        tensor: ``recv_count``.
    """

    _NOTHING = (None,)

    def _made(self) -> tuple:
        config, most = self.buffer.native.config, self.native.max_tokens
        num_ranks, src_info = self.buffer.native.num_ranks, for_reader(self.native.recv_src_info)
        places = torch.arange(src_info.shape[1], device=src_info.device)
        has_come = places < for_reader(self._tensor).unsqueeze(1)
        # Behind the rows that came anything may stand.
        source = torch.where(has_come, src_info // most, num_ranks)
        ranks = torch.arange(num_ranks, device=src_info.device)
        counts = (source.unsqueeze(2) == ranks).sum(1)
        first = counts.cumsum(1) - counts
        layout_range = (first << 32) | counts
        return src_info % most, layout_range, most, config.hidden, config.num_experts


def checked(handle: object, kind: type[Any], from_call: str) -> Any:
    """Return `handle`, which is one of that kind.

    Raises:
        EPArgumentError: It is not, as when somebody has made a plain tuple of its items.
    """
    if not isinstance(handle, kind):
        raise EPArgumentError(
            f"handle must be what {from_call} returned, got {type(handle).__name__}"
        )
    return handle
