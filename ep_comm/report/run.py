"""What the folder of a run tells."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ep_comm.job.exits import UserError
from ep_comm.job.files import user_of
from ep_comm.numeric import is_number
from ep_comm.pretrain.log_file import BALANCE, LOG_FILE, WARNING, read_whole_log
from ep_comm.report.series import Series
from ep_comm.telemetry.explain import ExplainError, newest_fault, read_document, tell

# The keys that say which model is trained: losses of others do not compare.
MODEL_KEYS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "qk_layernorm",
    "rotary_base",
    "seq_length",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_shared_expert_intermediate_size",
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """How tokens were spread.

    Attributes:
        steps: That have it on record.
        layers: Numbers of the MoE layers, from 1.
        tokens: Of each step, layer and expert: (steps, layers, experts); NaN for a layer with none.
    """

    steps: np.ndarray
    layers: list[int]
    tokens: np.ndarray

    @cached_property
    def relative(self) -> np.ndarray:
        """Tokens over the mean of their layer and step; 1 is even."""
        return self.tokens / self.tokens.mean(axis=2, keepdims=True)

    @property
    def imbalance(self) -> np.ndarray:
        """Tokens of the fullest expert over the mean: (steps, layers)."""
        return self.relative.max(axis=2)

    def late(self) -> np.ndarray:
        """Return `relative` of the last quarter of the steps, averaged: (layers, experts)."""
        return self.relative[-max(1, len(self.steps) // 4) :].mean(axis=0)


@dataclass(frozen=True)
class Run:
    """A run, from its folder.

    Attributes:
        folder: Where it is.
        name: What the page calls it.
        records: Of its log.
        damaged: Lines of the log that are no records.
        user: Who is still at it; None where nobody is, as far as locks tell.
        written: When its log was written last, local time.
        fault: What the files of its last failure tell, a sentence each.
    """

    folder: Path
    name: str
    records: list[Record]
    damaged: list[int]
    user: str | None
    written: datetime
    fault: tuple[str, ...]

    @cached_property
    def starts(self) -> list[Record]:
        """The records of its starts, the last one with the configuration that counts."""
        return self._of("start")

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its settings, by key."""
        return self.starts[-1].get("config", {}) if self.starts else {}

    @cached_property
    def versions(self) -> dict[str, str]:
        """What it ran with."""
        return self.starts[-1].get("versions", {}) if self.starts else {}

    @property
    def processes(self) -> int | None:
        """How many there were; None where that is not on record."""
        return self.starts[-1].get("processes") if self.starts else None

    @property
    def steps(self) -> int:
        """The last step on record."""
        return max((record["iteration"] for record in self._of("train")), default=0)

    def last_steps(self, number: int) -> list[Record]:
        """Return the records of the last steps, oldest first."""
        return self._of("train")[-number:]

    @property
    def asked_steps(self) -> int | None:
        """How many it was to train."""
        return self.config.get("train_iters")

    @property
    def is_finished(self) -> bool:
        """Whether it has trained all of them."""
        return self.asked_steps is not None and self.steps >= self.asked_steps

    @property
    def progress(self) -> str:
        """How far it has come, in words."""
        return f"step {self.steps} of {self.asked_steps or 'an unknown number'}"

    @property
    def state(self) -> str:
        """How it stands, in words."""
        of = self.progress
        if self.is_finished:
            return f"finished: {of}"
        return f"still going: {of} ({self.user})" if self.user else f"ended early: {of}"

    @cached_property
    def warnings(self) -> list[tuple[int, str]]:
        """Step and text of what it warned of."""
        return [(r["iteration"], str(r.get("text", ""))) for r in self._of(WARNING)]

    @cached_property
    def first_steps(self) -> frozenset[int]:
        """The first step after each start: buffers are made there, kernels loaded."""
        return frozenset(record["iteration"] + 1 for record in self.starts)

    def named(self, name: str) -> Run:
        """Return it under another name."""
        return replace(self, name=name)

    def series(self, name: str, *, kind: str = "train", scale: float = 1.0) -> Series:
        """Return a scalar where it is on record and finite, times `scale`."""
        if (kind, name) not in self._found:
            found = [(r["iteration"], r[name]) for r in self._of(kind) if _is_finite(r.get(name))]
            self._found[kind, name] = Series(
                np.array([step for step, _ in found], dtype=np.int64),
                np.array([value for _, value in found], dtype=np.float64),
            )
        series = self._found[kind, name]
        return series._replace(values=scale * series.values)

    def steady(self, name: str, *, scale: float = 1.0) -> Series:
        """Return a scalar of each step, without `first_steps` as long as others are left."""
        series = self.series(name, scale=scale)
        return series.without(self.first_steps) or series

    def share(self, name: str, of: str, *, scale: float = 1.0) -> Series:
        """Return one scalar over another one, where both are on record, without `first_steps`."""
        over = {int(step): value for step, value in zip(*self.series(of), strict=True) if value}
        part = self.series(name, scale=scale)
        kept = np.array([int(step) in over for step in part.steps], dtype=bool)
        steps = part.steps[kept]
        below = np.array([over[int(step)] for step in steps])
        found = Series(steps, part.values[kept] / below)
        return found.without(self.first_steps) or found

    def first_not_finite(self, name: str) -> int | None:
        """Return the first step at which a scalar is NaN or infinite; None where it never is."""
        steps = (
            r["iteration"]
            for r in self._of("train")
            if isinstance(r.get(name), float) and not math.isfinite(r[name])
        )
        return next(steps, None)

    @cached_property
    def load(self) -> Load | None:
        """The tokens of all experts; None where they are not on record."""
        found = [
            (record["iteration"], {layer["layer"]: layer["tokens"] for layer in record["layers"]})
            for record in self._of(BALANCE)
            if record["layers"]
        ]
        if not found:
            return None
        layers = sorted({layer for _, tokens in found for layer in tokens})
        num_experts = max(len(each) for _, tokens in found for each in tokens.values())
        none = [math.nan] * num_experts
        rows = [[_of_length(tokens.get(layer), none) for layer in layers] for _, tokens in found]
        return Load(np.array([step for step, _ in found]), layers, np.array(rows, dtype=np.float64))

    @cached_property
    def _found(self) -> dict[tuple[str, str], Series]:
        return {}

    @cached_property
    def _by_kind(self) -> dict[str, list[Record]]:
        kinds: dict[str, list[Record]] = {}
        for record in self.records:
            kinds.setdefault(record["type"], []).append(record)
        return kinds

    def _of(self, kind: str) -> list[Record]:
        return self._by_kind.get(kind, [])


