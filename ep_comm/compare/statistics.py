"""How far a run's losses are from the reference's, and whether that is too far.

Every difference is of losses at the same step, after the same data. Training losses are smoothed
first: `smooth` takes the mean of the last `window` steps. The **noise** is the difference between
runs of alltoall that differ in nothing but the seed of their weights; of more than two, the largest
between any two. It is largest while the loss falls steeply, where one run is merely some steps
ahead of the other: the first quarter of the steps counts for no difference, neither of the noise
nor of a variant.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import combinations, islice
from statistics import fmean, median
from typing import Any

import numpy as np

from ep_comm.compare.plan import EP_COMM, REFERENCE, WIDE, seed_number, with_seed, without_seed
from ep_comm.pretrain.log_file import TOKENS_PER_S, TRAIN_LOSS, VALID_LOSS, WIRE_MIB, scalars

# Relative, between the losses of step 1: the same weights and data must give the same loss.
FIRST_STEP_TOLERANCE = 1e-3
_WARM_UP_STEPS = 5  # without which the throughput is taken, if there are others


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """What a variant may differ by.

    Attributes:
        noise: Of ep_comm: each of its differences, in units of the same one of the noise.
        fp8: Of an FP8 wire: the final losses, relative to those of the same model on a BF16 wire;
            of several seeds the mean.
    """

    noise: float = 1.0
    fp8: float = 0.005


@dataclass(frozen=True, kw_only=True)
class Run:
    """The numbers of one variant.

    Attributes:
        train: Loss of each step, from step 1 on.
        smoothed: The same, each the mean of the last steps up to it.
        valid: Validation loss, by the step after which it was taken; may be empty.
        tokens_per_s: Median over the steps, of all processes together.
        wire_mib: What the rank that sent most sent in a step, the median; None if the dispatcher
            does not count it.
    """

    train: np.ndarray
    smoothed: np.ndarray
    valid: dict[int, float]
    tokens_per_s: float
    wire_mib: float | None = None

    @property
    def final_train(self) -> float:
        """Smoothed loss of the last step."""
        return float(self.smoothed[-1])

    @property
    def final_valid(self) -> float | None:
        """The last validation loss."""
        return self.valid[max(self.valid)] if self.valid else None

    def has_losses_of(self, other: Run) -> bool:
        """Return whether all losses are the same, bit by bit."""
        return np.array_equal(self.train, other.train) and self.valid == other.valid


@dataclass(frozen=True, kw_only=True)
class Difference:
    """|Δ| of a run from the reference. Of smoothed training losses where nothing else is said.

    Attributes:
        first: Of step 1, not smoothed, relative to the reference's loss.
        largest: Over all steps after the first quarter.
        largest_step: Where that was.
        mean: Over all steps after the first quarter.
        final_train: Of the last step.
        final_valid: Of the last validation; None if there was none.
    """

    first: float
    largest: float
    largest_step: int
    mean: float
    final_train: float
    final_valid: float | None


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What another seed does: the largest of the same number of `Difference` over all pairs."""

    largest: float
    mean: float
    final_valid: float | None

    @property
    def at_the_end(self) -> float | None:
        """`final_valid`, but no less than `mean`: seeds may happen to end close to each other."""
        return None if self.final_valid is None else max(self.final_valid, self.mean)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A variant and its counterpart, trained with the same seeds.

    Attributes:
        counterpart: What it is compared with (`counterpart_of`).
        seeds: Seed numbers of which both were trained, ascending.
        final_train: Of each, how far the final training loss is above the counterpart's, relative.
        final_valid: The same of the final validation loss; empty if there was none.
    """

    counterpart: str
    seeds: tuple[int, ...]
    final_train: tuple[float, ...]
    final_valid: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number that must not be above its limit.

    Attributes:
        chance: What it may well be by chance; no more than the limit where that is not known.
    """

    what: str
    value: float
    limit: float
    chance: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it is not above its limit."""
        return self.value <= self.limit  # NaN does not pass

    @property
    def is_unclear(self) -> bool:
        """Above the limit, but not above what chance does."""
        return self.limit < self.value <= self.chance


def window_of(steps: int) -> int:
    """Return how many steps are averaged: a twentieth of the run, from 5 to 100."""
    return min(max(steps // 20, 5), 100)


def steps_skipped(steps: int) -> int:
    """Return how many steps at the beginning count for no difference."""
    return steps // 4


def smooth(losses: np.ndarray, window: int) -> np.ndarray:
    """Return means of the last `window` values up to each one, or of as many as there are."""
    sums = np.cumsum(np.insert(losses, 0, 0.0))
    ends = np.arange(1, len(losses) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def read_run(records: list[dict[str, Any]], steps: int) -> Run:
    """Return the numbers of a finished run of `steps` steps.

    Raises:
        ValueError: A step is missing.
    """
    losses = scalars(records, "train", TRAIN_LOSS)
    missing = [step for step in range(1, steps + 1) if step not in losses]
    if missing:
        raise ValueError(f"step {missing[0]} is missing")
    train = np.array([losses[step] for step in range(1, steps + 1)])
    rates = list(scalars(records, "train", TOKENS_PER_S).values())
    sent = [r[WIRE_MIB] for r in records if WIRE_MIB in r]
    return Run(
        train=train,
        smoothed=smooth(train, window_of(steps)),
        valid=scalars(records, "valid", VALID_LOSS),
        tokens_per_s=median(islice(rates, min(_WARM_UP_STEPS, len(rates) - 1), None)),
        wire_mib=median(sent) if sent else None,
    )


def difference(run: Run, reference: Run) -> Difference:
    """Return how far `run` is from `reference`; both have the same steps."""
    skipped = steps_skipped(len(run.train))
    smoothed = np.abs(run.smoothed - reference.smoothed)[skipped:]
    valid = None
    if run.final_valid is not None and reference.final_valid is not None:
        valid = abs(run.final_valid - reference.final_valid)
    return Difference(
        first=float(abs(run.train[0] - reference.train[0]) / reference.train[0]),
        largest=float(smoothed.max()),
        largest_step=int(smoothed.argmax()) + skipped + 1,
        mean=float(smoothed.mean()),
        final_train=float(smoothed[-1]),
        final_valid=valid,
    )


def equal_to_alltoall(name: str, runs: Mapping[str, Run]) -> bool:
    """Return whether a run has, at every step, the very loss of alltoall's of the same seed."""
    other = with_seed(REFERENCE, seed_number(name))
    return name != other and other in runs and runs[name].has_losses_of(runs[other])


