"""What torch's profiler tells of a piece of training: launches, host waits, GPU-busy time.

Everything is read from the trace that the profiler exports, a list of events in Chrome's format:
times in µs of one clock for host and GPU, and a number (``correlation``) that a kernel shares with
the call that launched it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from ep_comm.backends.nvlink.mailbox import Mailbox
from ep_comm.telemetry.profiles import GPU_WORK, Event, communication, gemms, read_profile, span_of
from ep_comm.telemetry.spans import covered, exposed

STEP, FORWARD, BACKWARD = "ep-comm bench: step", "ep-comm bench: forward", "ep-comm bench: backward"
_SIZES = "ep-comm bench: wait for sizes"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_WAITS = (
    *("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"),
    *("cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize"),
    _SIZES,
)

named = record_function


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One range of the host's program, and the GPU's work that was launched in it; times in µs.

    Attributes:
        kernels: Kernels.
        copies: Copies and fills.
        waits: Calls in which the host waited for the GPU: synchronisations (torch makes one in
            each copy to the host), and the wait for the sizes of a new dispatch, which NVLink's
            backend has outside of CUDA.
        wait_us: Host time in them.
        host_us: Host time of the range without them: Python, torch and launches, while the
            profiler records, which makes all of it slower.
        busy_us: Time in which at least one kernel or copy ran; kernels of a collective that wait
            for another rank are running.
        communication_us: Time in which tokens were on their way: by our kernels, or alltoall's.
        exposed_us: The part of it in which no matrix product ran.
        wall_us: From the begin of the range to its end on the host, or on the GPU if that is later.
    """

    kernels: int
    copies: int
    waits: int
    wait_us: float
    host_us: float
    busy_us: float
    communication_us: float
    exposed_us: float
    wall_us: float


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One kernel or copy on the GPU; times in µs."""

    name: str
    stream: int
    start_us: float
    duration_us: float


def record(call: Callable[[], object], device: torch.device, path: Path) -> list[Event]:
    """Profile the second of two calls, the first one warms the profiler up. Collective.

    Args:
        call: Is the range `STEP`.
        device: A GPU.
        path: Where rank 0 leaves the trace, gzipped.

    Returns:
        The trace's events; on other ranks none.
    """

    def export(profiler: profile) -> None:
        if dist.get_rank() == 0:
            profiler.export_chrome_trace(str(path))

    with (
        _visible_wait_for_sizes(),
        profile(
            activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA],
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=export,
        ) as profiler,
    ):
        for _ in range(2):
            with named(STEP):
                call()
            torch.cuda.synchronize(device)
            profiler.step()
    dist.barrier()  # exporting takes rank 0 a while
    return read_profile(path).events if dist.get_rank() == 0 else []


def summarize_trace(events: Iterable[Event], range_name: str) -> Profile:
    """Sum up a range that occurs once."""
    events = list(events)
    begin, end = _range(events, range_name)
    work = _launched(events, begin, end)
    waits = [
        event
        for event in events
        if event["name"] in _WAITS
        and event.get("cat") in (*_LAUNCHES, "user_annotation")
        and begin <= event["ts"] <= end
    ]
    wait_us = sum(event["dur"] for event in waits)
    spans = [span_of(event) for event in work]
    kernels = sum(event["cat"] == "kernel" for event in work)
    return Profile(
        kernels=kernels,
        copies=len(work) - kernels,
        waits=len(waits),
        wait_us=wait_us,
        host_us=end - begin - wait_us,
        busy_us=covered(spans),
        communication_us=covered(communication(work)),
        exposed_us=exposed(communication(work), gemms(work)),
        wall_us=max([end, *(stop for _, stop in spans)]) - begin,
    )


def bars(events: Iterable[Event], range_name: str) -> list[Bar]:
    """Return what the GPU did for a range, by time; 0 is the begin of the first."""
    events = list(events)
    work = sorted(_launched(events, *_range(events, range_name)), key=lambda event: event["ts"])
    return [
        Bar(
            name=event["name"],
            stream=event["args"]["stream"],
            start_us=event["ts"] - work[0]["ts"],
            duration_us=event["dur"],
        )
        for event in work
    ]


def _range(events: list[Event], name: str) -> tuple[float, float]:
    (found,) = (e for e in events if e["name"] == name and e.get("cat") == "user_annotation")
    return found["ts"], found["ts"] + found["dur"]


def _launched(events: list[Event], begin: float, end: float) -> list[Event]:
    """Return the GPU's work of launches between two times, by any thread: backward has its own."""
    correlations = {
        event["args"]["correlation"]
        for event in events
        if event.get("cat") in _LAUNCHES
        and begin <= event["ts"] <= end
        and "correlation" in event["args"]
    }
    return [
        event
        for event in events
        if event.get("cat") in GPU_WORK and event["args"]["correlation"] in correlations
    ]


@contextmanager
def _visible_wait_for_sizes() -> Iterator[None]:
    """Give the wait for the sizes of a new dispatch, which polls memory, a name in the trace."""
    original = Mailbox.sizes

    def sizes(self: Mailbox, *args: Any) -> Any:
        with named(_SIZES):
            return original(self, *args)

    setattr(Mailbox, "sizes", sizes)  # noqa: B010  (a patch, which mypy takes no assignment for)
    try:
        yield
    finally:
        setattr(Mailbox, "sizes", original)  # noqa: B010
