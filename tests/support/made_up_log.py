"""Logs of runs that never were: as long as asked for, with whatever is to be found in them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

RANKS, LAYERS, EXPERTS, TOPK, TOKENS = 8, 16, 64, 4, 4096
MODEL = {
    "num_layers": LAYERS,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "seq_length": 512,
    "num_experts": EXPERTS,
    "moe_ffn_hidden_size": 2048,
    "moe_router_topk": TOPK,
}
Record = dict


def start(steps: int, *, iteration: int = 0, **config: object) -> Record:
    return {
        "type": "start",
        "iteration": iteration,
        "dispatcher": "ep_comm",
        "processes": RANKS,
        "versions": {"ep_comm": "0.2.0", "torch": "2.11.0", "device": "NVIDIA H200"},
        "config": {
            **MODEL,
            "expert_model_parallel_size": RANKS,
            "moe_token_dispatcher": "ep_comm",
            "train_iters": steps,
            "seed": 1234,
            "data_path": ["/data/books"],
            "run_dir": "runs/made-up",
            **config,
        },
    }


def even_step(step: int, chance: random.Random) -> Record:
    """A step in which nothing stands out: every rank is the slowest one now and then."""
    seconds = 0.3 * chance.uniform(0.98, 1.02) if step > 1 else 9.0
    return {
        "type": "train",
        "iteration": step,
        "lm loss": 2.0 + 8 * math.exp(-step / 150) + 0.05 * chance.gauss(0, 1),
        "grad-norm": 1.0 + 0.1 * chance.random(),
        "learning-rate": 1e-3,
        "iteration-time": seconds,
        "tokens-per-second": TOKENS * RANKS / seconds,
        "throughput": 300.0,
        "mfu": 0.303 * chance.uniform(0.98, 1.02),
        "ep/dispatch-ms": 30 * chance.uniform(0.95, 1.05),
        "ep/combine-ms": 25 * chance.uniform(0.95, 1.05),
        "ep/expert-ms": 60 * chance.uniform(0.95, 1.05),
        "ep/wire-mib": 512.0,
        "ep/dispatch-ms-p99": 1.1 * chance.uniform(0.95, 1.05),
        "ep/combine-ms-p99": 0.9 * chance.uniform(0.95, 1.05),
        "ep/wait-share": 0.08 * chance.uniform(0.9, 1.1),
        "ep/exposed-ms": 40 * chance.uniform(0.95, 1.05),
        "ep/imbalance-rank": 1.15 * chance.uniform(0.98, 1.02),
        "ep/imbalance-expert": 1.6 * chance.uniform(0.98, 1.02),
        "ep/slowest-rank": chance.randrange(RANKS),
    }


def balance(step: int, chance: random.Random) -> Record:
    mean = TOKENS * RANKS * TOPK // EXPERTS
    layers = [
        {"layer": layer, "tokens": [round(mean * chance.uniform(0.7, 1.3)) for _ in range(EXPERTS)]}
        for layer in range(1, LAYERS + 1)
    ]
    return {"type": "balance", "iteration": step, "layers": layers}


def write_run(
    folder: Path,
    steps: int,
    change: Callable[[Record], None] = lambda record: None,
    *,
    seed: int = 1,
    asked: int | None = None,
    **config: object,
) -> Path:
    """Write the log of a run.

    Args:
        folder: Made if need be.
        steps: That it has.
        change: Changes each record before it is written.
        seed: Of what is random.
        asked: Steps that it was to have; None: as many.
        config: Keys with other values than `MODEL` and `start` have.
    """
    chance = random.Random(seed)
    records = [start(asked or steps, **config)]
    for step in range(1, steps + 1):
        records += [even_step(step, chance), balance(step, chance)]
        if step % 100 == 0:
            loss = records[-2]["lm loss"] + 0.1
            records.append({"type": "valid", "iteration": step, "lm loss validation": loss})
    for record in records:
        change(record)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(text)
    return folder
