"""Traces of torch's profiler: events in Chrome's format, on one clock for host and GPU.

Their times are µs after ``baseTimeNanoseconds``, which is wall clock time: the host's stamps are of
the processor's counter, CUPTI interpolates the GPU's into it, and the profiler converts both.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ep_comm.telemetry.spans import Span

Event = dict[str, Any]

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_OURS = ("combine", "dispatch")
_ALLTOALL = "sendrecv"  # in the name of the kernel of NCCL's that sends messages
_GEMM = "GEMM"
# Kind, and what the kernels' names contain; the first kind that fits counts. CUTLASS has attention
# too: its GEMMs say so.
_KINDS = (
    ("combine", ("combine_kernel",)),
    ("dispatch", ("dispatch_kernel", "send_kernel", "receive_kernel")),
    ("NCCL", ("nccl",)),
    (_GEMM, ("gemm", "nvjet")),
    ("other", ("",)),
)
KINDS = tuple(kind for kind, _ in _KINDS)
# Operators of a CPU that are, or begin with, a matrix product.
_CPU_GEMMS = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"),
    *("aten::_scaled_mm", "aten::mkldnn_linear"),
)


class ProfileError(ValueError):
    """A file is no trace of torch's profiler, or does not say what is needed; names it."""


class Profile(NamedTuple):
    """The trace of one rank.

    Attributes:
        path: Where it was read.
        rank: In the job; None where torch.distributed was not initialised.
        base_ns: Wall clock time, in ns, from which its events count.
        document: All of it.
    """

    path: Path
    rank: int | None
    base_ns: int
    document: dict[str, Any]

    @property
    def events(self) -> list[Event]:
        """The events that have a duration; begin ("ts") and duration ("dur") in µs."""
        return [event for event in self.document["traceEvents"] if event.get("ph") == "X"]


def kernel_kind(kernel: str) -> str:
    """Return what a kernel does, by its name: one of `KINDS`."""
    name = kernel.lower()
    return next(kind for kind, parts in _KINDS if any(part in name for part in parts))


def read_profile(path: Path) -> Profile:
    """Read a trace as ``export_chrome_trace`` wrote it, gzipped or not.

    Raises:
        OSError: It cannot be read.
        ProfileError: It is no such trace.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            document = json.load(file)
    except (EOFError, gzip.BadGzipFile, ValueError) as error:
        raise ProfileError(f"{path} is no trace of torch's profiler: {error}") from None
    if not isinstance(document, dict) or "traceEvents" not in document:
        raise ProfileError(f'{path} is no trace of torch\'s profiler: it has no "traceEvents"')
    if "schemaVersion" not in document or "baseTimeNanoseconds" not in document:
        raise ProfileError(
            f"{path} does not say when it began: torch's profiler writes schemaVersion and "
            "baseTimeNanoseconds"
        )
    rank = document.get("distributedInfo", {}).get("rank")
    return Profile(path, rank, int(document["baseTimeNanoseconds"]), document)


def span_of(event: Event) -> Span:
    """Return begin and end of an event, in µs."""
    return event["ts"], event["ts"] + event["dur"]


def gemms(events: Iterable[Event]) -> list[Span]:
    """Return the spans of matrix products: kernels, or operators where there are no kernels."""
    events = list(events)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if kernels:
        return [span_of(event) for event in kernels if kernel_kind(event["name"]) == _GEMM]
    return [
        span_of(event)
        for event in events
        if event.get("cat") == "cpu_op" and event["name"] in _CPU_GEMMS
    ]


def communication(events: Iterable[Event]) -> list[Span]:
    """Return the spans of kernels that bring tokens to experts and back: ours, or alltoall's.

    NCCL's other collectives, of gradients and parameters, are not among them.
    """
    return [
        span_of(event)
        for event in events
        if event.get("cat") == "kernel"
        and (kernel_kind(event["name"]) in _OURS or _ALLTOALL in event["name"].lower())
    ]
