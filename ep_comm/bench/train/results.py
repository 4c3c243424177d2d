"""What a run of ``ep-comm bench train`` found, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ep_comm.bench.timing import Summary, summarize
from ep_comm.bench.train.profile import Bar, Profile
from ep_comm.bench.train.settings import TrainSettings
from ep_comm.pretrain.variants import reference_of


@dataclass(frozen=True, kw_only=True)
class Block:
    """One variant, with one number of microbatches, in one block.

    Attributes:
        variant, microbatches, block: Which; blocks are counted from 0.
        step_ms: Each step, on the GPU's clock, on the slowest rank.
        host_ms: Each step, until the host went on to the next one, on the slowest rank.
        loss: Of the last step, the mean of the ranks.
        peak_bytes: Device memory at its highest on any rank, without that of the other variants'
            models: torch's, and ep_comm's buffers, which are not torch's; None on a CPU.
        num_allocations: Times that torch asked the driver for memory in these steps, most of any
            rank, which costs up to milliseconds, and ends when all sizes were seen; None on a CPU.
    """

    variant: str
    microbatches: int
    block: int
    step_ms: tuple[float, ...]
    host_ms: tuple[float, ...]
    loss: float
    peak_bytes: int | None
    num_allocations: int | None


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """One MoE layer alone; samples in ms, each the slowest rank's.

    Attributes:
        forward, backward, total: Of one pass, ranks aligned before the forward.
        combine: Our combine's kernels alone, of the backward's size, ranks aligned, with all SMs;
            empty with other dispatchers.
        hidden: Of each pair of passes, the backward with the weight gradients behind its combine
            less the backward with both at once, ranks aligned before it; empty without overlap.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    total: tuple[float, ...]
    combine: tuple[float, ...]
    hidden: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a variant alone, before the blocks, gave. Profiles are rank 0's, None without a GPU.

    Attributes:
        phases_ms: Forward times of a step, summed over the MoE layers: dispatch, expert, combine
            (`ep_comm.megatron.MoEMeter`), on the rank where they are longest; medians.
        imbalance: Tokens of the fullest rank and expert over the mean.
        layer: The first MoE layer alone.
        step: A step.
        layer_forward, layer_backward: The layer alone.
        backward_bars: What the GPU did in the layer's backward.
    """

    phases_ms: dict[str, float]
    imbalance: dict[str, float]
    layer: LayerTimes
    step: Profile | None = None
    layer_forward: Profile | None = None
    layer_backward: Profile | None = None
    backward_bars: tuple[Bar, ...] = field(default=(), repr=False)


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


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """Everything that was measured. Methods take a variant, and a number of microbatches.

    Attributes:
        settings: What was asked for.
        configs: The example's configuration of each variant, every key.
        vocab_size: Different tokens.
        device: "cuda" or "cpu".
        num_ranks: Ranks of the job.
        inspections: Of each variant.
        blocks: In the order measured.
    """

    settings: TrainSettings
    configs: dict[str, dict[str, Any]]
    vocab_size: int
    device: str
    num_ranks: int
    inspections: dict[str, Inspection]
    blocks: tuple[Block, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The first variant's configuration, for what all have in common."""
        return next(iter(self.configs.values()))

    def step_ms(self, name: str, count: int) -> Summary:
        """Return the times of all steps in all blocks."""
        return summarize(tuple(ms for block in self._blocks(name, count) for ms in block.step_ms))

    def tokens_per_s(self, name: str, count: int) -> float:
        """Return the tokens a second of one GPU, in the median step."""
        tokens = count * self.config["micro_batch_size"] * self.config["seq_length"]
        return 1e3 * tokens / self.step_ms(name, count).median

    def speedup(self, name: str, count: int) -> Speedup | None:
        """Return the speedup over the variant's reference; None if that was not measured."""
        theirs = {b.block: median(b.step_ms) for b in self._blocks(reference_of(name), count)}
        if not theirs:
            return None
        ratios = (theirs[b.block] / median(b.step_ms) for b in self._blocks(name, count))
        return Speedup(of_blocks=tuple(ratios))

    def peak_bytes(self, name: str, count: int) -> int | None:
        """Return the highest of all blocks; None where it is not known."""
        peaks = (b.peak_bytes for b in self._blocks(name, count))
        return max((peak for peak in peaks if peak is not None), default=None)

    def num_allocations(self, name: str, count: int) -> int | None:
        """Return the sum of all blocks; None where it is not known."""
        counts = [b.num_allocations for b in self._blocks(name, count)]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def memory_ratio(self, name: str, count: int) -> float | None:
        """Return peak memory over the reference's; None if either is not known."""
        mine, theirs = (self.peak_bytes(n, count) for n in (name, reference_of(name)))
        return mine / theirs if mine and theirs else None

    def loss(self, name: str, count: int) -> float:
        """Return that of the last step of the last block."""
        return [block.loss for block in self._blocks(name, count)][-1]

    def layer_ratio(self, name: str) -> float | None:
        """Return the reference's time of the layer alone, both ways, over the variant's."""
        reference = reference_of(name)
        if reference not in self.inspections:
            return None
        theirs, ours = (median(self.inspections[n].layer.total) for n in (reference, name))
        return theirs / ours

    def hidden_share(self, name: str) -> float | None:
        """Return the part of the backward combine that the weight gradients hide; None without.

        (T_serial - T_overlapped) / T_combine: the median of the pairs over that of the combine
        alone at its fastest.
        """
        layer = self.inspections[name].layer
        return median(layer.hidden) / median(layer.combine) if layer.hidden else None

    def _blocks(self, name: str, count: int) -> Iterator[Block]:
        return (b for b in self.blocks if (b.variant, b.microbatches) == (name, count))
