"""The launcher: a script of Megatron's own, unchanged, with our dispatcher.

`megatron_standin` has the script. With megatron-core 0.16, whose wheel has no
``megatron.training``, it stands in a folder with one of our own and that wheel's
``megatron.core``, as in a clone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pickletools
import signal
import socket
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from example_runs import ROOT, assert_refused, environment
from megatron_model import Setup, train
from ranks import run_ranks, stop_pool

from ep_comm.backends.nvlink.support import Facts
from ep_comm.errors import (
    EPArgumentError,
    EPTimeoutError,
    EPTooManyTokensError,
    EPUnsupportedError,
)
from ep_comm.job.exits import UserError
from ep_comm.megatron import EPOptions
from ep_comm.megatron.balance import LayerBalance, markdown
from ep_comm.megatron.launch import main as launch
from ep_comm.megatron.launch.flags import (
    extend_parser,
    tokens_per_rank,
    wants_ep_comm,
)
from ep_comm.megatron.options import OPTIONS
from ep_comm.megatron.support import BY_FLAGS
from ep_comm.megatron.versions import SUPPORTED, is_supported
from ep_comm.routing.capture import Sizes, read

# Not imported: processes of ours start without. (`megatron` alone would be the tests' folder.)
if importlib.util.find_spec("megatron.core") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)

STANDIN = Path(__file__).parents[1] / "megatron_standin"
STEPS = 3
FLAGS = f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --seq-length 16
    --max-position-embeddings 16 --position-embedding-type rope --vocab-size 63
    --micro-batch-size 2 --global-batch-size 4 --train-iters {STEPS} --lr 1e-2 --save-interval 100
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-router-dtype fp32
    --expert-model-parallel-size 2 --mtp-num-layers 1 --transformer-impl local
    --use-cpu-initialization --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-rope-fusion --disable-bias-linear --swiglu --hidden-dropout 0
    --attention-dropout 0 --distributed-backend gloo --tokenizer-type NullTokenizer
""".split()
HAVE_WANDB = importlib.util.find_spec("wandb") is not None


@pytest.fixture(scope="module", autouse=True)
def processes():
    yield
    stop_pool("launch")
    stop_pool("without-megatron")


# --- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """The stand-in, in a folder from which a whole megatron can be imported."""
    folder = tmp_path_factory.mktemp("clone")
    core = Path(importlib.util.find_spec("megatron.core").origin).parent
    if not (core.parent / "training").is_dir():
        (folder / "megatron").mkdir()
        (folder / "megatron" / "core").symlink_to(core)
        (folder / "megatron" / "training").symlink_to(STANDIN / "training")
    (folder / "pretrain_standin.py").write_bytes((STANDIN / "pretrain_standin.py").read_bytes())
    return folder / "pretrain_standin.py"


def run(script: Path, *flags: object) -> SimpleNamespace:
    """The script through the launcher, on two processes without a GPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "ep_comm.megatron.launch", str(script), *FLAGS, *map(str, flags)]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment(), "WANDB_MODE": "offline"},
        start_new_session=True,  # so that a hanging run can be ended with all its processes
    )
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return SimpleNamespace(code=process.returncode, output=output, seconds=time.monotonic() - start)


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


def import_launch_hooks(**global_vars: object) -> ModuleType:
    """Without the rest of Megatron's training."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    names = ("get_args", "get_tensorboard_writer", "get_wandb_writer")
    stubs = {
        "megatron.training": ModuleType("megatron.training"),
        "megatron.training.global_vars": SimpleNamespace(
            **{**dict.fromkeys(names, lambda: None), **global_vars}
        ),
    }
    with mock.patch.dict(sys.modules, stubs):
        from ep_comm.megatron.launch import hooks as launch_hooks
    return launch_hooks


