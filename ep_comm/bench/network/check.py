"""Dispatch and combine along every rail, and mixed: each row compared with what it has to be.

A rail joins ranks of different nodes that have the same number there. In round k every rank sends
all of its tokens to the rank on the node k after. In a mixed round tokens go anywhere. Rows are
small integers, which a rank can compute for every other rank, and whose sums are exact.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ep_comm import Buffer, EPConfig
from ep_comm.config import BackendName
from ep_comm.job.meeting import meet

MIXED_ROUNDS = 10
_TOPK = 4
_LARGEST = 8  # of a row's elements; times 4 of a rank's factor, times top-k: exact in BF16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is sent.

    Attributes:
        num_nodes: Nodes, two or more.
        ranks_per_node: Ranks of each.
        tokens: Of a rank in one operation.
        hidden: BF16 elements of a token.
        repeats: Operations that a time is the mean of.
    """

    num_nodes: int
    ranks_per_node: int
    tokens: int
    hidden: int
    repeats: int

    @property
    def num_ranks(self) -> int:
        """Ranks of all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def bytes(self) -> int:
        """Of one operation along a rail."""
        return self.tokens * self.hidden * torch.bfloat16.itemsize

    def config(self, backend: BackendName, timeout_s: float) -> EPConfig:
        """Return that of a buffer with one expert a rank."""
        return EPConfig(
            num_experts=self.num_ranks,
            hidden=self.hidden,
            max_tokens_per_rank=self.tokens,
            num_topk=min(_TOPK, self.num_ranks),
            ranks_per_node=self.ranks_per_node,
            backend=backend,
            timeout_s=timeout_s,
        )

    def rail_peer(self, rank: int, distance: int) -> int:
        """Return the rank with the same number on the node `distance` after."""
        return (rank + distance * self.ranks_per_node) % self.num_ranks


class Rail(NamedTuple):
    """One direction between two ranks.

    Attributes:
        source: Rank that sends.
        dest: Rank that receives.
        wrong_rows: Rows that arrived otherwise than they were sent, dispatch and combine together.
        dispatch_gb_per_s: While all rails of this distance are in use, both ways.
        combine_gb_per_s: The same.
        latency_us: Of a dispatch of one token, its launches included.
    """

    source: int
    dest: int
    wrong_rows: int
    dispatch_gb_per_s: float
    combine_gb_per_s: float
    latency_us: float


class Found(NamedTuple):
    """What one rank, or all of them together, found.

    Attributes:
        rails: Those that lead to it.
        wrong_mixed: Wrong rows of the mixed rounds, by (source, dest).
    """

    rails: list[Rail]
    wrong_mixed: dict[tuple[int, int], int]


class _Sent(NamedTuple):
    """How many rows were wrong, by the rank they came from; and the same operations again."""

    wrong: Counter[int]
    dispatch: Callable[[], object]
    combine: Callable[[], object]


def check_network(buffer: Buffer, sizes: Sizes, device: torch.device) -> Found:
    """Send along every rail and mixed, and return what all ranks found. Collective, and bounded.

    Raises:
        EPTimeoutError: A rank or message did not come within the buffer's `timeout_s`.
    """
    rank, wrong_mixed = buffer.rank, Counter[tuple[int, int]]()
    wrong, times = Counter[int](), defaultdict[int, dict[str, float]](dict)
    for distance in range(1, sizes.num_nodes):
        dest = sizes.rail_peer(rank, distance)
        source = sizes.rail_peer(rank, -distance)
        topk = torch.full((sizes.tokens, 1), dest)
        sent = _send(buffer, sizes, device, topk, seed=distance)
        one = _send(buffer, sizes, device, topk[:1], seed=-distance)
        wrong += sent.wrong + one.wrong
        # Rows of a dispatch come from the node before, those of its combine from the node after.
        times[source]["dispatch"] = _mean_us(sent.dispatch, device, sizes.repeats)
        times[dest]["combine"] = _mean_us(sent.combine, device, sizes.repeats)
        times[source]["latency"] = _mean_us(one.dispatch, device, sizes.repeats)
    for number in range(MIXED_ROUNDS):
        generator = torch.Generator().manual_seed(_seed(rank, number, 1))
        scores = torch.rand(sizes.tokens, sizes.num_ranks, generator=generator)
        topk = scores.topk(min(_TOPK, sizes.num_ranks)).indices
        sent = _send(buffer, sizes, device, topk, seed=1000 + number)
        wrong_mixed.update({(source, rank): count for source, count in sent.wrong.items()})
    rails = [
        Rail(
            source,
            rank,
            wrong[source],
            sizes.bytes / each["dispatch"] / 1e3,
            sizes.bytes / each["combine"] / 1e3,
            each["latency"],
        )
        for source, each in sorted(times.items())
    ]
    timeout_s = buffer.config.timeout_s
    answers = meet(
        buffer.group, "compare the network", Found(rails, wrong_mixed), timeout_s
    ).answers
    together = Counter[tuple[int, int]]()
    for each in answers:
        together.update(each.wrong_mixed)
    return Found([rail for each in answers for rail in each.rails], dict(together))


def _send(buffer: Buffer, sizes: Sizes, device: torch.device, topk: Tensor, seed: int) -> _Sent:
    """Dispatch to the ranks of `topk` [T, K], each of which has one expert, combine, check both."""
    rank, timeout_s = buffer.rank, buffer.config.timeout_s
    topk_of = meet(buffer.group, "tell who sends what", topk.tolist(), timeout_s).answers
    x = _rows(sizes, rank, len(topk), seed).to(device)
    out = buffer.dispatch(x, topk.to(device), layout="rank")
    assert isinstance(out.recv_x, Tensor)
    # A copy to the host holds the CUDA driver until the kernels before it have ended. They wait for
    # the network, and what carries its messages may need the driver.
    _finish(device)
    wrong = _wrong_received(sizes, rank, out.recv_x.cpu(), topk_of, seed)
    y = out.recv_x * _factor(rank)
    combined = buffer.combine(y, out.handle).combined_x
    _finish(device)
    wrong += _wrong_combined(sizes, x.cpu(), combined.cpu(), topk)
    return _Sent(
        wrong,
        lambda: buffer.dispatch(x, handle=out.handle),
        lambda: buffer.combine(y, out.handle),
    )


def _seed(rank: int, *numbers: int) -> int:
    seed = rank
    for number in numbers:
        seed = seed * 100_003 + number + 50_000
    return seed


def _rows(sizes: Sizes, rank: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(_seed(rank, seed))
    shape = (tokens, sizes.hidden)
    return torch.randint(-_LARGEST, _LARGEST + 1, shape, generator=generator).bfloat16()


def _factor(rank: int) -> int:
    """Return what a rank's "expert" multiplies by: another on neighbours."""
    return rank % 4 + 1