def alltoall_among(names: Collection[str]) -> list[str]:
    """Return those that differ in the seed of the weights only, with the reference."""
    return [name for name in names if without_seed(name) == REFERENCE]


def noise_of(runs: Mapping[str, Run]) -> Noise | None:
    """Return how far the alltoall runs are from each other; None if there is but one."""
    alltoall = [runs[name] for name in alltoall_among(runs)]
    pairs = [difference(run, other) for run, other in combinations(alltoall, 2)]
    if not pairs:
        return None
    valid = [pair.final_valid for pair in pairs if pair.final_valid is not None]
    return Noise(  # NaN if one is, so that nothing passes by a seed that diverged
        largest=float(np.max([pair.largest for pair in pairs])),
        mean=float(np.max([pair.mean for pair in pairs])),
        final_valid=float(np.max(valid)) if valid else None,
    )


def offsets(runs: Mapping[str, Run]) -> dict[str, float]:
    """Return how far each run is above the mean of the alltoall runs, with its sign.

    Of smoothed training losses, the mean over all steps after the first quarter. Empty with fewer
    than three alltoall runs: of two, neither is the odd one.
    """
    alltoall = alltoall_among(runs)
    if len(alltoall) < 3:
        return {}
    level = {
        name: float(run.smoothed[steps_skipped(len(run.smoothed)) :].mean())
        for name, run in runs.items()
    }
    middle = fmean(level[name] for name in alltoall)
    return {name: level[name] - middle for name in runs}