def hooks_of_a_loop(rank: int) -> None:
    """A loop of Megatron's, as far as its functions are wrapped."""
    settings = SimpleNamespace(
        tensorboard_dir="x", wandb_project=None, tensorboard_log_interval=2, log_interval=3,
        save=None,
    )  # fmt: skip
    written, done = [], []
    writer = SimpleNamespace(
        add_scalar=lambda *values: written.append(values),
        add_text=lambda *values: written.append(values),
    )
    hooks = import_launch_hooks(get_args=lambda: settings, get_tensorboard_writer=lambda: writer)
    optimizer = SimpleNamespace(step=lambda: done.append("stepped"))
    training = SimpleNamespace(
        __file__="/clone/megatron/training/training.py",
        setup_model_and_optimizer=lambda: (["model"], optimizer, None),
        training_log=lambda losses, iteration: "logged",
        evaluate=lambda: "evaluated",
        save_checkpoint=lambda: None,
    )
    balance = (LayerBalance(3, 2, (5, 0, 2, 1)),)
    meter = mock.Mock(step=mock.Mock(side_effect=[{"ep/x": n} for n in range(9)]), balance=balance)
    names = ("check_model", "MoEMeter", "install", "complete", "tokens_per_rank")
    checked = {name: mock.Mock(return_value=3) for name in names}
    checked["MoEMeter"].return_value = meter
    checked["complete"].return_value = EPOptions(overlap_wgrad=True, max_tokens_per_rank=3)
    gradients = lambda model: done.append(("checked", model))  # noqa: E731
    checked["check_overflow"] = lambda model: done.append(("room", model))
    with mock.patch.multiple(hooks, check_weight_gradients=gradients, **checked):
        hooks.Training(training, "0").use(EPOptions(overlap_wgrad=True))
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            training.setup_model_and_optimizer()
        checked["complete"].assert_called_once_with(max_tokens_per_rank=3)
        checked["check_model"].assert_called_once_with(["model"])
        assert "3 MoE layers on rank 0" in output.getvalue()
        optimizer.step()
        assert done == [("checked", ["model"]), ("room", ["model"]), "stepped"]
        for iteration in (1, 2):
            assert training.training_log({}, iteration) == "logged"
        assert training.evaluate() == "evaluated"
        for iteration in (3, 4):
            training.training_log({}, iteration=iteration)
    # Measured in every step, written in every second; what was evaluated is in neither.
    assert written == [("ep/x", 1, 2), ("ep/balance", markdown(balance), 3), ("ep/x", 4, 4)]
    assert markdown(balance).endswith("| 3 | 1.25 | 2.50 | 0 | 0 | 1 |\n")


