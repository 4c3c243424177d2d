"""The streams that NVLink operations run on, and which of them may run at once on a GPU.

An operation's kernels spin until the other ranks' do their part. Two of them can only run at once
where both find room: else rank 0 might run the one, rank 1 the other, each keeping the SMs that its
other one needs, for ever. So an operation that would not fit beside those that may still be running
is ordered behind them, by stream, before it is launched.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.cuda import ExternalStream

from ep_comm._native import NativeLibrary, header
from ep_comm.errors import EPUnsupportedError
from ep_comm.events import EventOverlap


def raw_stream(device_index: int) -> int:
    """Return the current ``cudaStream_t``, at a fraction of `torch.cuda.current_stream`'s 6 µs."""
    return torch._C._cuda_getCurrentRawStream(device_index)


_KINDS = (
    header.EP_OP_DISPATCH,
    header.EP_OP_COMBINE,
    header.EP_OP_LOW_LATENCY_DISPATCH,  # and combine: they are in order with each other
)


class Streams:
    """The streams of one backend; all are given as ``cudaStream_t``.

    Operations run on the caller's stream, asynchronous ones on the communication stream. Beside
    them a new dispatch uses the side stream.

    Args:
        native: Orders streams at a third of what it costs through torch.
        device_index: The GPU's.
        new_stream: Makes a stream of the priority given.

    Attributes:
        side: The side stream.
        comm: The communication stream, as torch knows it.
        event: A ``cudaEvent_t`` to order streams with.
    """

    def __init__(
        self,
        native: NativeLibrary,
        device_index: int,
        new_stream: Callable[[int], torch.cuda.Stream],
    ) -> None:
        self._native = native
        self._new_stream = new_stream
        self._device_index = device_index
        # The side stream's expand waits for other ranks' pushes: it must never run before one.
        self._side = new_stream(0)
        self.comm = new_stream(-1)
        self._event = torch.cuda.Event()
        self._event.record()  # torch makes the CUDA event at the first use
        # Looked up once: each costs a good part of a microsecond, and an operation needs several.
        self.side: int = self._side.cuda_stream
        self.event: int = self._event.cuda_event
        self._comm_handle: int = self.comm.cuda_stream
        self._others: dict[int, torch.cuda.Stream] = {}  # torch's own: as long as this one lives
        self._in_flight = in_flight(device_index)
        for key in self._keys():
            weakref.finalize(self, self._in_flight.forget, key)

    def _keys(self) -> list[tuple[int, int]]:
        return [(id(self), op) for op in _KINDS]

    @property
    def current(self) -> int:
        """The caller's stream."""
        return raw_stream(self._device_index)

    def wait(self, waiting: int, other: int) -> None:
        """Order `waiting` behind all that is on `other` now."""
        self._native.stream_wait(waiting, other, self.event)

    def one_more(self) -> int:
        """Make one more stream that operations use; each is ordered behind it when it ends."""
        stream = self._new_stream(-1)
        self._others[stream.cuda_stream] = stream
        return stream.cuda_stream

    def order_behind_last(self, op: int, waiting: int) -> None:
        """Order `waiting` behind the last operation of the kind."""
        for other in self._in_flight.streams([(id(self), op)]):
            if other != waiting and self._is_within_reach(other):
                self.wait(waiting, other)

    def begin(self, op: int, asynchronous: bool, num_sms: int) -> int:
        """Return the next operation's stream, ordered behind all that it must not meet."""
        current = raw_stream(self._device_index)
        stream = self._comm_handle if asynchronous else current
        if stream != current:
            self.wait(stream, current)
        for other in self._in_flight.start((id(self), op), stream, num_sms):
            # A graph waits for nothing outside of it: where it is replayed is up to the caller.
            if other != current and self._is_within_reach(other):
                self.wait(stream, other)
        return stream

    @staticmethod
    def _is_within_reach(other: int) -> bool:
        """Return whether the current stream can wait for `other`.

        One that is being captured can wait only for its like.
        """
        if not torch.cuda.is_current_stream_capturing():
            return True
        if other == 0:  # the default stream is never captured, and may not be asked meanwhile
            return False
        with torch.cuda.stream(ExternalStream(other)):
            return torch.cuda.is_current_stream_capturing()

    def abandon(self) -> None:
        """Order the caller's stream behind the others, after an error: memory is about to go."""
        if torch.cuda.is_current_stream_capturing():
            return  # nothing runs, and the graph is void
        for stream in (self.side, self._comm_handle, *self._others):
            self.wait(self.current, stream)

    def synchronize(self) -> None:
        """Wait on the host for all operations that were started.

        Graphs of them that were replayed on the current stream are among these.

        Raises:
            EPUnsupportedError: The current stream is being captured.
        """
        if torch.cuda.is_current_stream_capturing():
            raise EPUnsupportedError("a CUDA graph cannot hold a wait of the host")
        device = self._device_index
        torch.cuda.current_stream(device).synchronize()
        used = self._in_flight.streams(self._keys())
        for stream in {self._comm_handle, *self._others, *used}:
            if stream == 0:  # no external one
                torch.cuda.default_stream(device).synchronize()
            else:
                ExternalStream(stream, device).synchronize()
        self.forget()

    def comm_event(self, keep: tuple) -> EventOverlap:
        """Return the end of the communication stream.

        It holds `keep`, what the kernels read, until the caller's stream has waited.
        """
        return EventOverlap(self.comm.record_event(), keep)

    def keep_for_current(self, tensors: Iterable[Tensor], made_on: int) -> None:
        """Keep memory of the stream `made_on` until the current stream is done with it.

        Its own stream would else use it again at once.
        """
        if self.current != made_on:
            current = torch.cuda.current_stream(self._device_index)
            for tensor in tensors:
                tensor.record_stream(current)

    def forget(self) -> None:
        """Note that none of this backend's operations runs any more."""
        for key in self._keys():
            self._in_flight.forget(key)


