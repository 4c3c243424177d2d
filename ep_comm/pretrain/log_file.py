"""What a run of ``examples/pretrain_moe.py`` leaves behind: ``log.jsonl``, and checkpoints.

The log has one JSON object a line, floats in full precision:

- ``{"type": "start", "iteration": i, "config": ..., "versions": ..., ...}`` whenever the run is
  started or resumed after step i; it makes any earlier records beyond step i void;
- ``{"type": "train", "iteration": i, "lm loss": ..., ...}`` for each step;
- ``{"type": "valid", "iteration": i, "lm loss validation": ...}`` for each validation;
- ``{"type": "balance", "iteration": i, "layers": [{"layer": 1, ..., "tokens": [...]}, ...]}`` for
  each step that the screen has: `ep_comm.megatron.balance.LayerBalance` of all MoE layers.

Names are Megatron-LM's where it has one: ``iteration-time`` is in seconds, ``throughput`` in
TFLOP/s of one rank (`flops_per_token`). ``tokens-per-second`` is over all ranks. ``mfu`` is the
share that ``throughput`` has of the GPU's dense BF16 peak, in BF16 runs where that is known.
``ep/*`` is what `ep_comm.megatron.MoEMeter` says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"
LATEST = "latest_checkpointed_iteration.txt"  # in a folder of checkpoints
BALANCE = "balance"
TRAIN_LOSS = "lm loss"
VALID_LOSS = "lm loss validation"
TOKENS_PER_S = "tokens-per-second"
WIRE_MIB = "ep/wire-mib"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the valid records of a ``log.jsonl``, in order of their steps.

    Raises:
        OSError: It cannot be read.
    """
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the run was killed while it wrote this line
        if record["type"] == "start":
            records = [r for r in records if r["iteration"] <= record["iteration"]]
            if record["iteration"] == 0:
                records = []
        records.append(record)
    return records


def latest_iteration(checkpoints: Path) -> int | None:
    """Return after which step the latest checkpoint of a folder was written; None without one."""
    try:
        return int((checkpoints / LATEST).read_text())
    except (OSError, ValueError):
        return None


def scalars(records: list[dict[str, Any]], kind: str, name: str) -> dict[int, float]:
    """Return the value of `name` at each step, of the records of type `kind`."""
    return {r["iteration"]: r[name] for r in records if r["type"] == kind}