def test_the_loop_checks_and_logs_what_it_should():
    run_ranks(1, hooks_of_a_loop, fresh=True)


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)"], ids=["end", "exit"])
def test_a_script_that_ended_well_still_waits_for_its_communication(end, tmp_path, monkeypatch):
    script = tmp_path / "pretrain.py"
    script.write_text(end)
    error = EPTimeoutError(
        op="combine", phase="rows", rank=0, late_ranks=(1,), epoch=3, timeout_s=2.0
    )
    training = SimpleNamespace(options=3, started=True, finish=mock.Mock(side_effect=error))
    monkeypatch.setattr(sys, "argv", ["launch", str(script), "--moe-token-dispatcher", "deepep"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(launch, "_check_megatron", lambda script: "0")
    monkeypatch.setattr(launch, "_hook_megatron", lambda version: training)
    monkeypatch.setattr(launch, "register_optimizer_step_pre_hook", lambda hook: None)
    with pytest.raises(EPTimeoutError):
        launch.main()


def saving_after_an_error(rank: int) -> None:
    launch_hooks = import_launch_hooks()
    saved = []
    others = ("setup_model_and_optimizer", "training_log", "evaluate")
    training = SimpleNamespace(save_checkpoint=saved.append, **dict.fromkeys(others, lambda: None))
    with mock.patch.object(launch_hooks, "install"):
        hooks = launch_hooks.Training(training, "0")
        hooks.use(EPOptions())
    late = EPTimeoutError(
        op="combine", phase="rows", rank=0, late_ranks=(1,), epoch=3, timeout_s=2.0
    )
    assert "or raise --ep-timeout if" in str(late)
    too_many = EPTooManyTokensError(num_tokens=(5, 0), max_tokens=4)
    assert str(too_many).endswith("raise --ep-max-tokens-per-rank")
    with mock.patch.object(launch_hooks, "synchronize_buffers", side_effect=late):
        for call in (lambda: training.save_checkpoint(7), hooks.finish):
            with pytest.raises(EPTimeoutError):
                call()
    assert not saved
    training.save_checkpoint(8)
    hooks.finish()
    assert saved == [8]


def test_nothing_is_saved_after_communication_that_failed():
    run_ranks(1, saving_after_an_error, fresh=True)


# --- what is refused -----------------------------------------------------------------------------


def test_what_layers_refuse_ends_all_ranks_with_one_line(script, tmp_path):
    result = run(
        script, "--moe-token-dispatcher", "deepep", "--ep-fp8-dispatch", "--save", tmp_path
    )
    assert_refused(result, "hidden 32 is not a multiple")
    assert "when instantiating" not in result.output  # Megatron's addition
    assert not list(tmp_path.iterdir())


def test_other_scripts_may_neither_step_nor_end(script):
    other = script.with_name("other.py")
    other.write_text(
        "import torch\n"
        "try:\n"
        "    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).step()\n"
        "except Exception as error:\n"
        "    print('no step:', error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-m", "ep_comm.megatron.launch", other, "--moe-token-dispatcher=deepep"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    message = f"{other} never called Megatron's argument parser"
    assert f"no step: {message}" in process.stdout
    assert process.returncode == 2
    (line,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    assert message in line and "Traceback" not in process.stderr


def test_a_missing_script_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch", str(tmp_path / "pretrain.py"), "--lr", "1"])
    with pytest.raises(SystemExit) as exit:
        launch.main()
    assert exit.value.code == 2
    assert f"error: there is no script {tmp_path}" in capsys.readouterr().err


def make_clone(folder: Path, *packages: str, version: str = "0.19.0") -> Path:
    for package in packages:
        (folder / "megatron" / package).mkdir(parents=True)
        (folder / "megatron" / package / "__init__.py").touch()
        info = f"__version__ = {version!r}\n"
        (folder / "megatron" / package / "package_info.py").write_text(info)
    return folder


def check_megatron(rank: int, path: tuple[Path, ...], pythonpath: tuple[Path, ...]) -> str:
    """The version that a script in ``path[0]`` finds, or why it is refused."""
    saved = list(sys.path)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, pythonpath))
    sys.path[:] = [str(folder) for folder in (*path[:1], *pythonpath, *path[1:])]
    try:
        return launch._check_megatron(path[0] / "pretrain.py")
    except UserError as error:
        return str(error)
    finally:
        sys.path[:] = saved
        del os.environ["PYTHONPATH"]
        sys.modules.pop("megatron", None)


def test_exactly_one_whole_megatron_of_a_known_version_is_accepted(tmp_path):
    both = ("core", "training")
    clone = make_clone(tmp_path / "clone", *both, version="0.20.0rc1+git")
    other = make_clone(tmp_path / "other", *both)
    wheel = make_clone(tmp_path / "wheel", "core")
    training = make_clone(tmp_path / "training", "training")
    old = make_clone(tmp_path / "old", *both, version="0.15.3")
    new = make_clone(tmp_path / "new", *both, version="0.21.0")
    tools = tmp_path / "tools"

    def check(*path: Path, pythonpath: tuple[Path, ...] = ()) -> str:
        (answer,) = run_ranks(1, check_megatron, path, pythonpath, pool="without-megatron")
        return answer

    assert check(clone) == check(clone, wheel) == check(clone, pythonpath=(clone,))
    assert check(clone) == check(tools, pythonpath=(clone,)) == "0.20.0rc1+git"
    assert "there is no megatron.core" in check(tools)
    assert "there is no megatron.training" in check(wheel)
    for unknown, version in ((old, "0.15.3"), (new, "0.21.0")):
        assert f"Megatron {version} in {unknown / 'megatron'} is not supported" in check(unknown)
    assert ">=0.16.1,<0.21" in check(old)
    mixed = check(training, wheel)
    assert "two copies of megatron are mixed" in mixed
    assert str(wheel) in mixed and str(training) in mixed
    elsewhere = check(clone, pythonpath=(other,))
    assert f"PYTHONPATH names {other}" in elsewhere and str(clone) in elsewhere


def test_the_supported_range_is_the_one_that_is_installed():
    assert f'"megatron-core{SUPPORTED}"' in (ROOT / "pyproject.toml").read_text()
    assert f"megatron-core `{SUPPORTED}`" in (ROOT / "docs" / "megatron.md").read_text()
    assert [is_supported(v) for v in ("0.16.0", "0.16.1", "0.19.2", "0.20.0.dev1", "0.21.0")] == [
        False, True, True, True, False,
    ]  # fmt: skip


# --- flags ---------------------------------------------------------------------------------------


def megatron_arguments() -> SimpleNamespace:
    """A module like ``megatron.training.arguments``."""

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        for fsdp in ("--use-torch-fsdp2", "--use-megatron-fsdp"):
            parser.add_argument(fsdp, action="store_true")
        for flag in ("--moe-enable-deepep", "--use-checkpoint-args"):
            parser.add_argument(flag, action="store_true")
        for flag in ("--save", "--wandb-project", "--wandb-save-dir", "--ep-of-megatron"):
            parser.add_argument(flag)
        parser.add_argument("--num-experts", type=int)
        parser.add_argument("--moe-expert-rank-capacity-factor", type=float)
        parser.add_argument("--moe-flex-dispatcher-backend", default="deepep")
        types = ("allgather", "alltoall", "flex")
        parser.add_argument("--moe-token-dispatcher-type", choices=types, default="allgather")
        return parser

    return SimpleNamespace(add_megatron_arguments=add_megatron_arguments)


def parse(line: str) -> tuple[dict, list[EPOptions]]:
    used = []
    module = megatron_arguments()
    extend_parser(module, used.append)
    parser = module.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return vars(parser.parse_args(line.split())), used


def stock_parse(line: str) -> dict:
    parser = megatron_arguments().add_megatron_arguments(argparse.ArgumentParser())
    return vars(parser.parse_args(line.split()))


@pytest.mark.parametrize("chosen", ["", "alltoall", "flex", "allgather"])
def test_with_other_dispatchers_nothing_of_ours_is_left(chosen):
    by_type = f"--num-experts 4 --moe-token-dispatcher-type {chosen}" if chosen else ""
    assert parse(by_type) == (stock_parse(by_type), [])
    if chosen:
        by_name = f"--num-experts 4 --moe-token-dispatcher {chosen}"
        assert parse(by_name) == (stock_parse(by_type), [])


@pytest.mark.parametrize(
    "chosen",
    [
        "--moe-token-dispatcher deepep",
        "--moe-token-dispatcher-type=deepep",
        "--moe-token-dispatcher deepep --moe-token-dispatcher-type alltoall",
        "--moe-token-dispatcher=ep_comm",
        "--moe-token-dispatcher-type ep_comm",
        "--moe-token-dispatcher deepep --moe-token-dispatcher-type ep_comm",
    ],
)
def test_ours_is_ep_comm_to_the_reader_and_alltoall_to_megatron(chosen):
    args, used = parse(f"{chosen} --num-experts 4 --ep-of-megatron x --ep-timeout 7")
    assert args["moe_token_dispatcher_type"] == "alltoall"
    assert args["moe_token_dispatcher"] == "ep_comm"
    assert used == [EPOptions(timeout_s=7.0)]
    assert wants_ep_comm(chosen.split()) and not wants_ep_comm("--lr deepep".split())
    assert not wants_ep_comm("--moe-token-dispatcher flex --load ep_comm".split())


def test_every_option_has_its_flag():
    line = "--moe-token-dispatcher deepep --num-experts 4 --ep-fp8-dispatch --ep-overlap-wgrad "
    line += "--ep-num-sms 24 --ep-timeout 5 --ep-expert-alignment 32 --ep-max-tokens-per-rank 9 "
    line += "--ep-fp8-grad-dispatch --ep-capacity-factor 1.5 --ep-overflow error "
    line += "--ep-device-counts"
    args, used = parse(line)
    options = EPOptions(
        fp8_dispatch=True,
        fp8_grad_dispatch=True,
        overlap_wgrad=True,
        num_sms=24,
        timeout_s=5.0,
        expert_alignment=32,
        max_tokens_per_rank=9,
        capacity_factor=1.5,
        overflow="error",
        device_counts=True,
    )
    assert used == [options]
    assert {each.name: args[each.key] for each in OPTIONS} == vars(options)


@pytest.mark.parametrize("also", ["", " --ep-capacity-factor 1.25"])
def test_megatrons_capacity_of_a_rank_is_taken_and_cleared(also):
    args, used = parse(f"{OURS} --moe-expert-rank-capacity-factor 1.25{also}")
    assert used == [EPOptions(capacity_factor=1.25)]
    assert args["ep_capacity_factor"] == 1.25 and args["moe_expert_rank_capacity_factor"] is None
    stock = "--moe-token-dispatcher flex --moe-expert-rank-capacity-factor 1.25"
    assert parse(stock)[0]["moe_expert_rank_capacity_factor"] == 1.25


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ({}, 3 * 1000),
        (dict(tensor_model_parallel_size=2), 3 * 1000),  # each has the whole sequence
        (dict(tensor_model_parallel_size=2, sequence_parallel=True), 3 * 500),
        (dict(context_parallel_size=4), 3 * 250),
        (dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=4), 375),
        (dict(tensor_model_parallel_size=7, sequence_parallel=True), 429),
        (dict(eval_micro_batch_size=5), 5 * 1000),
        (dict(eval_micro_batch_size=2), 3 * 1000),
        (dict(decoder_seq_length=1500), 3 * 1500),
        (dict(decoder_seq_length=100), 3 * 1000),
        (dict(seq_length=None), None),
        (dict(variable_seq_lengths=True), None),
        (dict(hybrid_context_parallel=True), None),
        (dict(perform_rl_step=True), None),
    ],
)
def test_tokens_of_a_rank_by_megatrons_arguments(arguments, tokens):
    settings = dict(micro_batch_size=3, seq_length=1000, context_parallel_size=1)
    settings |= dict(tensor_model_parallel_size=1, sequence_parallel=False)
    assert tokens_per_rank(argparse.Namespace(**{**settings, **arguments})) == tokens