class InFlight:
    """Operations of this process that may still be running on one GPU; its buffers share it.

    Args:
        num_sms: The GPU's.
    """

    def __init__(self, num_sms: int) -> None:
        self._num_sms = num_sms
        # For each key, newest last: where the last operation runs, the earlier ones being in order
        # before it, and the most SMs of any.
        self._operations: dict[object, tuple[int, int]] = {}

    def start(self, key: object, stream: int, num_sms: int) -> list[int]:
        """Note the next operation of `key`, and return the streams that it has to wait for.

        Args:
            key: Operations with the same one use the same memory: never at once.
            stream: Where it will run.
            num_sms: SMs that its kernels occupy.
        """
        operations = self._operations
        if len(operations) == 1 and operations.get(key) == (stream, num_sms):
            return []  # as a rule: the same again, and nothing else
        last_stream, most_sms = operations.pop(key, (stream, 0))
        behind = [] if last_stream == stream else [last_stream]
        # A copy: the garbage collector may have a buffer forgotten at any moment.
        others = list(operations.values())
        for other_stream, _ in others:
            if other_stream != stream:  # else they are in order already
                behind += self._without_room(others, stream, last_stream, num_sms)
                behind.sort()
                break
        # A larger one before it may be what runs, as far as the host knows.
        operations[key] = (stream, max(num_sms, most_sms))
        return behind

    def _without_room(
        self, others: list[tuple[int, int]], stream: int, last_stream: int, num_sms: int
    ) -> list[int]:
        """Return the streams of `others` beside whose operations one of `num_sms` does not fit."""
        # One operation runs at a time on each stream: the largest counts.
        sms_of_stream: dict[int, int] = {}
        for other_stream, other_sms in reversed(others):
            if other_stream not in (stream, last_stream):
                largest = max(other_sms, sms_of_stream.get(other_stream, 0))
                sms_of_stream[other_stream] = largest
        room, behind = self._num_sms - num_sms, []
        for other_stream, other_sms in sms_of_stream.items():
            if other_sms <= room:
                room -= other_sms
            else:
                behind.append(other_stream)
        return behind

    def streams(self, keys: Iterable[object]) -> set[int]:
        """Return where the last operations of these keys run; earlier ones are done before."""
        return {operation[0] for operation in map(self._operations.get, keys) if operation}

    def forget(self, key: object) -> None:
        """Note that there is no operation of `key` any more."""
        self._operations.pop(key, None)


@functools.cache
def in_flight(device_index: int) -> InFlight:
    """Return the operations in flight on a GPU, which all buffers of this process share."""
    return InFlight(torch.cuda.get_device_properties(device_index).multi_processor_count)
