"""How a GPU's clock stands to the host's."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from ep_comm._native import NativeLibrary, header

_READINGS = 20
_BUSY_NS = 50_000  # longer than the host takes for a launch


class Clock(NamedTuple):
    """A clock, against this host's `time.monotonic`.

    Attributes:
        ahead_s: Seconds by which it is ahead.
        error_s: By how much that may be wrong, either way.
    """

    ahead_s: float
    error_s: float


class Origin(NamedTuple):
    """A point of a clock that is known in events, too.

    Attributes:
        event: Recorded then, complete; None of the host's clock, where times are seconds anyway.
        seconds: When that was, by the clock.
    """

    event: torch.cuda.Event | None
    seconds: float


HOST = Clock(0.0, 0.0)


def read_gpu_clock(native: NativeLibrary, device: torch.device) -> Clock:
    """Compare a GPU's clock, which kernels read, with the host's: tells half of a round trip.

    Waits for the GPU to run twenty short kernels on a stream of their own.
    """
    stream = torch.cuda.Stream(device)
    stamps = torch.zeros(2, dtype=torch.int64, device=device)
    args = header.BusyArgs(stamps_ns=stamps.data_ptr(), duration_ns=0)
    torch.cuda.current_stream(device).synchronize()
    best = Clock(0.0, float("inf"))
    for _ in range(_READINGS):
        before = time.monotonic()
        native.launch("ep_busy", args, stream.cuda_stream)
        stream.synchronize()
        after = time.monotonic()
        if (after - before) / 2 < best.error_s:
            gpu_s = int(stamps[0]) / 1e9
            best = Clock(gpu_s - (before + after) / 2, (after - before) / 2)
    return best


def gpu_origin(native: NativeLibrary, device: torch.device) -> Origin:
    """Record an event between two readings of a GPU's clock; waits for the current stream.

    The readings are a few microseconds apart: the second kernel is launched while the first runs.
    """
    stream = torch.cuda.current_stream(device)
    stamps = torch.zeros(4, dtype=torch.int64, device=device)
    first, second = stamps.data_ptr(), stamps.data_ptr() + 2 * stamps.element_size()
    event = torch.cuda.Event(enable_timing=True)
    native.launch(
        "ep_busy", header.BusyArgs(stamps_ns=first, duration_ns=_BUSY_NS), stream.cuda_stream
    )
    event.record(stream)
    native.launch("ep_busy", header.BusyArgs(stamps_ns=second, duration_ns=0), stream.cuda_stream)
    _, before_ns, after_ns, _ = stamps.tolist()
    return Origin(event, (before_ns + after_ns) / 2 / 1e9)