OURS = "--moe-token-dispatcher deepep --num-experts 4"
UNSUPPORTED = [
    (f"{OURS} --moe-enable-deepep", "--moe-enable-deepep: it asks for"),
    (
        f"{OURS} --moe-flex-dispatcher-backend hybridep",
        "--moe-flex-dispatcher-backend (hybridep): it belongs to",
    ),
    (f"{OURS} --use-torch-fsdp2", "FSDP (--use-megatron-fsdp, --use-torch-fsdp2)"),
    (f"{OURS} --use-megatron-fsdp", "FSDP (--use-megatron-fsdp, --use-torch-fsdp2)"),
]


@pytest.mark.parametrize(("line", "message"), UNSUPPORTED)
def test_flags_that_do_not_go_with_ours_are_refused(line, message):
    with pytest.raises(EPUnsupportedError) as caught:
        parse(line)
    assert str(caught.value).startswith(f"ep_comm does not support {message}")


def test_every_refusal_of_a_flag_is_tested():
    for refusal in BY_FLAGS:
        assert any(message.startswith(refusal.what) for _, message in UNSUPPORTED), refusal.what


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{OURS} --moe-token-dispatcher-type flex", "--moe-token-dispatcher-type flex"),
        (f"{OURS} --moe-token-dispatcher-type allgather", "contradict each other"),
        ("--moe-token-dispatcher flex --moe-token-dispatcher-type alltoall", "contradict"),
        ("--ep-num-sms 8 --ep-timeout 3", "--ep-num-sms, --ep-timeout: only with"),
        ("--moe-token-dispatcher alltoall --ep-fp8-dispatch", "--ep-fp8-dispatch: only with"),
        (
            "--moe-token-dispatcher ep_comm --moe-token-dispatcher-type flex",
            "--moe-token-dispatcher ep_comm and --moe-token-dispatcher-type flex contradict",
        ),
        (
            f"{OURS} --ep-timeout -1",
            "timeout_s must be a positive number of seconds, at most 1e+08, got -1",
        ),
        (f"{OURS} --ep-num-sms 1", "num_sms must be at least 2"),
        (f"{OURS} --ep-capacity-factor 0.9", "capacity_factor must be at least 1, got 0.9"),
        (
            f"{OURS} --ep-capacity-factor 1.5 --moe-expert-rank-capacity-factor 1.25",
            "--ep-capacity-factor 1.5 and --moe-expert-rank-capacity-factor 1.25 contradict",
        ),
        ("--moe-token-dispatcher deepep", "needs --num-experts"),
        (f"{OURS} --ep-capture-routing {__file__}/x", f"--ep-capture-routing {__file__}/x cannot"),
        (f"{OURS} --wandb-project p", "--wandb-save-dir"),
        (f"{OURS} --wandb-project p --save {__file__}", "--save: W&B cannot write"),
        (f"{OURS} --wandb-project p --wandb-save-dir {__file__}/x", "--wandb-save-dir: W&B"),
    ],
)
def test_flags_that_cannot_be_are_refused(line, message):
    with pytest.raises(UserError) as caught:
        parse(line)
    assert message in str(caught.value)


