"""``scripts/recorder_cost.py``: on the CPU, where all three buffers are the reference backend's."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from made_up_operations import SETTINGS
from ranks import run_ranks

from ep_comm._native import header
from ep_comm.bench import timing

SCRIPT = Path(__file__).parents[2] / "scripts" / "recorder_cost.py"


def load_script():
    if "recorder_cost" not in sys.modules:
        spec = importlib.util.spec_from_file_location("recorder_cost", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = sys.modules["recorder_cost"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["recorder_cost"]


def costs(rank: int) -> list[dict]:
    script = load_script()
    settings = dataclasses.replace(SETTINGS, sms=(0,))
    with mock.patch.multiple(timing, UNALIGNED_CALLS=2, _UNALIGNED_REPEATS=2):
        found = script.measure("tiny", settings, torch.device("cpu"), 2, Path("none"))
    script.show(found)
    return [cost.as_json() for cost in found]


def test_three_buffers_take_turns():
    found = run_ranks(2, costs)[0]
    turns = {(each["call"], each["what"]): len(each["us"]["with"]) for each in found}
    per_block = load_script().HOST_TURNS
    assert turns == {("fresh", "GPU"): 2, ("cached", "GPU"): 2, ("cached", "host"): 2 * per_block}
    for each in found:
        assert each["us"].keys() == {"with", "without", "with again"}
        num_turns = turns[each["call"], each["what"]]
        assert all(len(us) == num_turns and min(us) > 0 for us in each["us"].values())


def test_cost_and_noise():
    us = {"with": [1.01, 2.04, 3.3], "without": [1.0, 2.0, 3.0], "with again": [1.01, 2.04, 3.0]}
    cost = load_script().Cost("W1", "cached", "GPU", us)
    assert cost.as_json()["cost"] == pytest.approx(0.02)
    assert cost.as_json()["noise"] == pytest.approx(0.0)


def test_what_notes_nothing_is_called_like_what_does():
    kind = load_script().Unrecorded
    for name in ("start", "complete"):
        theirs = inspect.signature(getattr(kind.__base__, name))
        assert inspect.signature(getattr(kind, name)) == theirs


def test_the_library_without_records_is_built_like_the_other(tmp_path):
    script = load_script()
    try:
        command = script.build_command(tmp_path / "libep_comm.so")
    except script.UserError:
        pytest.skip("no nvcc on this machine")
    assert "-DEP_WITHOUT_RECORDS" in command and "csrc/dispatch/dispatch.cu" in command
    assert command[-1] == str(tmp_path / "libep_comm.so")


def test_the_kernels_know_that_name():
    assert "#ifdef EP_WITHOUT_RECORDS" in (SCRIPT.parents[1] / "csrc/common/peers.cuh").read_text()


def test_what_notes_nothing_gives_kernels_a_record():
    recorder = load_script().Unrecorded(0, 2, torch.device("cpu"), lambda: None)
    addresses = recorder.start(header.EP_OP_DISPATCH, b"3"), recorder.start(header.EP_OP_COMBINE)
    assert addresses == (recorder._address,) * 2
    recorder.complete(10, b"1")
    assert (recorder.num_operations, recorder.num_dispatches) == (2, 1)
    assert not any(recorder._rows_of_experts) and not any(recorder._ops)
