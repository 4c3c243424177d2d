"""What ``ep-comm doctor --network`` says: a table of the rails, and whom it suspects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

from rich.console import Group

from ep_comm.bench.network.check import Found, Rail, Sizes
from ep_comm.bench.tables import screen_table
from ep_comm.errors import EPTimeoutError

_MOST_RAILS = 32  # lines of the table
_SLOW = 0.7  # of the median: a rail that is below that is named


class Member(NamedTuple):
    """What a rank says of itself.

    Attributes:
        host: Name of its host.
        local_rank: Its number there.
        settings: Of the network, in one line.
        hints: What on its host may be in the way.
    """

    host: str
    local_rank: int
    settings: str
    hints: list[str]

    def __str__(self) -> str:
        """Return "gpu01:3"."""
        return f"{self.host}:{self.local_rank}"


def render(found: Found, sizes: Sizes, members: Sequence[Member], backend: str) -> Group:
    """Return the table, and a line for each thing that is not as it should be."""
    columns = ("rail", "ranks", "dispatch GB/s", "combine GB/s", "1 token, µs", "rows")
    table = screen_table(f"{sizes.num_nodes} nodes of {sizes.ranks_per_node}: {backend}", columns)
    shown = sorted(found.rails, key=lambda rail: (-rail.wrong_rows, rail.dispatch_gb_per_s))
    for rail in sorted(shown[:_MOST_RAILS]):
        table.add_row(*_cells(rail, members))
    heading = f"{sizes.bytes / 1e6:.1f} MB an operation; rails of a distance are used at once"
    return Group(table, f"  {heading}", *(f"  {line}" for line in _lines(found, shown, members)))


def is_sound(found: Found) -> bool:
    """Return whether every row arrived as it was sent."""
    return not found.wrong_mixed and not any(rail.wrong_rows for rail in found.rails)


def timeout_text(error: EPTimeoutError, members: Sequence[Member]) -> str:
    """Return the error with the names of the hosts."""
    late = ", ".join(f"rank {r} on {members[r]}" for r in error.late_ranks) or "an unknown rank"
    return (
        f"rank {error.rank} on {members[error.rank]} waited {error.timeout_s:g} s for {late} "
        f"({error.op} #{error.epoch}, phase {error.phase}): nothing of it arrived"
    )


def hint_lines(members: Sequence[Member]) -> list[str]:
    """Return what may be in the way, and on which hosts."""
    hosts_of: dict[str, list[str]] = {}
    for member in members:
        for hint in member.hints:
            hosts = hosts_of.setdefault(hint, [])
            if member.host not in hosts:
                hosts.append(member.host)
    lines = [f"{_few(hosts)}: {hint}" for hint, hosts in hosts_of.items()]
    settings = {member.settings for member in members}
    if len(settings) > 1:
        lines.append(f"hosts have different settings: {'; '.join(sorted(settings))}")
    return lines


def _cells(rail: Rail, members: Sequence[Member]) -> list[str]:
    return [
        f"{members[rail.source]} → {members[rail.dest]}",
        f"{rail.source} → {rail.dest}",
        f"{rail.dispatch_gb_per_s:.3g}",
        f"{rail.combine_gb_per_s:.3g}",
        f"{rail.latency_us:.0f}",
        f"{rail.wrong_rows} WRONG" if rail.wrong_rows else "right",
    ]


def _lines(found: Found, shown: Sequence[Rail], members: Sequence[Member]) -> Iterable[str]:
    if len(shown) > _MOST_RAILS:
        yield f"the {_MOST_RAILS} slowest of {len(shown)} rails"
    for (source, dest), rows in sorted(found.wrong_mixed.items())[:_MOST_RAILS]:
        yield (
            f"WRONG: {rows} rows between rank {source} on {members[source]} and rank {dest} on "
            f"{members[dest]}, where tokens go anywhere"
        )
    bad = [(rail.source, rail.dest) for rail in found.rails if rail.wrong_rows]
    yield from _suspects("wrong rows", [*bad, *found.wrong_mixed], members)
    usual = median(rail.dispatch_gb_per_s for rail in found.rails)
    slow = [
        (rail.source, rail.dest) for rail in found.rails if rail.dispatch_gb_per_s < _SLOW * usual
    ]
    if slow:
        names = _few([f"{members[source]} → {members[dest]}" for source, dest in slow])
        yield f"slow: {names}, less than {_SLOW:g} of the median {usual:.3g} GB/s"
        yield from _suspects("slow rails", slow, members)
    if is_sound(found):
        yield "every row arrived as it was sent"


def _suspects(
    what: str, pairs: Sequence[tuple[int, int]], members: Sequence[Member]
) -> Iterable[str]:
    """Name the host, or the local rank, that all pairs have in common."""
    pairs = sorted(set(pairs))
    hosts = Counter(host for pair in pairs for host in {members[rank].host for rank in pair})
    common = [host for host, count in hosts.items() if count == len(pairs)]
    if pairs and len(common) == 1:
        yield f"all {what} have host {common[0]} at one end"
    locals_ = {members[rank].local_rank for pair in pairs for rank in pair}
    if pairs and len(locals_) == 1:
        yield f"all {what} are of GPUs with number {locals_.pop()}: see the card of that rail"


def _few(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest
