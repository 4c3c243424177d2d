"""What the records of operations say: times and their tails, waits, who was late."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from ep_comm.telemetry.records import OpRecord

# A rank counts as waited for in an operation where that was more than this part of its time.
_NOTICEABLE = 0.1
# A rank is slow now where, from some operation on, at least this part of those that had to wait
# waited for it, and one of the last so many did. Mostly the first one of a step alone has to wait.
_MOST = 0.5
_RECENT = 64
_LEAST = 0.1  # of a typical wait for it; shorter ones do not count
_LONG, _ENOUGH = 5, 3  # a gap between waits for it, in typical ones, once there are enough of these


class Quantiles(NamedTuple):
    """A distribution in short; of no values all are NaN.

    Attributes:
        p50: Median.
        p90: 90th percentile.
        p99: 99th percentile.
        max: The largest.
        num: How many values there are.
    """

    p50: float
    p90: float
    p99: float
    max: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Return those of some values."""
        if not len(values):
            return cls(math.nan, math.nan, math.nan, math.nan, 0)
        array = np.asarray(values, dtype=np.float64)
        p50, p90, p99 = np.percentile(array, (50, 90, 99))
        return cls(float(p50), float(p90), float(p99), float(array.max()), len(array))


@dataclass(frozen=True, kw_only=True)
class OperationStats:
    """One kind of operation on one rank. Tuples are indexed by group rank.

    Attributes:
        kind: Such as "dispatch", or "combine of backward".
        seconds: Of one operation, waits included.
        wait_s_by_rank: Seconds that one operation waited for each rank, see `OpRecord`.
        rows_by_rank: Mean rows to each rank; of a low-latency dispatch over NVLink, from it.
        rows_by_expert: Mean rows that each local expert received in a dispatch; empty where that is
            not known, see `OpRecord.rows_of_experts`.
        wire_bytes: Mean bytes that left the rank.
    """

    kind: str
    seconds: Quantiles
    wait_s_by_rank: tuple[Quantiles, ...]
    rows_by_rank: tuple[float, ...]
    rows_by_expert: tuple[float, ...]
    wire_bytes: float

    @property
    def imbalance(self) -> float:
        """Rows of the fullest rank over the mean; 1 is even."""
        return max_over_mean(self.rows_by_rank)

    @property
    def expert_imbalance(self) -> float:
        """Rows of the fullest local expert over the mean; 1 is even, or not known."""
        return max_over_mean(self.rows_by_expert)


class SlowestRank(NamedTuple):
    """The rank that others wait for.

    Attributes:
        rank: Its number in the group.
        share: Part of the operations in which it was waited for longest, and noticeably, of those
            that had to wait.
        wait_s: Seconds that these operations waited for it, added up.
        since_s: Since when, by `time.monotonic`: from then on it was so in most of those.
        since_op: The operation with which that began, such as "dispatch #17".
    """

    rank: int
    share: float
    wait_s: float
    since_s: float
    since_op: str


@dataclass(frozen=True, kw_only=True)
class Stats:
    """The last operations of a buffer on one rank.

    Attributes:
        rank: This rank, in its group.
        num_ranks: Ranks of the group.
        operations: By kind.
        wait_share: Waiting over time, of all operations: 0 is none.
        slowest: The rank that this one waits for; None where it waits for none in particular.
    """

    rank: int
    num_ranks: int
    operations: dict[str, OperationStats]
    wait_share: float
    slowest: SlowestRank | None


@dataclass(frozen=True, kw_only=True)
class JobStats:
    """`Stats` of all ranks of a group.

    Attributes:
        ranks: By group rank.
        slowest: The rank that the others wait for most; None where they wait for none.
    """

    ranks: tuple[Stats, ...]

    @property
    def rows_by_expert(self) -> tuple[float, ...]:
        """Mean rows of each expert of the group in a forward dispatch; empty where not known."""
        of_ranks = [stats.operations.get("dispatch") for stats in self.ranks]
        found = [of_rank.rows_by_expert if of_rank else () for of_rank in of_ranks]
        return tuple(chain.from_iterable(found)) if all(found) else ()

    @property
    def rows_by_rank(self) -> tuple[float, ...]:
        """The same, added up for each rank: what its experts have to compute."""
        rows, num_ranks = self.rows_by_expert, len(self.ranks)
        size = len(rows) // num_ranks
        return tuple(sum(rows[r * size : (r + 1) * size]) for r in range(num_ranks)) if rows else ()

    @property
    def expert_imbalance(self) -> float:
        """Rows of the fullest expert of the group over the mean; 1 is even, or not known."""
        return max_over_mean(self.rows_by_expert)

    @property
    def rank_imbalance(self) -> float:
        """Rows of the fullest rank's experts over the mean; 1 is even, or not known."""
        return max_over_mean(self.rows_by_rank)

    @property
    def slowest(self) -> SlowestRank | None:
        """Of the ranks that others name, the one with the most seconds; of these, added up."""
        named: dict[int, list[SlowestRank]] = {}
        for stats in self.ranks:
            if stats.slowest is not None:
                named.setdefault(stats.slowest.rank, []).append(stats.slowest)
        if not named:
            return None
        most = max(named.values(), key=lambda found: sum(each.wait_s for each in found))
        first = min(most, key=lambda each: each.since_s)
        return first._replace(
            share=sum(each.share for each in most) / len(most),
            wait_s=sum(each.wait_s for each in most),
        )


