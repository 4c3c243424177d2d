"""How a GPU's clock stands to the host's."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from ep_comm._native import NativeLibrary, header

_READINGS = 20


class Clock(NamedTuple):
    """A clock, against this host's `time.monotonic`.

    Attributes:
        ahead_s: Seconds by which it is ahead.
        error_s: By how much that may be wrong, either way.
    """

    ahead_s: float
    error_s: float


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
