"""What a run of ``ep-comm bench train`` found, and what follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ep_comm.bench.timing import summarize
from ep_comm.bench.train.profile import Bar, Profile
from ep_comm.bench.train.settings import TrainSettings
from ep_comm.pretrain.variants import reference_of, references_of


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
    """What a variant alone gave. Profiles are rank 0's, None without a GPU.

    Attributes:
        phases_ms: Forward times of a step, summed over the MoE layers: dispatch, expert, combine
            (`ep_comm.megatron.MoEMeter`), on the rank where they are longest; medians.
        imbalance: Tokens of the fullest rank and expert over the mean.
        layer: The first MoE layer alone.
        step: A step.
        layer_forward, layer_backward: The layer alone.
        backward_bars: What the GPU did in the layer's backward.
        dropped: Share of the tokens' selections of experts that their capacity dropped, over all
            ranks; None without a capacity.
    """

    phases_ms: dict[str, float]
    imbalance: dict[str, float]
    layer: LayerTimes
    step: Profile | None = None
    layer_forward: Profile | None = None
    layer_backward: Profile | None = None
    backward_bars: tuple[Bar, ...] = field(default=(), repr=False)
    dropped: float | None = None


@dataclass(kw_only=True)
class TrainRun:
    """What was measured so far. Methods take a variant, and a number of microbatches.

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
    inspections: dict[str, Inspection] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """The first variant's configuration, for what all have in common."""
        return next(iter(self.configs.values()))

    def figures(self, name: str, count: int) -> dict[str, Any]:
        """Return what the steps of a variant gave, as ``bench-train.json`` has it.

        A ratio of times is the reference's over the variant's, above 1 is faster; the ratio of
        memory is the variant's over the reference's. They are None without the reference. Of
        several that were measured the reference is the one with the least median.
        """
        blocks, reference = self._blocks(name, count), self._reference(name, count)
        references = self._blocks(reference, count)
        step = summarize([ms for block in blocks for ms in block.step_ms])
        ratios = tuple(
            median(theirs.step_ms) / median(ours.step_ms)
            for ours, theirs in zip(blocks, references, strict=bool(references))
        )
        peak, their_peak = _peak_bytes(blocks), _peak_bytes(references)
        allocations = [b.num_allocations for b in blocks if b.num_allocations is not None]
        tokens = count * self.config["micro_batch_size"] * self.config["seq_length"]
        return {
            "variant": name,
            "microbatches": count,
            "step_ms": asdict(step),
            "tokens_per_s_per_gpu": 1e3 * tokens / step.median,
            "reference": reference,
            "ratio_of_blocks": ratios or None,
            "ratio_median": median(ratios) if ratios else None,
            "ratio_worst": min(ratios, default=None),
            "peak_bytes": peak,
            "memory_ratio": peak / their_peak if peak and their_peak else None,
            "num_allocations": sum(allocations) if len(allocations) == len(blocks) else None,
            "loss": blocks[-1].loss,
        }

    def _reference(self, name: str, count: int) -> str:
        measured = {
            reference: median(ms for block in blocks for ms in block.step_ms)
            for reference in references_of(name)
            if (blocks := self._blocks(reference, count))
        }
        return min(measured, key=measured.__getitem__, default=reference_of(name))

    def layer_ratio(self, name: str) -> float | None:
        """Return the reference's time of the layer alone, both ways, over the variant's."""
        reference = reference_of(name)
        if not {name, reference} <= self.inspections.keys():
            return None
        theirs, ours = (median(self.inspections[n].layer.total) for n in (reference, name))
        return theirs / ours

    def hidden_share(self, name: str) -> float | None:
        """Return the part of the backward combine that the weight gradients hide; None without.

        (T_serial - T_overlapped) / T_combine: the median of the pairs over that of the combine
        alone at its fastest.
        """
        found = self.inspections.get(name)
        if found is None or not found.layer.hidden:
            return None
        return median(found.layer.hidden) / median(found.layer.combine)

    def _blocks(self, name: str, count: int) -> list[Block]:
        return [b for b in self.blocks if (b.variant, b.microbatches) == (name, count)]


def _peak_bytes(blocks: list[Block]) -> int | None:
    return max((b.peak_bytes for b in blocks if b.peak_bytes is not None), default=None)
