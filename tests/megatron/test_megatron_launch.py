"""A script through the launcher trains as with alltoall, and its logs have our scalars."""

from __future__ import annotations

import importlib.util
import json
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from example_runs import environment
from launch_runs import STEPS, need_megatron, run

from ep_comm.routing.capture import Sizes, read

need_megatron()


HAVE_WANDB = importlib.util.find_spec("wandb") is not None


def finished(folder: Path, result: SimpleNamespace) -> SimpleNamespace:
    """A run that trained to its end: its folder, its output and what the script left behind."""
    assert result.code == 0, result.output
    left = json.loads((folder / "result.json").read_text())
    return SimpleNamespace(folder=folder, output=result.output, **left)


@pytest.fixture(scope="module")
def stock(script, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("stock")
    return finished(folder, run(script, "--moe-token-dispatcher", "alltoall", "--save", folder))


@pytest.fixture(scope="module")
def ours(script, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("ours")
    flags = ["--moe-token-dispatcher-type", "deepep", "--ep-overlap-wgrad", "--ep-num-sms", 24]
    flags += ["--tensorboard-dir", folder / "tensorboard"]
    flags += ["--ep-capture-routing", folder / "routing"]
    if HAVE_WANDB:
        flags += ["--wandb-project", "t", "--wandb-exp-name", "run", "--wandb-save-dir", folder]
    return finished(folder, run(script, *flags, "--save", folder))


def test_script_trains_like_alltoall_in_every_moe_layer(stock, ours):
    layers = 3  # the multi-token prediction layer is one
    assert stock.dispatchers == ["MoEAlltoAllTokenDispatcher"] * layers
    assert ours.dispatchers == ["EPCommTokenDispatcher"] * layers
    assert len(ours.losses) == STEPS and ours.losses[-1] < ours.losses[0]
    assert ours.losses == pytest.approx(stock.losses, rel=1e-6)


def test_start_up_says_what_is_used(stock, ours):
    assert "ep_comm" not in stock.output.replace("ep_comm.megatron.cpu", "")
    (line,) = (line for line in ours.output.splitlines() if "MoE layers" in line)
    assert "3 MoE layers on rank 0, all with our dispatcher" in line
    assert "overlap_wgrad=True" in line and "num_sms=24" in line
    assert "max_tokens_per_rank=32" in line  # two sequences of 16


def test_checkpoints_hold_plain_values_of_ours(ours, stock):
    """A script without ep_comm reads them."""
    pickled = zipfile.ZipFile(ours.folder / "common.pt").read("common/data.pkl")
    globals_ = [arg for opcode, arg, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"]
    assert b"ep_overlap_wgrad" in pickled and globals_
    assert not any(name.startswith("ep_comm") for name in globals_)
    args, stock_args = (
        vars(torch.load(each.folder / "common.pt", weights_only=False)["args"])
        for each in (ours, stock)
    )
    added = {name: args[name] for name in args.keys() - stock_args.keys()}
    assert added == {
        "moe_token_dispatcher": "ep_comm",
        "ep_fp8_dispatch": False,
        "ep_fp8_grad_dispatch": False,
        "ep_fp8_direct": False,
        "ep_overlap_wgrad": True,
        "ep_copy_engines": False,
        "ep_expert_alignment": None,
        "ep_max_tokens_per_rank": None,
        "ep_num_sms": 24,
        "ep_timeout": None,
        "ep_capture_routing": str(ours.folder / "routing"),
        "ep_capacity_factor": None,
        "ep_overflow": None,
        "ep_device_counts": False,
    }
    assert args["moe_token_dispatcher_type"] == stock_args["moe_token_dispatcher_type"]


@pytest.mark.skipif(not HAVE_WANDB, reason="needs wandb")
def test_routing_is_captured(ours):
    """That of Megatron's iterations 1 and 2, and no other; each expert of 2 on 64 tokens."""
    folder = ours.folder / "routing"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000001", "step-00000002"]
    capture = read(folder)
    assert capture.sizes == Sizes(num_experts=4, num_topk=2, hidden=32, num_ranks=2)
    assert capture.layers[:2] == (1, 2)
    for of_layer in capture.topk_idx:
        assert [rows.shape for rows in of_layer] == [(32, 2), (32, 2)]
        assert (np.concatenate(of_layer) >= 0).all()


def test_scalars_are_in_megatrons_wandb_run(ours):
    (path,) = ours.folder.glob("wandb/offline-run-*/run-*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    output = subprocess.run(inspect, stdout=subprocess.PIPE, check=True, env=environment()).stdout
    records = [json.loads(line) for line in output.splitlines()]
    (config,) = (r["run"]["config"] for r in records if r["type"] == "run" and "config" in r["run"])
    steps = [r["history"]["item"] for r in records if r["type"] == "history"]
    assert [step["_step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert all(step[f"ep/{phase}-ms"] > 0 for phase in ("dispatch", "combine", "expert"))
        assert 1 <= step["ep/imbalance-rank"] <= 2 and 1 <= step["ep/imbalance-expert"] <= 4
    assert config["update"]["moe_token_dispatcher"] == "ep_comm"
    (table,) = (step for step in steps if step.get("ep/balance._type") == "table-file")
    assert (table["_step"], table["ep/balance.ncols"], table["ep/balance.nrows"]) == (2, 6, 3)


def test_scalars_go_to_megatrons_tensorboard_writer(ours):
    path = ours.folder / "tensorboard" / "scalars.jsonl"
    if not path.exists():
        pytest.skip("needs the stand-in for megatron.training, whose writer needs no tensorboard")
    scalars = [json.loads(line) for line in path.read_text().splitlines()]
    assert [iteration for name, _, iteration in scalars if name == "ep/dispatch-ms"] == [1, 2, 3]
    assert {f"ep/{name}" for name in ("combine-ms", "expert-ms", "imbalance-rank")} <= {
        name for name, value, _ in scalars if value > 0
    }
    ((name, text, iteration),) = map(json.loads, path.with_name("texts.jsonl").open())
    assert (name, iteration) == ("ep/balance", 2) and text.count("\n") == 2 + 3