def read(folder: Path) -> Run:
    """Read the folder of a run, which may still be going.

    Raises:
        UserError: It has no log, or one without a step.
    """
    path = folder / LOG_FILE
    try:
        log = read_whole_log(path)
        written = datetime.fromtimestamp(path.stat().st_mtime)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_why_none(folder)) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    run = Run(
        folder,
        folder.resolve().name,
        log.records,
        log.damaged,
        user_of(folder),
        written,
        _fault(folder / "faults"),
    )
    if not run.steps:
        damaged = f"; {len(log.damaged)} of its lines are damaged" if log.damaged else ""
        raise UserError(f"{path} has no step yet{damaged}")
    return run


def differences(first: Run, second: Run) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, with both; where files go does not count."""
    elsewhere = ("run_dir", "save", "load", "wandb_exp_name", "wandb_save_dir")
    keys = [*first.config, *(key for key in second.config if key not in first.config)]
    both = {key: (first.config.get(key), second.config.get(key)) for key in keys}
    return {k: pair for k, pair in both.items() if pair[0] != pair[1] and k not in elsewhere}


def _why_none(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder"
    below = sorted(path.parent.name for path in folder.glob(f"*/{LOG_FILE}"))
    runs = (
        f": it has runs in {', '.join(below[:8])}; name one or two of them"
        if below
        else (", which a run of examples/pretrain_moe.py leaves in its --run-dir")
    )
    return f"{folder} has no {LOG_FILE}{runs}"


def _fault(folder: Path) -> tuple[str, ...]:
    paths = sorted(folder.glob("*-rank*.json"))
    if not paths:
        return ()
    try:
        return tell(newest_fault(map(read_document, paths))[0]).sentences
    except (ExplainError, OSError, KeyError, TypeError) as error:
        return (f"The files of a failure cannot be read: {error}.",)


def _is_finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)


def _of_length(tokens: list[float] | None, none: list[float]) -> list[float]:
    return tokens if tokens is not None and len(tokens) == len(none) else none