def _wrong_received(
    sizes: Sizes, rank: int, rows: Tensor, topk_of: list, seed: int
) -> Counter[int]:
    """Compare with the rows of all sources in order; too few or too many are all wrong."""
    wrong, first = Counter[int](), 0
    for source, topk in enumerate(topk_of):
        comes = (torch.tensor(topk) == rank).any(1)
        if not comes.any():
            continue
        want = _rows(sizes, source, len(topk), seed)[comes]
        got = rows[first : first + len(want)]
        first += len(want)
        same = (got == want).all(1) if len(got) == len(want) else torch.zeros(len(want)).bool()
        wrong[source] += int((~same).sum())
    if first != len(rows):
        wrong[rank] += abs(first - len(rows))
    return +wrong


def _wrong_combined(sizes: Sizes, x: Tensor, combined: Tensor, topk: Tensor) -> Counter[int]:
    """Compare with the known sum; a wrong row is blamed on the first rank of its token."""
    factors = torch.tensor([_factor(rank) for rank in range(sizes.num_ranks)])
    want = (x.float() * factors[topk].sum(1, keepdim=True)).bfloat16()
    wrong = Counter[int]()
    for token in (combined != want).any(1).nonzero()[:, 0].tolist():
        wrong[int(topk[token, 0])] += 1
    return wrong


def _mean_us(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the time of a call, of several one after the other: each needs the other ranks."""
    _finish(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    _finish(device)
    return (time.perf_counter() - begin) / repeats * 1e6


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
