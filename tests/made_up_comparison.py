"""The page of a comparison that never was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ep_comm.compare.report import make_document, make_page
from ep_comm.compare.statistics import Run, Tolerances, smooth, window_of
from ep_comm.report.document import Page

OFFSETS = {
    "alltoall": 0.0,
    "alltoall-seed2": 0.004,
    "alltoall-seed3": -0.003,
    "ep_comm": 0.001,
    "ep_comm-fp8": 0.2,  # outside of all tolerances
    "ep_comm-fp8-experts": 0.01,
    "ep_comm-fp8-experts-seed2": 0.012,
    "ep_comm-fp8-all": 0.011,
    "ep_comm-fp8-all-seed2": 0.01,
}
START = {"type": "start", "iteration": 0, "versions": {"torch": "2.11.0", "device": "NVIDIA H200"}}


def comparison_page(folder: Path, steps: int = 400, *, equal: bool = False) -> Page:
    """Return it; `equal`: all curves are the same."""
    runs = {}
    for seed, (name, offset) in enumerate(OFFSETS.items()):
        chance = np.random.default_rng(0 if equal else seed)
        curve = 3 + 3 / np.sqrt(np.arange(1, steps + 1)) + 0.002 * chance.standard_normal(steps)
        curve += 0 if equal else offset
        valid = {step: float(curve[step - 1]) + 0.1 for step in range(100, steps + 1, 100)}
        smoothed = smooth(curve, window_of(steps))
        runs[name] = Run(train=curve, smoothed=smoothed, valid=valid, tokens_per_s=123456.0)
    plan: Any = SimpleNamespace(
        config=Path("configs/gcide-100m.yaml"),
        steps=steps,
        processes=4,
        data_seed=None,
        settings={"wandb_project": None},
        skipped={"ep_comm-fp8-all-seed3": "no <GPU> computes block-wise FP8"},
        seed=lambda name: 1233 + int(name.partition("-seed")[2] or 1),
    )
    directory: Any = SimpleNamespace(group="compare", log=lambda name: [START])
    return make_page(make_document(plan, directory, runs, Tolerances()), runs, folder)
