"""Which operations may run at once on a GPU.

An operation's kernels spin until the other ranks' do their part. Two of them can only run at once
where both find room: else rank 0 might run the one, rank 1 the other, each keeping the SMs that its
other one needs, for ever. So an operation that would not fit beside those that may still be running
is ordered behind them, by stream, before it is launched.
"""

from __future__ import annotations

import functools

import torch


class InFlight:
    """Operations of this process that may still be running on one GPU; its buffers share it.

    Args:
        num_sms: Of the GPU.
    """

    def __init__(self, num_sms: int) -> None:
        self._num_sms = num_sms
        # Newest last; of each key the last operation, the earlier ones being in order before it.
        self._operations: dict[object, tuple[int, int]] = {}

    def start(self, key: object, stream: int, num_sms: int) -> list[int]:
        """Streams that `stream` has to wait for before the next operation of `key` runs on it.

        Args:
            key: Operations with the same one use the same memory: never at once.
            stream: Where it will run.
            num_sms: That its kernels occupy.
        """
        last_stream, _ = self._operations.pop(key, (stream, 0))
        behind = {last_stream} - {stream}
        # One operation runs at a time on each stream: the largest counts.
        sms_of_stream: dict[int, int] = {}
        for other_stream, other_sms in reversed(self._operations.values()):
            if other_stream not in behind | {stream}:
                largest = max(other_sms, sms_of_stream.get(other_stream, 0))
                sms_of_stream[other_stream] = largest
        room = self._num_sms - num_sms
        for other_stream, other_sms in sms_of_stream.items():
            if other_sms <= room:
                room -= other_sms
            else:
                behind.add(other_stream)
        self._operations[key] = (stream, num_sms)
        return sorted(behind)

    def forget(self, key: object) -> None:
        """There is no operation of `key` any more."""
        self._operations.pop(key, None)


@functools.cache
def in_flight(device_index: int) -> InFlight:
    """The one of a GPU."""
    return InFlight(torch.cuda.get_device_properties(device_index).multi_processor_count)
