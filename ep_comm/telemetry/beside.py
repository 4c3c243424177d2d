"""Our operations beside what torch's profiler saw: one file, and what of them nothing hid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from ep_comm.telemetry.profiles import Event, Profile, ProfileError, gemms, kernel_kind, span_of
from ep_comm.telemetry.spans import Span, covered, exposed

_PIDS_OF_RANK = 1000  # more processes and GPUs than a trace of one rank has


class Beside(NamedTuple):
    """One rank's operations beside its profile; times in µs.

    Attributes:
        rank: In the buffer's group.
        num_operations: Those that lie within the profile.
        communication_us: Time in which at least one of them ran, waits included.
        exposed_us: The part of it in which no matrix product ran on that rank.
        apart_us: By how much our combines are later than those that the profiler saw: median, and
            the one furthest from zero; None where it saw none.
        num_compared: How many combines that was found from.
    """

    rank: int
    num_operations: int
    communication_us: float
    exposed_us: float
    apart_us: tuple[float, float] | None
    num_compared: int

    @property
    def exposed_share(self) -> float:
        """The part of the communication that no matrix product ran beside."""
        return self.exposed_us / self.communication_us


def operations(trace: dict[str, Any], rank: int) -> list[Event]:
    """Return the events of a rank in a trace of ours, by time."""
    found = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == rank]
    return sorted(found, key=lambda event: event["ts"])


def group_rank(trace: dict[str, Any], profile: Profile) -> int:
    """Return which rank of the trace's group recorded a profile.

    Raises:
        ProfileError: None, or the profile does not say its rank.
    """
    if profile.rank is None:
        raise ProfileError(
            f"{profile.path} does not say its rank: it was recorded where torch.distributed was "
            "not initialised"
        )
    for name, rank in trace["otherData"]["rank in the job"].items():
        if rank == profile.rank:
            return int(name.removeprefix("rank "))
    raise ProfileError(
        f"{profile.path} is of rank {profile.rank} of the job, which is not in the trace"
    )


def later_us(trace: dict[str, Any], profile: Profile) -> float:
    """Return what to add to the times of a profile to have those of the trace."""
    return (profile.base_ns - trace["baseTimeNanoseconds"]) / 1e3


def beside(trace: dict[str, Any], profile: Profile) -> Beside:
    """Set a rank's operations beside its profile.

    Raises:
        ProfileError: It is of no rank of the trace, or of another time; or only one of the two has
            times of a GPU.
    """
    rank = group_rank(trace, profile)
    events, later = profile.events, later_us(trace, profile)
    on_gpu = trace["otherData"]["clock error, us"][f"rank {rank}"] > 0
    has_kernels = any(event.get("cat") == "kernel" for event in events)
    if on_gpu and not has_kernels:
        raise ProfileError(f"{profile.path} has no kernels: record it with ProfilerActivity.CUDA")
    if has_kernels and not on_gpu:
        raise ProfileError(
            f"{profile.path} has kernels, and the operations of rank {rank} were timed by the "
            "host: the reference backend over NCCL does not know when they ran"
        )
    spans = [span_of(event) for event in events if event.get("cat") != "Trace"]
    begin = min((start for start, _ in spans), default=0.0) + later
    end = max((stop for _, stop in spans), default=0.0) + later
    ours = [
        event
        for event in operations(trace, rank)
        if begin <= event["ts"] and event["ts"] + event["dur"] <= end
    ]
    if not ours:
        raise ProfileError(
            f"no operation of rank {rank} in the trace is from the time of {profile.path}: write "
            "the trace right after the profile, with enough operations"
        )
    spans_of_ours = [span_of(event) for event in ours]
    products = [(start + later, stop + later) for start, stop in gemms(events)]
    apart = _apart(ours, [(start + later, stop + later) for start, stop in _combines(events)])
    return Beside(
        rank=rank,
        num_operations=len(ours),
        communication_us=covered(spans_of_ours),
        exposed_us=exposed(spans_of_ours, products),
        apart_us=(median(apart), max(apart, key=abs)) if apart else None,
        num_compared=len(apart),
    )


def merge(trace: dict[str, Any], profiles: Sequence[Profile]) -> dict[str, Any]:
    """Return one document with the operations of all ranks and the profiles of some.

    Every rank's rows stand together. Times are those of the trace.

    Raises:
        ProfileError: Two profiles are of one rank; or as `group_rank`.
    """
    merged = [
        {**event, "pid": event["pid"] * _PIDS_OF_RANK, "args": _named(event)}
        for event in trace["traceEvents"]
    ]
    ranks = sorted({event["pid"] for event in trace["traceEvents"]})
    merged += [_sorted_at(rank * _PIDS_OF_RANK) for rank in ranks]
    seen: dict[int, Profile] = {}
    for profile in profiles:
        rank = group_rank(trace, profile)
        if rank in seen:
            raise ProfileError(f"{seen[rank].path} and {profile.path} are both of rank {rank}")
        seen[rank] = profile
        merged += _moved(profile, rank, later_us(trace, profile))
    return {**trace, "traceEvents": merged}


def _moved(profile: Profile, rank: int, later: float) -> Iterable[Event]:
    """Yield a profile's events on the axis of the trace, with processes and flows of their own."""
    pids: dict[Any, int] = {}
    for event in profile.document["traceEvents"]:
        own = event.get("pid")
        if own not in pids:
            pids[own] = rank * _PIDS_OF_RANK + 1 + len(pids)
            yield _sorted_at(pids[own])
        if event["ph"] == "M" and event["name"] == "process_sort_index":
            continue
        moved = {**event, "pid": pids[own]}
        if "ts" in event:
            moved["ts"] = event["ts"] + later
        if isinstance(event.get("id"), int):  # what an arrow connects
            moved["id"] = (rank << 40) + event["id"]
        if event["ph"] == "M" and event["name"] == "process_name":
            moved["args"] = {"name": f"rank {rank}: {event['args']['name']}"}
        yield moved


def _sorted_at(pid: int) -> Event:
    args = {"sort_index": pid}
    return {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": args}


def _named(event: Event) -> dict[str, Any]:
    if event["name"] != "process_name":
        return event["args"]
    return {"name": f"ep_comm, {event['args']['name']}"}


def _combines(events: Iterable[Event]) -> list[Span]:
    """Return the combines that the profiler saw: kernels, or calls where there are no kernels.

    A combine is one kernel; other operations are several.
    """
    events = list(events)
    if any(event.get("cat") == "kernel" for event in events):
        return [
            span_of(event)
            for event in events
            if event.get("cat") == "kernel"
            and kernel_kind(event["name"]) == "combine"
            and "low_latency" not in event["name"]
        ]
    return [span_of(event) for event in events if event["name"] == "ep_comm::combine"]


def _apart(ours: Iterable[Event], theirs: Sequence[Span]) -> list[float]:
    """Return the µs by which the middle of the combine nearest to each of theirs is later."""
    middles = [(start + stop) / 2 for start, stop in theirs]
    own = [
        event["ts"] + event["dur"] / 2 for event in ours if event["name"].startswith("combine #")
    ]
    return [min((mine - middle for mine in own), key=abs) for middle in middles if own]