def kind_of(record: OpRecord) -> str:
    """Return what `Stats` calls an operation of that kind."""
    return f"{record.op} of backward" if record.is_backward else record.op


def summarize(records: Iterable[OpRecord], rank: int, num_ranks: int) -> Stats:
    """Return what these records of one rank say, oldest first."""
    records = list(records)
    by_kind: dict[str, list[OpRecord]] = {}
    for record in records:
        by_kind.setdefault(kind_of(record), []).append(record)
    total_s = sum(record.seconds for record in records)
    waited_s = sum(longest_wait(record) for record in records)
    return Stats(
        rank=rank,
        num_ranks=num_ranks,
        operations={kind: _of_kind(kind, found, num_ranks) for kind, found in by_kind.items()},
        wait_share=min(1.0, waited_s / total_s) if total_s > 0 else 0.0,
        slowest=find_slowest(records),
    )


def longest_wait(record: OpRecord) -> float:
    """Return the seconds that an operation waited for its slowest rank."""
    return max(record.wait_s_by_rank, default=0.0)


def find_slowest(records: Sequence[OpRecord]) -> SlowestRank | None:
    """Return the rank that operations have to wait for, and since when."""
    late_ranks = [_late_rank(record) for record in records]
    if all(late is None for late in late_ranks[-_RECENT:]):
        return None
    waited = [i for i, late in enumerate(late_ranks) if late is not None]
    by_rank: dict[int, float] = {}
    for i in waited:
        late = late_ranks[i]
        assert late is not None
        by_rank[late] = by_rank.get(late, 0.0) + longest_wait(records[i])
    rank = max(by_rank, key=by_rank.__getitem__)
    of_rank = [i for i in waited if late_ranks[i] == rank]
    # Beside the waits that cost the most, those of the beginning of a run, say, are nothing.
    least = _LEAST * _typical([longest_wait(records[i]) for i in of_rank[-_RECENT:]])
    long = [i for i in waited if longest_wait(records[i]) >= least]
    since = _since(long, {i for i in long if late_ranks[i] == rank})
    if since is None:
        return None
    first = records[since]
    return SlowestRank(
        rank=rank,
        share=len(of_rank) / len(waited),
        wait_s=by_rank[rank],
        since_s=first.called_s,
        since_op=f"{first.op} #{first.epoch}",
    )


def _late_rank(record: OpRecord) -> int | None:
    rank = record.slowest_rank
    if rank is None or longest_wait(record) < _NOTICEABLE * record.seconds:
        return None
    return rank


def _typical(waits: Sequence[float]) -> float:
    """Return the wait in the middle of their sum: as many seconds are in longer ones as not."""
    ascending = np.sort(waits)
    so_far = np.cumsum(ascending)
    return float(ascending[np.searchsorted(so_far, so_far[-1] / 2)])


def _since(waited: Sequence[int], for_it: set[int]) -> int | None:
    """Return the first operation from which on most that had to wait have waited for one rank.

    Args:
        waited: Those that had to wait, ascending.
        for_it: Those of them that waited for it.
    """
    count, since = 0, None
    gaps: list[int] = []
    for place in range(len(waited) - 1, -1, -1):
        i = waited[place]
        if i not in for_it:
            continue
        if since is not None:
            gap = since - i
            if len(gaps) >= _ENOUGH and gap > _LONG * float(np.median(gaps)):
                break  # then it was on time for a while
            gaps.append(gap)
        count += 1
        if count < _MOST * (len(waited) - place):
            break
        since = i
    return since


def _of_kind(kind: str, records: Sequence[OpRecord], num_ranks: int) -> OperationStats:
    rows = [record.rows_to_rank or record.rows_from_rank for record in records]
    rows = [each for each in rows if each]
    of_experts = [record.rows_of_experts for record in records if record.rows_of_experts]
    waits = [record.wait_s_by_rank for record in records if record.wait_s_by_rank]
    return OperationStats(
        kind=kind,
        seconds=Quantiles.of([record.seconds for record in records]),
        wait_s_by_rank=tuple(
            Quantiles.of([wait[rank] for wait in waits]) for rank in range(num_ranks)
        ),
        rows_by_rank=tuple(np.mean(rows, axis=0).tolist()) if rows else (),
        rows_by_expert=tuple(np.mean(of_experts, axis=0).tolist()) if of_experts else (),
        wire_bytes=float(np.mean([record.wire_bytes for record in records])),
    )


def max_over_mean(values: Sequence[float]) -> float:
    """Return the largest over the mean; 1 of no values, and where all are 0."""
    mean = sum(values) / len(values) if values else 0.0
    return max(values) / mean if mean > 0 else 1.0