def pairs_of(runs: Mapping[str, Run]) -> dict[str, Pairs]:
    """Return the pairs of each variant (no seeds) that has a seed in common with its counterpart.

    What a seed does to the loss is far more than what a dispatcher does; most of it is not in the
    differences of pairs.
    """
    found = {}
    names = dict.fromkeys(map(without_seed, runs))
    for name in names:
        counterpart = counterpart_of(name, names)
        numbers = [seed_number(run) for run in runs if without_seed(run) == name]
        seeds = [n for n in numbers if counterpart and with_seed(counterpart, n) in runs]
        if counterpart is None or not seeds:
            continue
        pairs = [(runs[with_seed(name, n)], runs[with_seed(counterpart, n)]) for n in seeds]
        found[name] = Pairs(
            counterpart=counterpart,
            seeds=tuple(seeds),
            final_train=tuple(_relative(a.final_train, b.final_train) for a, b in pairs),
            final_valid=tuple(
                _relative(a.final_valid, b.final_valid)
                for a, b in pairs
                if a.final_valid is not None and b.final_valid is not None  # all runs, or none
            ),
        )
    return found


def counterpart_of(name: str, among: Collection[str]) -> str | None:
    """Return what a variant is paired with; None if it has no counterpart, or none was trained.

    ep_comm is paired with alltoall, an FP8 wire with the BF16 wire of the same model. Names are
    without seeds. Where ep_comm was not asked for, alltoall takes its place.
    """
    if name == EP_COMM:
        return REFERENCE
    wide = WIDE.get(name)
    if wide == EP_COMM and EP_COMM not in among:
        return REFERENCE
    return wide if wide in among else None


def standard_error(values: Collection[float]) -> float | None:
    """Return that of the mean of these values; None if there is but one."""
    return float(np.std(list(values), ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def judge(runs: Mapping[str, Run], tolerances: Tolerances) -> dict[str, list[Check]]:
    """Return the checks of each variant that can be judged.

    ep_comm is judged where the noise is known, an FP8 wire where the same model was trained
    with a BF16 wire and the same seeds; the checks stand with the first of these seeds. Where that
    is one pair the noise, if known, is its chance: the runs of a pair part by rounding, and are
    soon as far apart as two seeds.
    """
    checks: dict[str, list[Check]] = {}
    noise = noise_of(runs)
    if EP_COMM in runs and noise is not None:
        found = difference(runs[EP_COMM], runs[REFERENCE])
        checks[EP_COMM] = _within_noise(found, noise, tolerances.noise)
    for name, pairs in pairs_of(runs).items():
        if name != EP_COMM:
            chance = {}
            if noise is not None and len(pairs.seeds) == 1:
                chance = _relative_noise(noise, runs[REFERENCE])
            checks[with_seed(name, pairs.seeds[0])] = _within_share(pairs, tolerances.fp8, chance)
    return checks


def _within_noise(found: Difference, noise: Noise, tolerance: float) -> list[Check]:
    checks = [
        Check(what="relative |Δ| of step 1", value=found.first, limit=FIRST_STEP_TOLERANCE),
        Check(what="largest |Δ|", value=found.largest, limit=tolerance * noise.largest),
        Check(what="mean |Δ|", value=found.mean, limit=tolerance * noise.mean),
    ]
    if found.final_valid is not None and noise.at_the_end is not None:
        limit = tolerance * noise.at_the_end
        checks.append(Check(what="final validation |Δ|", value=found.final_valid, limit=limit))
    return checks


def _relative_noise(noise: Noise, reference: Run) -> dict[str, float]:
    """Return the noise of the final losses, by name."""
    relative = {"train": noise.mean / reference.final_train}
    if noise.at_the_end is not None and reference.final_valid is not None:
        relative["validation"] = noise.at_the_end / reference.final_valid
    return relative


def _within_share(pairs: Pairs, tolerance: float, chance: Mapping[str, float]) -> list[Check]:
    of_seeds = f", mean of {len(pairs.seeds)} seeds" if len(pairs.seeds) > 1 else ""
    return [
        Check(
            what=f"final {loss} loss, relative |Δ|{of_seeds}",
            value=abs(fmean(relative)),
            limit=tolerance,
            chance=chance.get(loss, 0.0),
        )
        for loss, relative in (("train", pairs.final_train), ("validation", pairs.final_valid))
        if relative
    ]


def _relative(ours: float, theirs: float) -> float:
    return (ours - theirs) / theirs if theirs else math.inf
