"""What the operations of a soak must give, by sums on the device. Nothing here is of ep_comm.

Every rank draws the inputs of all ranks, the same ones. A row's sum is that of its bits times odd
numbers, modulo 2**64: one wrong bit always changes it. So what a rank receives is known to it row
by row, and in which order. Rows to combine are small integers: their sums are exact in any order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_WINDOW = 20  # operations between two looks at what was found: each look waits for the device
_LARGEST = 4  # of what is combined; times the factor 2 of an expert, of a weight, and top-8: 128
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class Place(NamedTuple):
    """Which rank of how many, on which device."""

    rank: int
    num_ranks: int
    device: torch.device


class Inputs(NamedTuple):
    """Those of all ranks; N = ranks times most tokens of one, in rank order.

    Attributes:
        tokens: Of each rank.
        topk: [R, T, K] int64; all -1 where a rank has no such token.
        x: [N, H], any bits.
        z: [N, H] small integers, to combine.
        weights: FP32 [R, T, K].
    """

    tokens: list[int]
    topk: Tensor
    x: Tensor
    z: Tensor
    weights: Tensor


class Rows(NamedTuple):
    """Where the rows of this rank come from: row `row` of `total` is token n for local expert e."""

    n: Tensor
    e: Tensor
    row: Tensor
    total: int


class Checker:
    """Knows what has to come, and counts what comes otherwise.

    Args:
        place: This rank.
        config: The buffer's sizes.
        number: Operations before this round.
        plant: Operation from which on one result gets a wrong bit on the last rank, or None.
    """

    def __init__(self, place: Place, config: Any, number: int, plant: int | None) -> None:
        self.place, self.config, self.number, self.plant = place, config, number, plant
        self.per_rank = config.num_experts // place.num_ranks
        self.generator = torch.Generator(place.device)
        self.generator.manual_seed(number * 1_000_003 + config.hidden)
        self._keys = self._integers(-(2**62), 2**62, (config.hidden,), torch.int64) * 2 + 1
        self._factors = self._integers(1, 3, (config.num_experts,), torch.int64)
        self._found = torch.zeros(_WINDOW, dtype=torch.int64, device=place.device)
        self._labels: list[str] = []
        self._wrong = 0

    # --- inputs ----------------------------------------------------------------------------------

    def draw(
        self, tokens: list[int], dtype: torch.dtype, num_topk: int, skew: float, drop: float
    ) -> Inputs:
        """Draw the inputs of one dispatch and one combine. `skew` prefers the first experts."""
        num_experts, most = self.config.num_experts, max(*tokens, 1)
        shape = (len(tokens), most)
        experts = torch.arange(num_experts, device=self.place.device)
        scores = self._random((*shape, num_experts)) / (1.0 + experts) ** skew
        topk = scores.topk(num_topk, dim=2).indices
        topk[self._random(topk.shape) < drop] = -1
        for rank, count in enumerate(tokens):
            topk[rank, count:] = -1
        size = dtype.itemsize
        rows = (shape[0] * most, self.config.hidden)
        bits = self._integers(-(2 ** (8 * size - 1)), 2 ** (8 * size - 1), rows, _BITS[size])
        z = self._integers(-_LARGEST, _LARGEST + 1, rows, torch.int64).to(dtype)
        return Inputs(tokens, topk, bits.view(dtype), z, self._random(topk.shape))

    def own(self, of_all: Tensor, inputs: Inputs) -> Tensor:
        """Return this rank's part of [N, ...] or [R, T, ...], contiguous."""
        rank = self.place.rank
        shaped = of_all.view(len(inputs.tokens), -1, of_all.shape[-1])
        return shaped[rank, : inputs.tokens[rank]].contiguous()

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.place.device)

    def _integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(
            low, high, shape, generator=self.generator, device=self.place.device, dtype=dtype
        )

    # --- what has to come ------------------------------------------------------------------------

    def hits(self, inputs: Inputs) -> Tensor:
        """Return which tokens [N] chose which local experts [E]."""
        first = self.place.rank * self.per_rank
        local = torch.arange(first, first + self.per_rank, device=self.place.device)
        chosen = inputs.topk.flatten(0, 1)[:, :, None] == local
        return chosen.any(1)

    def rows_by_expert(self, hits: Tensor, alignment: int) -> Rows:
        """Groups in the order of experts, each padded; in a group by rank, then by token."""
        counts = hits.sum(0)
        padded = (counts + alignment - 1) // alignment * alignment
        first = padded.cumsum(0) - padded
        n, e = hits.nonzero(as_tuple=True)
        return Rows(n, e, first[e] + hits.cumsum(0)[n, e] - 1, int(padded.sum()))

    def slots_by_expert(self, hits: Tensor, slots: int) -> Rows:
        """The same where each expert has that many slots."""
        n, e = hits.nonzero(as_tuple=True)
        return Rows(n, e, e * slots + hits.cumsum(0)[n, e] - 1, hits.shape[1] * slots)

    def rows_by_rank(self, hits: Tensor) -> Tensor:
        """Return the tokens [N'] that come, one row each, by rank and then by token."""
        return hits.any(1).nonzero(as_tuple=True)[0]

    def weights_by_expert(self, inputs: Inputs) -> Tensor:
        """Return [N, E]: what each token sends to each local expert; 0 where nothing."""
        first = self.place.rank * self.per_rank
        topk, weights = inputs.topk.flatten(0, 1) - first, inputs.weights.flatten(0, 1)
        is_local = (topk >= 0) & (topk < self.per_rank)
        found = torch.zeros(len(topk), self.per_rank, device=self.place.device)
        n, k = is_local.nonzero(as_tuple=True)
        found[n, topk[n, k]] = weights[n, k]
        return found

    def sums(self, rows: Tensor) -> Tensor:
        """Return the sum of each row's bits, int64."""
        return (rows.contiguous().view(_BITS[rows.dtype.itemsize]).long() * self._keys).sum(-1)

    def factors(self, local: Tensor) -> Tensor:
        """Return the factor of each local expert."""
        return self._factors[local + self.place.rank * self.per_rank]

    def combined(self, inputs: Inputs, weights: Tensor | None = None) -> Tensor:
        """Return this rank's [T, H] combined: each row times its experts' factors and weights."""
        topk = self.own(inputs.topk, inputs)
        factor = torch.where(topk >= 0, self._factors[topk.clamp(min=0)], 0).double()
        if weights is not None:
            factor = factor * weights
        z = self.own(inputs.z, inputs)
        return (z.double() * factor.sum(1, keepdim=True)).to(z.dtype)

    def placed(self, total: int, row: Tensor, values: Tensor) -> Tensor:
        """Return [total, ...] with `values` in their rows, and 0 in all others."""
        found = values.new_zeros(total, *values.shape[1:])
        found[row] = values
        return found

    # --- what has come ---------------------------------------------------------------------------

    def begin(self, label: str) -> None:
        """Begin to look at one operation's results."""
        if len(self._labels) == _WINDOW:
            self.flush()
        self._labels.append(f"operation {self.number}: {label}")
        self.number += 1

    def plant_in(self, rows: Tensor, places: Tensor) -> None:
        """Flip one bit of these rows, where it is time for it and there is a row."""
        is_last = self.place.rank == self.place.num_ranks - 1
        if is_last and self.plant is not None and self.number > self.plant and len(places):
            rows.view(_BITS[rows.dtype.itemsize])[int(places[-1]), 7] ^= 1
            self.plant = None

    def compare(self, actual: Tensor, expected: Tensor) -> None:
        """Count what differs in one result of the operation that began last."""
        slot = self._found[len(self._labels) - 1]
        if actual.shape != expected.shape:
            print(f"{self._labels[-1]}: {list(actual.shape)}, not {list(expected.shape)}")
            slot += 1
        else:
            slot += (actual != expected).sum()

    def flush(self) -> int:
        """Wait for the device, tell what was wrong, and return how many results were so far."""
        if self.place.device.type == "cuda":
            torch.cuda.synchronize()
        for label, count in zip(self._labels, self._found.tolist(), strict=False):
            if count:
                print(f"WRONG on rank {self.place.rank}, {count} values of {label}", flush=True)
                self._wrong += 1
        self._labels.clear()
        self._found.zero_()
        return self._wrong
