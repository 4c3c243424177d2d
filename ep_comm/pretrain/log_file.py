"""What a run of ``examples/pretrain_moe.py`` leaves behind: ``log.jsonl``, and checkpoints.

The log has one JSON object a line, floats in full precision:

- ``{"type": "start", "iteration": i, "config": ..., "versions": ..., ...}`` whenever the run is
  started or resumed after step i; it makes any earlier records beyond step i void;
- ``{"type": "train", "iteration": i, "lm loss": ..., ...}`` for each step;
- ``{"type": "valid", "iteration": i, "lm loss validation": ...}`` for each validation;
- ``{"type": "balance", "iteration": i, "layers": [{"layer": 1, ..., "tokens": [...]}, ...]}`` for
  each step that the screen has: `ep_comm.megatron.balance.LayerBalance` of all MoE layers;
- ``{"type": "warning", "iteration": i, "text": ...}`` for what the screen warned of.

Names are Megatron-LM's where it has one: ``iteration-time`` is in seconds, ``throughput`` in
TFLOP/s of one rank (`flops_per_token`). ``tokens-per-second`` is over all ranks. ``mfu`` is the
share that ``throughput`` has of the GPU's dense BF16 peak, in BF16 runs where that is known.
``ep/*`` is what `ep_comm.megatron.MoEMeter` says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

LOG_FILE = "log.jsonl"
LATEST = "latest_checkpointed_iteration.txt"  # in a folder of checkpoints
BALANCE = "balance"
WARNING = "warning"
TRAIN_LOSS = "lm loss"
VALID_LOSS = "lm loss validation"
TOKENS_PER_S = "tokens-per-second"
WIRE_MIB = "ep/wire-mib"


class Log(NamedTuple):
    """What a ``log.jsonl`` has.

    Attributes:
        records: The valid ones, in order of their steps.
        damaged: Numbers, from 1, of the lines that are no records.
    """

    records: list[dict[str, Any]]
    damaged: list[int]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the valid records of a ``log.jsonl``, in order of their steps.

    Raises:
        OSError: It cannot be read.
    """
    return read_whole_log(path).records


def read_whole_log(path: Path) -> Log:
    """Return the valid records, and which lines are damaged, as where a run was killed.

    Raises:
        OSError: It cannot be read.
    """
    records: list[dict[str, Any]] = []
    damaged = []
    # Bytes that are no UTF-8 make their line no JSON, and no other one.
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
        record = _parsed(line)
        if record is None:
            damaged += [number] if line.strip() else []
            continue
        if record["type"] == "start":
            records = [r for r in records if r["iteration"] <= record["iteration"]]
            if record["iteration"] == 0:
                records = []
        records.append(record)
    return Log(records, damaged)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = (
        isinstance(record, dict)
        and isinstance(record.get("type"), str)
        and isinstance(record.get("iteration"), int)
    )
    return record if is_record else None


def latest_iteration(checkpoints: Path) -> int | None:
    """Return after which step the latest checkpoint of a folder was written; None without one."""
    try:
        return int((checkpoints / LATEST).read_text())
    except (OSError, ValueError):
        return None


def scalars(records: list[dict[str, Any]], kind: str, name: str) -> dict[int, float]:
    """Return the value of `name` at each step, of the records of type `kind`."""
    return {r["iteration"]: r[name] for r in records if r["type"] == kind}
