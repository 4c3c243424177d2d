"""Handles as DeepEP has them: tuples, whose items are made when somebody looks at one.

Most callers only pass a handle on. To read its items costs copies between GPU and host.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ep_comm.deep_ep.kept import KeptProperty, Readable, for_reader
from ep_comm.deep_ep.sized import SizedBuffer
from ep_comm.errors import EPArgumentError
from ep_comm.events import is_captured
from ep_comm.handle import DispatchHandle
from ep_comm.low_latency.handle import LowLatencyHandle


class _Handle(Readable, tuple):
    """A tuple of fixed length, whose items are not there at first."""

    _NOTHING: tuple[None, ...]  # as many as it has items

    def __new__(cls, *_: object) -> _Handle:
        handle = tuple.__new__(cls, cls._NOTHING)
        handle.was_captured = is_captured()
        return handle

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

    Attributes:
        native: The handle of the native buffer.
        buffer: That buffer.
    """

    _NOTHING = (None,) * 6

    def __init__(
        self, native: DispatchHandle, buffer: SizedBuffer, is_token_in_rank: Tensor | None
    ) -> None:
        self.native = native
        self.buffer = buffer
        self._is_token_in_rank = is_token_in_rank

    def _made(self) -> tuple:
        received = list(accumulate(self.native.num_recv_tokens_per_rank))
        num_ranks, rank = len(received), self.buffer.native.rank
        matrix = torch.full((num_ranks, num_ranks), -1, dtype=torch.int32, device="cpu")
        matrix[:, rank] = torch.tensor(received, dtype=torch.int32, device="cpu")
        matrix = matrix.to(self.native.topk_idx.device)
        return matrix, None, None, None, self._is_token_in_rank, None


class LowLatencyHandleTuple(_Handle):
    """The handle of `Buffer.low_latency_dispatch`.

    With M = num_max_dispatch_tokens_per_rank, R ranks and E experts on each, its items are
    DeepEP's: (src_info [E, R M] int32, layout_range [E, R] int64, M, hidden, num_experts).
    ``src_info`` is the token, at its rank, that each row is a copy of. ``layout_range`` is, for
    each expert and rank, the first row from there, times 2^32, plus their number. Look at them when
    the rows have come.

    Attributes:
        native: The handle of the native buffer.
        buffer: That buffer.
    """

    _NOTHING = (None,) * 5

    def __init__(self, native: LowLatencyHandle, buffer: SizedBuffer, recv_count: Tensor) -> None:
        self.native = native
        self.buffer = buffer
        self._recv_count = recv_count

    def _made(self) -> tuple:
        config, most = self.buffer.native.config, self.native.max_tokens
        num_ranks, src_info = self.buffer.native.num_ranks, for_reader(self.native.recv_src_info)
        places = torch.arange(src_info.shape[1], device=src_info.device)
        has_come = places < for_reader(self._recv_count).unsqueeze(1)
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
