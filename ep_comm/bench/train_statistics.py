"""Ratios to the dispatcher that a variant is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol


class Measured(Protocol):
    """As much of `ep_comm.bench.train.Block` as is needed here."""

    variant: str
    microbatches: int
    block: int
    step_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """Step time of the reference over the variant's, medians of a block; above 1 is faster.

    Attributes:
        of_blocks: One ratio a block.
    """

    of_blocks: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the blocks."""
        return median(self.of_blocks)

    @property
    def worst(self) -> float:
        """The block in which the variant looks worst."""
        return min(self.of_blocks)


def speedup(
    blocks: Sequence[Measured], variant: str, reference: str, microbatches: int
) -> Speedup | None:
    """How much faster `variant` is than `reference`; None if that was not measured."""

    def medians(name: str) -> dict[int, float]:
        return {
            b.block: median(b.step_ms)
            for b in blocks
            if (b.variant, b.microbatches) == (name, microbatches)
        }

    ours, theirs = medians(variant), medians(reference)
    if not ours or not theirs:
        return None
    return Speedup(of_blocks=tuple(theirs[block] / ours[block] for block in sorted(ours)))


def hidden_share(
    serial_ms: Sequence[float], overlapped_ms: Sequence[float], combine_ms: Sequence[float]
) -> float | None:
    """Part of the backward combine that the weight gradients hide; None if any is not known.

    (T_serial - T_overlapped) / T_combine, of medians: backward without and with the overlap, and
    the combine alone at its fastest.
    """
    if not (serial_ms and overlapped_ms and combine_ms):
        return None
    return (median(serial_ms) - median(overlapped_ms)) / median(combine_ms)
