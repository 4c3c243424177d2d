"""A real run of the example with a slow rank: its page names the rank."""

from __future__ import annotations

import time

import pytest
from example_runs import NEW, SMALL, pretrain
from ranks import run_ranks

from ep_comm.report.findings import find_all
from ep_comm.report.page import render
from ep_comm.report.run import read

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.slow

RANKS, SLOW, SLEEP_S = 2, 1, 0.3
STEPS, SLOW_FROM = 32, 15
FLAGS = [
    *SMALL, "--num-experts", "4", "--expert-model-parallel-size", "2", "--log-interval", "2",
    "--train-iters", str(STEPS), "--eval-interval", "16",
]  # fmt: skip


def a_slow_rank(rank: int, folder: str) -> None:
    from ep_comm.pretrain.start import prepare_megatron

    prepare_megatron()
    from ep_comm.pretrain import loop

    original, steps = loop.train_step, iter(range(1, STEPS + 1))

    def train_step(*args):
        if next(steps) >= SLOW_FROM and rank == SLOW:
            time.sleep(SLEEP_S)
        return original(*args)

    loop.train_step = train_step
    pretrain(rank, [*FLAGS, "--run-dir", folder])


def test_the_page_of_a_real_run_names_the_slow_rank(tmp_path):
    run_ranks(RANKS, a_slow_rank, str(tmp_path), timeout_s=240, **NEW)
    run = read(tmp_path)
    assert run.is_finished and run.user is None and run.damaged == []
    (findings,) = find_all([run])
    (late,) = (each for each in findings if each.section == "ranks" and "rank 1" in each.text)
    begin = int(late.text.split("From step ")[1].split()[0])
    assert begin <= SLOW_FROM + 1 and "on rank 1 was the one" in late.text
    assert run.load is not None and len(run.load.steps) == STEPS // 2
    assert (run.load.tokens.sum(axis=2) == run.load.tokens[0, 0].sum()).all()
    page = render([run], [findings], "ep-comm report")
    assert late.text in page and page.count("<svg") == 9
