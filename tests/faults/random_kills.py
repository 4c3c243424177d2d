"""Random ranks killed at random times, in the middle of random operations; all from a seed.

    python tests/faults/random_kills.py 200          # how many, and the first seed: 0

It prints a line for each kill that ended otherwise than it should, and what came of all of them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "faults"), str(TESTS.parent)]

from forked import Outcome, run_forked  # noqa: E402

from ep_comm import Buffer, EPConfig, EPError  # noqa: E402
from ep_comm.job.meeting import meet  # noqa: E402
from ep_comm.job.store import default_store  # noqa: E402
from ep_comm.telemetry.explain import read_story  # noqa: E402

_LATEST_S = 0.35  # of a kill: by then several operations of each kind have run
_SLACK_S = 5.0
_BOUND_S = 40.0


@dataclass(frozen=True)
class Kill:
    """Who is killed, when, and among how many. All of it follows from the seed."""

    seed: int
    num_ranks: int = field(init=False)
    victim: int = field(init=False)
    at_s: float = field(init=False)
    timeout_s: float = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, 27])
        num_ranks = int(rng.integers(2, 5))
        for name, value in (
            ("num_ranks", num_ranks),
            ("victim", int(rng.integers(num_ranks))),
            ("at_s", float(rng.uniform(0, _LATEST_S))),
            ("timeout_s", float(rng.uniform(0.8, 1.5))),
        ):
            object.__setattr__(self, name, value)


def live(rank: int, kill: Kill) -> tuple[dict[str, Any], float]:
    """Random operations until one fails: its error, and seconds since the kill."""
    store = default_store()
    meet(dist.group.WORLD, "begin", None, 30.0)
    if rank == kill.victim:
        threading.Thread(target=_die, args=(store.clone(), kill.at_s), daemon=True).start()
    try:
        _work(rank, kill)
    except EPError as error:
        now = time.monotonic()
        store.set(f"saw/{rank}", "1")
        others = [f"saw/{r}" for r in range(kill.num_ranks) if r != kill.victim]
        store.wait(others, timedelta(seconds=20))
        said = {
            "type": type(error).__name__,
            "op": getattr(error, "op", ""),
            "late": tuple(getattr(error, "late_ranks", ())),
            "origin": tuple(getattr(error, "origin_ranks", ())),
            "file": error.file,
        }
        return said, now - float(store.get("fault"))
    raise AssertionError("it never ends by itself")


def _die(store: dist.Store, after_s: float) -> None:
    time.sleep(after_s)
    store.set("fault", repr(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def _work(rank: int, kill: Kill) -> None:
    rng = np.random.default_rng([kill.seed, 28])  # the same on all ranks
    per_rank, hidden = 2, 8 * int(rng.integers(1, 40))
    config = EPConfig(
        num_experts=per_rank * kill.num_ranks, hidden=hidden, max_tokens_per_rank=64, num_topk=2,
        timeout_s=kill.timeout_s, low_latency_tokens=64,
    )  # fmt: skip
    buffer = Buffer(None, config)
    while True:
        tokens = int(rng.integers(65))
        topk = torch.from_numpy(rng.random((tokens, config.num_experts)).argsort(1)[:, :2].copy())
        x = torch.full((tokens, hidden), float(rank + 1), dtype=torch.bfloat16)
        kind = rng.choice(["normal", "cached", "backward", "low latency", "statistics"])
        if kind == "statistics":
            buffer.stats_of_all_ranks()
            continue
        if kind == "low latency":
            sent = buffer.low_latency_dispatch(x, topk, 64, config.num_experts, use_fp8=False)
            ones = torch.ones(topk.shape)
            back = buffer.low_latency_combine(sent.recv_x, topk, ones, sent.handle).combined_x
        else:
            x.requires_grad_(kind == "backward")
            out = buffer.dispatch(x, topk)
            if kind == "cached":
                out = buffer.dispatch(x, handle=out.handle)
            back = buffer.combine(out.recv_x, out.handle).combined_x
            if kind == "backward":
                back.sum().backward()
        assert torch.equal(back, 2 * x), kind


def wrong(kill: Kill, outcomes: list[Outcome]) -> str | None:
    """What is not as promised: it ends in time, all name the dead rank, the first nobody else.

    A rank may have got all that the dead one sent, and wait for one that has lost it.
    """
    others = {r: found for r, found in enumerate(outcomes) if r != kill.victim}
    if outcomes[kill.victim].how != "signal 9":
        return f"the victim: {outcomes[kill.victim]}"
    for rank, found in others.items():
        if found.how != "done":
            return f"rank {rank} {found.how}: {found.value}"
        said, took = found.value
        if took > kill.timeout_s + _SLACK_S:
            return f"rank {rank} took {took:.1f} s"
        if kill.victim not in (said["origin"] or said["late"]):
            return f"rank {rank} names somebody else: {said}"
    first, _ = min((found.value for found in others.values()), key=lambda value: value[1])
    if first["late"] != (kill.victim,):
        return f"the first to know names {first['late']}"
    files = [found.value[0]["file"] for found in others.values()]
    if all(files) and (culprits := read_story(files).culprits) != (kill.victim,):
        return f"ep-comm explain says {culprits}"
    return None


def try_kill(seed: int) -> tuple[Kill, str | None, str]:
    """Returns the kill, what is wrong with what came of it, and which operation ended."""
    kill = Kill(seed)
    outcomes = run_forked(kill.num_ranks, live, kill, timeout_s=_BOUND_S)
    problem = wrong(kill, outcomes)
    ops = [found.value[0]["op"] for found in outcomes if found.how == "done"]
    return kill, problem, ops[0] if ops else ""


def main() -> int:
    count = int(sys.argv[1])
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    ops, num_wrong, start = Counter[str](), 0, time.monotonic()
    for seed in range(first, first + count):
        kill, problem, op = try_kill(seed)
        ops[op] += 1
        if problem:
            num_wrong += 1
            print(f"{kill}: {problem}", flush=True)
    took = time.monotonic() - start
    print(f"{count} kills in {took:.0f} s, {num_wrong} wrong; in {dict(ops.most_common())}")
    return int(num_wrong > 0)


if __name__ == "__main__":
    import random_kills  # by its name: ranks import it too

    sys.exit(random_kills.main())
