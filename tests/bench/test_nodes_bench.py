"""``scripts/nodes_bench.py``: on the CPU, where the reference backend stands for both."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from unittest import mock

import torch
from made_up_operations import LIMIT, SETTINGS
from ranks import run_ranks

from ep_comm.bench import timing
from ep_comm.bench.ops.settings import Settings
from ep_comm.plan.check import compare

SCRIPT = Path(__file__).parents[2] / "scripts" / "nodes_bench.py"


def load_script():
    spec = importlib.util.spec_from_file_location("nodes_bench", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def a_file(rank: int, settings: Settings) -> dict:
    script = load_script()
    with mock.patch.multiple(timing, UNALIGNED_CALLS=2, _UNALIGNED_REPEATS=2):
        runs = script.measure(settings, torch.device("cpu"), 2, 50, measure_limit=lambda _: LIMIT)
    return script.as_json(*runs, 2, 50)


def test_its_json_can_be_compared_with_the_model():
    settings = dataclasses.replace(SETTINGS, sms=(0,))
    found = run_ranks(4, a_file, settings)[0]
    assert found["headline"].endswith("nodes of 2 ranks, network of 50 GB/s")
    assert (found["ranks_per_node"], found["network_gb_per_s"]) == (2, 50)
    names = [result["case"] for result in found["results"]]
    assert names == [result["case"] for result in found["one_node"]] and "combine" in names
    compared = {each.name: each for each in compare(found)}
    assert set(compared) == {
        *("dispatch, fresh", "dispatch, cached", "combine"),
        *("FP8 dispatch, fresh", "FP8 dispatch, cached"),
    }
    for each in compared.values():
        assert each.slack is not None and each.measured > each.model > 0  # a CPU is slow
