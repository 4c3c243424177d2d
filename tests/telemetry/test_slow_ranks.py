"""A training run with a slow rank, explained by its scalars, its stats and its trace.

One run of the example: first all ranks are on time, then one sleeps before each step, as with a
slow input pipeline; then its process is stopped once; then its experts get all tokens.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
from example_runs import NEW, SMALL, pretrain, records
from ranks import run_ranks

from ep_comm.telemetry.trace import WAITS

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.slow

RANKS, SLOW = 3, 1
SLEEP_S, STOP_S = 0.8, 2.0  # far more than what other programs take of the machine
ON_TIME, SLEEPING, STOPPED, UNEVEN = range(2, 5), range(5, 9), range(9, 10), range(10, 14)
LAST = UNEVEN[-1]
OPS_OF_A_STEP = 4  # one layer: dispatch and combine, forward and backward
FLAGS = [
    *SMALL, "--num-experts", "6", "--expert-model-parallel-size", "3", "--global-batch-size", "6",
    "--moe-ffn-hidden-size", "1024", "--train-iters", str(LAST), "--eval-interval", "1000",
    "--log-interval", "1",
]  # fmt: skip


def a_slow_rank(rank: int, folder: str) -> dict:
    """Train; stats of all ranks after each part of the run, and a trace of the whole."""
    from ep_comm.pretrain.start import prepare_megatron

    prepare_megatron()
    from megatron.core.transformer.moe.router import TopKRouter

    from ep_comm.megatron.layer import moe_layers
    from ep_comm.pretrain import loop

    original, route = loop.train_step, TopKRouter.routing
    found, steps = {}, iter(range(1, LAST + 1))

    def uneven(*args, **kwargs):
        probs, routing_map = route(*args, **kwargs)
        own = slice(2 * SLOW, 2 * SLOW + 2)
        routing_map = routing_map & False
        routing_map[:, own] = True
        return 0 * probs + 0.5 * routing_map, routing_map

    def train_step(trainee, *args):
        step = next(steps)
        if rank == SLOW and step in SLEEPING:
            time.sleep(SLEEP_S)
        if rank == SLOW and step in STOPPED:
            goes_on = f"sleep {STOP_S} && kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", goes_on])
            os.kill(os.getpid(), signal.SIGSTOP)
        if step in UNEVEN:
            TopKRouter.routing = uneven
        result = original(trainee, *args)
        _, layer = next(moe_layers([trainee.model]))
        buffer = layer.token_dispatcher.buffer
        for part in (ON_TIME, SLEEPING, STOPPED, UNEVEN):
            if step == part[-1]:
                found[part[0]] = buffer.stats_of_all_ranks(OPS_OF_A_STEP * len(part))
        if step == SLEEPING[-1]:
            # Without the first step, in which ranks wait for one another's start.
            found["so far"] = buffer.stats_of_all_ranks(OPS_OF_A_STEP * (step - 1))
        if step == LAST:
            buffer.write_trace(Path(folder, "trace.json"))
        return result

    loop.train_step = train_step
    pretrain(rank, [*FLAGS, "--run-dir", folder])
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("slow")
    stats = run_ranks(RANKS, a_slow_rank, str(folder), timeout_s=240, **NEW)[0]
    trace = json.loads((folder / "trace.json").read_text())
    return SimpleNamespace(
        stats=stats,
        scalars={record["iteration"]: record for record in records(folder, "train")},
        balance={record["iteration"]: record["layers"][0] for record in records(folder, "balance")},
        events=[event for event in trace["traceEvents"] if event["ph"] == "X"],
    )


def operations_of(run: SimpleNamespace, steps: range, name: str) -> list[dict]:
    """Events of those steps on the ranks that wait: each step has two dispatches and combines."""
    numbers = {2 * step - 1 + i for step in steps for i in range(2)}
    return [
        event
        for event in run.events
        if event["pid"] != SLOW
        and event["name"].partition(" #")[0] == name
        and int(event["name"].partition("#")[2]) in numbers
    ]


def test_a_rank_that_is_late_for_each_step(run):
    for step in SLEEPING:
        assert run.scalars[step]["ep/slowest-rank"] == SLOW
        assert run.scalars[step]["ep/wait-share"] > 0.5
    stats = run.stats[SLEEPING[0]]
    assert stats.slowest.rank == SLOW
    for rank in range(RANKS):
        plan = stats.ranks[rank].operations["plan"]  # it is late for the first thing in a step
        if rank != SLOW:
            assert SLEEP_S - 0.1 < plan.wait_s_by_rank[SLOW].p50 < 3 * SLEEP_S
        assert plan.wait_s_by_rank[(SLOW + 1) % RANKS].p50 < 0.5 * SLEEP_S
    since = int(run.stats["so far"].slowest.since_op.rpartition("#")[2])
    assert since in range(2 * SLEEPING[0] - 3, 2 * SLEEPING[0] + 2)  # a late neighbour on two CPUs
    waits = [event["args"][WAITS] for event in operations_of(run, SLEEPING, "plan")]
    assert len(waits) == 2 * len(SLEEPING)  # of two ranks
    assert all(max(range(RANKS), key=wait.__getitem__) == SLOW for wait in waits)
    assert all(wait[SLOW] > 1e6 * (SLEEP_S - 0.1) for wait in waits)


def test_a_process_that_stood_still_once(run):
    (step,) = STOPPED
    assert run.scalars[step]["ep/slowest-rank"] == SLOW
    assert run.scalars[step]["ep/wait-share"] > 0.8
    assert run.scalars[step]["ep/exposed-ms"] > 1e3 * (STOP_S - 0.2)
    stats = run.stats[step]
    assert stats.slowest.rank == SLOW and stats.slowest.since_op.endswith(f"#{2 * step - 1}")
    longest = max(run.events, key=lambda event: event["dur"])
    assert longest["name"] == f"plan #{2 * step - 1}" and longest["pid"] != SLOW
    assert 1e6 * (STOP_S - 0.2) < longest["args"][WAITS][SLOW] < 1e6 * (STOP_S + 2)


def test_a_rank_whose_experts_get_all_tokens(run):
    for step in UNEVEN:
        assert run.scalars[step]["ep/imbalance-rank"] == RANKS
        assert run.scalars[step]["ep/slowest-rank"] == SLOW
        layer = run.balance[step]
        assert layer["fullest-rank"] == SLOW and layer["fullest-expert"] in (2 * SLOW, 2 * SLOW + 1)
        assert layer["idle-experts"] == 4 and layer["tokens"][2 * SLOW] > 0
    for step in ON_TIME:
        assert run.balance[step]["imbalance-rank"] < 2
    stats = run.stats[UNEVEN[0]]
    assert stats.rank_imbalance == RANKS and stats.slowest.rank == SLOW
    assert [rows > 0 for rows in stats.rows_by_rank] == [rank == SLOW for rank in range(RANKS)]
    # It computes while the others have nothing to do: they wait for it in the combine.
    for rank in set(range(RANKS)) - {SLOW}:
        before, now = (run.stats[part[0]].ranks[rank].operations for part in (ON_TIME, UNEVEN))
        wait_s = now["combine"].wait_s_by_rank[SLOW].p50
        # On a busy machine ranks wait for one another in even steps too.
        assert wait_s > 1.5 * before["combine"].wait_s_by_rank[SLOW].p50
        assert wait_s > 0.5 * now["combine"].seconds.p50
    waits = [event["args"][WAITS] for event in operations_of(run, UNEVEN, "combine")]
    assert median(wait[SLOW] for wait in waits) > 2 * median(max(w[0], w[2]) for w in waits)
