"""Runs of the example that several modules look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_runs import TINY, TINY_STEPS, train


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory):
    """Run directory of the first half of tiny-cpu with given flags; equal runs are made once."""
    made: dict[tuple, Path] = {}

    def run(dispatcher: str, *flags: str) -> Path:
        key = (dispatcher, *flags)
        if key not in made:
            run_dir = tmp_path_factory.mktemp("tiny-cpu") / dispatcher
            flags += ("--wandb-project", "ep_comm-test") if dispatcher == "alltoall" else ()
            steps = ["--train-iters", TINY_STEPS, "--lr-decay-iters", 2 * TINY_STEPS]
            steps += ["--eval-interval", TINY_STEPS // 2]
            train(run_dir, *TINY, *steps, "--moe-token-dispatcher", dispatcher, *flags)
            made[key] = run_dir
        return made[key]

    return run
