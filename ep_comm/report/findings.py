"""What stands out in a run, in words, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ep_comm.pretrain.log_file import TRAIN_LOSS, VALID_LOSS
from ep_comm.report.document import LEVELS, Finding
from ep_comm.report.run import MODEL_KEYS, Run, differences
from ep_comm.report.series import densest_stretch, find_shift
from ep_comm.telemetry import advice

_NOTICEABLE = 0.1  # of the operations' time: shorter waits make no rank a late one
# Of a stretch of steps, see `densest_stretch`; and part of all steps.
_LEAST_SCORE, _LEAST_PART = 10, 0.02
_TO_THE_END = 5  # steps after a stretch that are too few to say that it is over
_SLOWER = 1.15
_LONG = 3.0  # a step or an operation this many times the median is one of the tail
_TAIL = 0.01  # of the steps
_MOST = 0.8  # of what is found
_UNEVEN_RANKS, _UNEVEN_EXPERTS = 1.5, 4.0
_IDLE = 0.1  # of a layer's experts
_EXPOSED = 0.2  # of a step
_RISE = 1.05  # of the loss, at its end over its lowest
_LOSS_WINDOW = 20  # parts that a run's loss is averaged in

_ORDER = list(LEVELS)
_CHANGED = (
    "Look at what changed then: another job on the hosts, clocks and temperature of the GPUs, how "
    "even the tokens are, which rank was late"
)


def find(run: Run) -> list[Finding]:
    """Return what stands out in a run, the worst first."""
    found = [
        each
        for look in (_end, _log, _loss, _late_ranks, _waits, _speed, _tails, _exposed, _balance)
        for each in look(run)
    ]
    return sorted(found, key=lambda each: _ORDER.index(each.level))


def find_all(runs: Sequence[Run]) -> list[list[Finding]]:
    """Return what stands out in each run; of two, first what is to be known of both together."""
    found = [find(run) for run in runs]
    return [compare(*runs), *found] if len(runs) > 1 else found


def compare(first: Run, second: Run) -> list[Finding]:
    """Return what has to be known before two runs are set beside each other."""
    differ = differences(first, second)
    model = [key for key in differ if key in MODEL_KEYS]
    found = []
    if model:
        found.append(
            Finding(
                "bad",
                f"The runs are of different models: {_values(differ, model)}.",
                "Compare neither their losses nor their times as if they were of one",
                "configuration",
            )
        )
    others = (
        ("processes", first.processes, second.processes),
        ("device", first.versions.get("device"), second.versions.get("device")),
    )
    for what, *values in others:
        if values[0] != values[1]:
            text = f"The runs had different {what}: {values[0]} and {values[1]}."
            found.append(
                Finding("look", text, "Their times do not compare as they stand", "configuration")
            )
    data = [key for key in ("data_path", "data_seed", "seed", "global_batch_size") if key in differ]
    if data:
        found.append(
            Finding(
                "note",
                f"The runs saw other data, or began with other weights: {_values(differ, data)}.",
                "Losses differ by chance too: `ep-comm compare` says how far",
                "configuration",
            )
        )
    return found


def _values(differ: dict[str, tuple[Any, Any]], keys: Sequence[str]) -> str:
    return ", ".join(f"`{key}` {differ[key][0]} and {differ[key][1]}" for key in keys)


def _end(run: Run) -> Iterator[Finding]:
    if run.fault:
        todo = f"`ep-comm explain {run.folder / 'faults'}` shows the ranks side by side"
        yield Finding("bad", f"An operation failed. {' '.join(run.fault)}", todo, "warnings")
    if run.is_finished:
        return
    if run.user:
        text = f"The run is still going: {run.user} is at step {run.steps}."
        yield Finding("note", text, "Make the page again when it has ended", "summary")
    else:
        text = f"The run ended at {run.progress}."
        todo = "Look at the end of its output for why; `--load` goes on from its last checkpoint"
        yield Finding("look", text, todo, "summary")


def _log(run: Run) -> Iterator[Finding]:
    if run.damaged:
        lines = ", ".join(map(str, run.damaged[:5])) + (", ..." if len(run.damaged) > 5 else "")
        text = f"{_count(len(run.damaged), 'line')} of the log cannot be read: {lines}."
        yield Finding(
            "note", text, "A killed run leaves one; more of them: check the disk", "warnings"
        )
    for step, text in run.warnings:
        yield Finding("look", f"The run warned at step {step}: {text}", "", "warnings")
    versions = [start.get("versions") for start in run.starts]
    if any(each != versions[-1] for each in versions):
        text = "The run was resumed with other versions or on another device."
        yield Finding("look", text, "Steps before and after that may not compare", "versions")
    if not run.starts:
        text = "The log has no record of a start: configuration and versions are not known."
        yield Finding("note", text, "", "configuration")


def _loss(run: Run) -> Iterator[Finding]:
    for name in (TRAIN_LOSS, "grad-norm"):
        step = run.first_not_finite(name)
        if step is not None:
            text = f"`{name}` is no finite number at step {step}."
            todo = "Try a lower `--lr`, a longer warm-up or `--clip-grad`; resume from before it"
            yield Finding("bad", text, todo, "loss")
    parts = run.series(TRAIN_LOSS).binned(_LOSS_WINDOW)
    if len(parts.mean) == _LOSS_WINDOW:
        lowest = int(np.argmin(parts.mean))
        if parts.mean[-1] > _RISE * parts.mean[lowest]:
            text = (
                f"The training loss rose: {parts.mean[lowest]:.3f} around step "
                f"{parts.steps[lowest]}, {parts.mean[-1]:.3f} at the end."
            )
            yield Finding("look", text, "Try a lower `--lr`; look at the gradient norm", "loss")
    valid, train = run.series(VALID_LOSS, kind="valid"), run.series(TRAIN_LOSS)
    if len(valid.steps) >= 3 and valid.values[-1] > _RISE * valid.values.min():
        step = valid.steps[int(np.argmin(valid.values))]
        if train.last(0.1).median < 0.95 * valid.values[-1]:
            text = f"The validation loss has risen since step {step}, the training loss has not."
            todo = "The model learns its data by heart: take more data, or the checkpoint before"
            yield Finding("look", text, todo, "loss")


def _late_ranks(run: Run) -> Iterator[Finding]:
    """Find stretches of steps in which one rank was mostly the one that the others waited for."""
    slowest, waits = run.steady("ep/slowest-rank"), run.steady("ep/wait-share")
    if not slowest or len(slowest.steps) != len(waits.steps):
        return
    noticed = waits.values >= _NOTICEABLE
    for rank in sorted({int(each) for each in slowest.values if each >= 0}):
        is_late = (slowest.values == rank) & noticed
        stretch = _stretch(is_late)
        if stretch is None:
            continue
        begin, end = stretch
        hits = is_late[begin:end].sum()
        when = _when(slowest.steps, begin, end)
        text = (
            f"{when} rank {rank} was the one that the others waited for most: in "
            f"{hits / (end - begin):.0%} of these steps, and in {is_late.mean():.0%} of all. "
            f"Operations waited for {np.median(waits.values[begin:end]):.0%} of their time then."
        )
        yield Finding("look", text, advice.LATE_RANK, "ranks")


def _waits(run: Run) -> Iterator[Finding]:
    waits = run.steady("ep/wait-share")
    if waits.median > advice.HIGH_WAIT_SHARE:
        text = f"Operations waited for other ranks {waits.median:.0%} of their time (median step)."
        yield Finding("look", text, advice.WAIT_SHARE.when_high, "ranks")


def _speed(run: Run) -> Iterator[Finding]:
    seconds = run.steady("iteration-time")
    shift = find_shift(seconds, _SLOWER)
    if shift is not None:
        text = (
            f"From step {shift.step} on a step takes {shift.after / shift.before:.2f} times as "
            f"long: {1e3 * shift.after:.4g} ms, {1e3 * shift.before:.4g} before."
        )
        yield Finding("look", text, _CHANGED, "speed")
    else:
        stretch = _stretch(seconds.values > _SLOWER * seconds.median)
        if stretch is not None:
            begin, end = stretch
            ratio = np.median(seconds.values[begin:end]) / seconds.median
            text = (
                f"{_when(seconds.steps, begin, end)} a step took {ratio:.2f} times as long as the "
                f"median ({1e3 * seconds.median:.4g} ms)."
            )
            yield Finding("look", text, _CHANGED, "speed")
    yield from _tail(
        seconds.steps,
        seconds.values,
        "a step",
        "Look at what happens on the hosts then: checkpoints, Python's garbage (`--manual-gc`), "
        "data that comes late",
        "speed",
    )


def _tails(run: Run) -> Iterator[Finding]:
    for op in ("dispatch", "combine"):
        series = run.steady(f"ep/{op}-ms-p99", scale=1e-3)
        yield from _tail(
            series.steps,
            series.values,
            f"the 99th percentile of a {op}",
            advice.TAILS.when_high,
            "tails",
        )


def _tail(
    steps: np.ndarray, seconds: np.ndarray, what: str, todo: str, section: str
) -> Iterator[Finding]:
    typical = float(np.median(seconds)) if len(seconds) else 0.0
    is_long = seconds > _LONG * typical
    if typical > 0 and is_long.mean() > _TAIL:
        worst = int(np.argmax(seconds))
        stretch = _stretch(is_long)
        mostly = ""
        if stretch is not None and is_long[slice(*stretch)].sum() > _MOST * is_long.sum():
            mostly = f", mostly f{_when(steps, *stretch)[1:]}"
        text = (
            f"In {int(is_long.sum())} of {len(steps)} steps{mostly}, {what} took more than "
            f"{_LONG:g} times the median ({1e3 * typical:.4g} ms), at worst "
            f"{1e3 * seconds[worst]:.4g} ms in step {steps[worst]}."
        )
        yield Finding("look", text, todo, section)


def _stretch(hits: np.ndarray) -> tuple[int, int] | None:
    """Return begin and end of a stretch that has clearly more hits than chance; None without."""
    begin, end, score = densest_stretch(hits) or (0, 0, 0)
    return (begin, end) if score >= max(_LEAST_SCORE, _LEAST_PART * len(hits)) else None


def _when(steps: np.ndarray, begin: int, end: int) -> str:
    if end + _TO_THE_END < len(steps):
        return f"From step {steps[begin]} to {steps[end - 1]}"
    return f"From step {steps[begin]} on"


def _exposed(run: Run) -> Iterator[Finding]:
    exposed = run.share("ep/exposed-ms", "iteration-time", scale=1e-3)
    if exposed.median <= _EXPOSED:
        return
    flags = (("ep_overlap_wgrad", advice.OVERLAP), ("ep_fp8_dispatch", advice.FP8))
    todos = [todo for flag, todo in flags if run.config.get(flag) is False] + [advice.WAIT_LESS]
    text = (
        f"In the median step, {exposed.median:.0%} of the time operations ran with no weight "
        "gradient beside them, waits included."
    )
    yield Finding("look", text, "; ".join(todos), "exposed")


def _balance(run: Run) -> Iterator[Finding]:
    uneven = run.steady("ep/imbalance-rank")
    late = uneven.last(0.25)
    todo = advice.IMBALANCE.when_high
    if late.median > _UNEVEN_RANKS:
        text = (
            f"The fullest rank got {late.median:.2f} times the mean of the tokens in the worst "
            "layer (median of the last quarter): the others wait for it."
        )
        yield Finding("look", text, todo, "balance")
    shift = find_shift(uneven, _SLOWER)
    if shift is not None and shift.after > 1 + 2 * (shift.before - 1):
        text = (
            f"From step {shift.step} on tokens are less even: the fullest rank gets "
            f"{shift.after:.2f} times the mean, {shift.before:.2f} before."
        )
        yield Finding("look", text, todo, "balance")
    if run.load is None:
        return
    of_experts = run.load.late()
    fullest = np.nanmax(of_experts)
    if fullest > _UNEVEN_EXPERTS:
        layer, expert = np.unravel_index(np.nanargmax(of_experts), of_experts.shape)
        text = (
            f"Expert {expert} of layer {run.load.layers[layer]} got {fullest:.1f} times the mean "
            "in the last quarter."
        )
        yield Finding("look", text, todo, "balance")
    idle = (of_experts == 0).sum(axis=1)
    worst = int(np.argmax(idle))
    if idle[worst] > _IDLE * of_experts.shape[1]:
        text = (
            f"{idle[worst]} of {of_experts.shape[1]} experts of layer {run.load.layers[worst]} got "
            "no token in the last quarter."
        )
        yield Finding("look", text, todo, "balance")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
