"""The native buffers behind one `Buffer`, made when a call says for which sizes.

DeepEP's constructor names bytes; ours needs tokens, hidden size and experts. So the first call
makes the buffer, and a call that is too large makes another one. Both are collective, as the call
is:

* Hidden size, experts, type and the room that there is at least are the same on all ranks: each
  finds by itself that there is no buffer for them.
* Tokens differ. For the first buffer the ranks tell one another how many they have, at a bounded
  meeting. Later a rank with too many tokens has the dispatch raise `EPTooManyTokensError` on all
  ranks, with the tokens of each: all make a larger buffer, and dispatch again.

A larger buffer has room for twice as many tokens at least. The smaller one stays until the end, for
handles of it may be alive: all that were left behind take less memory than the last.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
import torch.distributed as dist

from ep_comm import Buffer as NativeBuffer
from ep_comm._native.header import EP_MAX_TOPK
from ep_comm.config import EPConfig, check_positive
from ep_comm.deep_ep.hints import Hints
from ep_comm.errors import EPArgumentError, EPTooManyTokensError, EPUnsupportedError
from ep_comm.events import is_captured
from ep_comm.job.meeting import meet
from ep_comm.numeric import round_up

_log = logging.getLogger("ep_comm")
_ROUND_TO = 64  # tokens


class SizedBuffer:
    """A native buffer.

    Attributes:
        native: It.
        room: Most tokens of a rank in an operation, a low-latency one where it has these.
    """

    def __init__(self, native: NativeBuffer) -> None:
        config = native.config
        self.native = native
        self.room = config.low_latency_tokens or config.max_tokens_per_rank
        self._num_sms: int | None = None

    def limit_sms(self, num_sms: int | None) -> None:
        """Have operations occupy at most so many SMs; None is as natively."""
        if num_sms != self._num_sms:
            self.native.set_num_sms(num_sms)
            self._num_sms = num_sms


class SizedBuffers:
    """Those of one `Buffer`, for normal and for low-latency operations.

    Args:
        group: The ranks.
        hints: What is known of sizes before.
        overlapped: Computation runs beside operations (`ep_comm.Buffer.set_overlapped`).
    """

    def __init__(self, group: dist.ProcessGroup, hints: Hints, *, overlapped: bool = False) -> None:
        self._group = group
        self._hints = hints
        self._overlapped = overlapped
        self._normal: dict[tuple, SizedBuffer] = {}
        self._low_latency: dict[tuple, SizedBuffer] = {}
        self._all: list[SizedBuffer] = []

    @property
    def of_low_latency(self) -> list[SizedBuffer]:
        """Those with low-latency operations."""
        return list(self._low_latency.values())

    @property
    def newest(self) -> SizedBuffer | None:
        """The one that was made last; None before the first call."""
        return self._all[-1] if self._all else None

    @property
    def comm_stream(self) -> torch.cuda.Stream:
        """The stream of asynchronous operations, of the newest buffer.

        Raises:
            EPArgumentError: There is no buffer yet; or it is on the CPU.
        """
        stream = None if self.newest is None else self.newest.native.comm_stream
        if stream is None:
            raise EPArgumentError("there is no communication stream before the first operation")
        return stream

    def normal(
        self,
        hidden: int,
        num_experts: int,
        dtype: torch.dtype,
        num_tokens: int,
        least: int,
    ) -> SizedBuffer:
        """Return the buffer for a dispatch; collective where there is none yet.

        Args:
            hidden: Elements of a row.
            num_experts: Of all ranks.
            dtype: Of the rows.
            num_tokens: Of this rank.
            least: There is room for so many tokens of each rank at least; equal on all ranks.
        """
        key = (hidden, num_experts, dtype)
        buffer = self._normal.get(key)
        if buffer is not None and buffer.room >= least:
            return buffer
        if buffer is not None:
            return self._grow(key, least)
        tokens = self._hints.max_tokens_per_rank
        if tokens is None:
            _check_not_captured()
            what_for = f"make room for rows of {hidden} elements for {num_experts} experts"
            tokens = max(meet(self._group, what_for, num_tokens, self._hints.timeout_s).answers)
        return self._make(key, max(tokens, least))

    def larger(
        self, hidden: int, num_experts: int, dtype: torch.dtype, error: EPTooManyTokensError
    ) -> SizedBuffer:
        """Return a larger buffer for a dispatch that ended with `error`. Collective."""
        return self._grow((hidden, num_experts, dtype), max(error.num_tokens))

    def low_latency(self, hidden: int, num_experts: int, max_tokens: int) -> SizedBuffer:
        """Return the buffer for low-latency operations; collective where there is none yet."""
        key = (hidden, num_experts)
        buffer = self._low_latency.get(key)
        if buffer is not None and isinstance(max_tokens, int) and max_tokens <= buffer.room:
            return buffer
        check_positive("num_max_dispatch_tokens_per_rank", max_tokens)
        sizes = dict(max_tokens_per_rank=max_tokens, low_latency_tokens=max_tokens)
        made = self._new(hidden, num_experts, torch.bfloat16, sizes)
        self._low_latency[key] = made
        return made

    def destroy(self) -> None:
        """Free all of them, whatever one raises. Collective."""
        with contextlib.ExitStack() as last_first:
            for buffer in self._all:
                last_first.callback(buffer.native.destroy)

    def _grow(self, key: tuple, num_tokens: int) -> SizedBuffer:
        room = self._normal[key].room
        _log.info("deep_ep: room for %d tokens a rank instead of %d", num_tokens, room)
        return self._make(key, max(num_tokens, 2 * room))

    def _make(self, key: tuple, num_tokens: int) -> SizedBuffer:
        tokens = round_up(max(1, num_tokens), _ROUND_TO)
        hidden, num_experts, dtype = key
        made = self._new(hidden, num_experts, dtype, dict(max_tokens_per_rank=tokens))
        self._normal[key] = made
        return made

    def _new(
        self, hidden: int, num_experts: int, dtype: torch.dtype, sizes: dict[str, Any]
    ) -> SizedBuffer:
        _check_not_captured()
        config = EPConfig(
            num_experts=num_experts,
            hidden=hidden,
            num_topk=min(num_experts, EP_MAX_TOPK),
            dtype=dtype,
            backend=self._hints.backend,
            timeout_s=self._hints.timeout_s,
            **sizes,
        )
        native = NativeBuffer(self._group, config)
        native.set_overlapped(self._overlapped)
        has_fallen_back = native.passed_over and torch.cuda.is_available()
        level = logging.WARNING if has_fallen_back else logging.INFO
        _log.log(level, "deep_ep: %r; passed over: %s", native, native.passed_over or "nothing")
        buffer = SizedBuffer(native)
        self._all.append(buffer)
        return buffer


def _check_not_captured() -> None:
    """Raise `EPUnsupportedError` in a CUDA graph: to make a buffer waits for other ranks."""
    if is_captured():
        raise EPUnsupportedError(
            "the first call for these sizes makes a buffer, which no CUDA graph can hold: make one "
            "such call on all ranks before the capture, or clean_low_latency_buffer for low latency"
        )