def test_only_the_node_of_the_last_rank_needs_the_wandb_dir(monkeypatch):
    line = f"{OURS} --wandb-project p --wandb-save-dir {__file__}/x"
    for name, value in (("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", 4), ("RANK", 3)):
        monkeypatch.setenv(name, str(value))
    assert len(parse(line)[1]) == 1
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(UserError):
        parse(line)


def test_help_needs_no_megatron(monkeypatch, capsys):
    for arguments in (["--help"], []):
        monkeypatch.setattr(sys, "argv", ["launch", *arguments])
        with pytest.raises(SystemExit) as exit:
            launch.main()
        assert exit.value.code == 0
        text = capsys.readouterr().out
        for flag in ("--moe-token-dispatcher", "--ep-num-sms", "--ep-timeout", "srun"):
            assert flag in text


def test_the_script_comes_first(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch", "--ep-num-sms", "8", "pretrain_gpt.py"])
    with pytest.raises(SystemExit) as exit:
        launch.main()
    assert exit.value.code == 2 and "the script comes first" in capsys.readouterr().err


# --- ranks and nodes -----------------------------------------------------------------------------


def train_on_two_hosts(rank: int, uneven: bool) -> str:
    """What a training says whose ranks are on hosts of two, the last on one of its own if uneven.

    The GPUs are not there, nor is NVSHMEM.
    """
    from ep_comm import _native
    from ep_comm.backends import NodesBackend

    facts = Facts(f"GPU-{rank}", (), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "load_nvshmem", lambda: None)
        patch.setattr(_native, "nvshmem_unusable_reason", lambda: "it is not installed")
        patch.setattr(socket, "gethostname", lambda: "abc"[rank // 2 + (uneven and rank == 3)])
        patch.setattr(NodesBackend, "facts", lambda group, config: facts)
        with pytest.raises((EPUnsupportedError, EPArgumentError)) as caught:
            train(rank, Setup(steps=1, ep=4))
    return str(caught.value)


def test_experts_across_hosts_need_equal_hosts_and_nvshmem():
    """The layers are built; the first dispatch, which makes the buffer, says what is missing."""
    for text in run_ranks(4, train_on_two_hosts, False, pool="launch"):
        assert "the group spans hosts, and rank 0 cannot use NVSHMEM: it is not installed" in text
    for text in run_ranks(4, train_on_two_hosts, True, pool="launch"):
        assert "host a has 2 ranks of the group, host b has 1" in text


def train_on_one_or_two_hosts(rank: int, split: int) -> tuple:
    """Losses of two steps, ranks from `split` on being on another host."""
    from ep_comm.backends.reference.backend import ReferenceBackend
    from ep_comm.megatron import destroy_buffers  # megatron.core comes with it

    nodes = []
    original = ReferenceBackend.set_num_sms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "ab"[rank >= split])
        patch.setattr(
            ReferenceBackend,
            "set_num_sms",
            lambda self, sms: (nodes.append(self.config.ranks_per_node), original(self, sms)),
        )
        losses = train(rank, Setup(steps=2, ep=4))["losses"]
        destroy_buffers()
    return losses, nodes


def test_experts_across_hosts_train_on_the_cpu():
    """With the sums of a node rounded first; the losses are those of one host up to that."""
    together, apart = (
        run_ranks(4, train_on_one_or_two_hosts, split, pool="launch") for split in (4, 2)
    )
    assert together[0][1] == [None] and apart[0][1] == [2]
    np.testing.assert_allclose(apart[0][0], together[0][0], rtol=1e-4)


def buffer_of_the_options(rank: int, **options: object) -> list[tuple]:
    """What each buffer of a training was made with."""
    from ep_comm.backends.reference.backend import ReferenceBackend

    made = []
    original = ReferenceBackend.set_num_sms
    ReferenceBackend.set_num_sms = lambda self, num_sms: made.append(
        (num_sms, self.config.max_tokens_per_rank, self.config.timeout_s)
    )
    try:
        train(rank, Setup(steps=1, options=tuple(options.items())))
    finally:
        ReferenceBackend.set_num_sms = original
    return made


def test_layers_hand_on_their_options():
    options = dict(num_sms=24, max_tokens_per_rank=777, timeout_s=11.0)
    made = run_ranks(2, partial(buffer_of_the_options, **options), pool="launch")
    assert made == [[(24, 777, 11.0)]] * 2


@pytest.mark.parametrize("num_sms", [1, 0, -3, 2.5])
def test_num_sms_of_the_options_is_checked(num_sms):
    with pytest.raises(EPArgumentError, match="num_sms must be at least 2"):
        EPOptions(num_sms=num_sms)
