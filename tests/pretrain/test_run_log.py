"""examples/pretrain_moe.py: its logs, whole, damaged, and in W&B."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")

from example_runs import (  # noqa: E402
    SMALL,
    TINY,
    TINY_STEPS,
    records,
    refused,
    wandb_records,
)
from ranks import run_ranks  # noqa: E402

from ep_comm.pretrain.config import PretrainConfig  # noqa: E402
from ep_comm.pretrain.log_file import LOG_FILE, read_log, read_whole_log  # noqa: E402

pytestmark = pytest.mark.xdist_group("tiny-cpu")  # whose runs two modules look at

# Measured by the rank that logs them.
OF_EACH_RANK = ("iteration-time", "throughput", "tokens-per-second")


def test_log_has_everything(tiny_runs):
    start = records(tiny_runs("ep_comm"), "start")[0]
    assert start["dispatcher"] == "ep_comm" and start["processes"] == 2
    assert {"ep_comm", "torch", "megatron-core"} <= start["versions"].keys()
    PretrainConfig(**start["config"])  # can be read back
    steps = records(tiny_runs("ep_comm"), "train")
    assert [r["iteration"] for r in steps] == list(range(1, TINY_STEPS + 1))
    for record in steps:
        assert record.keys() >= {
            *("lm loss", "grad-norm", "learning-rate", "iteration-time", "throughput"),
            "tokens-per-second",
            *("ep/dispatch-ms", "ep/combine-ms", "ep/expert-ms"),
            *("ep/imbalance-rank", "ep/imbalance-expert", "ep/wire-mib"),
            *("ep/dispatch-ms-p99", "ep/combine-ms-p99", "ep/wait-share", "ep/slowest-rank"),
            "ep/exposed-ms",
        }
        assert record["ep/wire-mib"] > 0
        assert record["ep/imbalance-rank"] >= 1 and record["ep/imbalance-expert"] >= 1
    assert [r["iteration"] for r in records(tiny_runs("ep_comm"), "valid")] == [
        TINY_STEPS // 2,
        TINY_STEPS,
    ]
    balance = records(tiny_runs("ep_comm"), "balance")
    assert [r["iteration"] for r in balance] == list(range(5, TINY_STEPS + 1, 5))
    trained = {r["iteration"]: r for r in steps}
    config = PretrainConfig(**start["config"])
    tokens = config.global_batch_size * config.seq_length * config.moe_router_topk
    for record in balance:
        layers = record["layers"]
        assert [layer["layer"] for layer in layers] == list(range(1, config.num_layers + 1))
        for layer in layers:
            assert len(layer["tokens"]) == config.num_experts and sum(layer["tokens"]) == tokens
            assert layer["tokens"][layer["fullest-expert"]] == max(layer["tokens"])
        for what in ("rank", "expert"):
            worst = max(layer[f"imbalance-{what}"] for layer in layers)
            assert worst == trained[record["iteration"]][f"ep/imbalance-{what}"]


def test_log_of_a_restarted_run(tmp_path):
    path = tmp_path / LOG_FILE
    lines = [{"type": "start", "iteration": 0}]
    lines += [{"type": "train", "iteration": i, "run": 1} for i in (1, 2, 3)]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"type": "tra')  # killed
    with path.open("a") as file:
        file.write('\n{"type": "start", "iteration": 2}\n')
        file.write('{"type": "train", "iteration": 3, "run": 2}\n')
    kept = [(r["iteration"], r["run"]) for r in read_log(path) if r["type"] == "train"]
    assert kept == [(1, 1), (2, 1), (3, 2)]


def test_damaged_lines_of_a_log(tmp_path):
    path = tmp_path / LOG_FILE
    good = b'{"type": "train", "iteration": 1}\n'
    path.write_bytes(good + b"\xff\x00\n" + b"[1]\n" + b'{"type": "train"}\n\n' + good + good[:9])
    log = read_whole_log(path)
    assert log.damaged == [2, 3, 4, 7]
    assert log.records == 2 * [{"type": "train", "iteration": 1}]


def a_warning(rank: int, folder: str) -> None:
    from ep_comm.pretrain.flags import parse_args
    from ep_comm.pretrain.log import RunLog

    with RunLog(parse_args([*TINY, "--run-dir", folder]), {}, first_iteration=0) as log:
        log.warning(3, "it is slow")


def test_the_log_has_the_warnings(tmp_path):
    run_ranks(1, a_warning, str(tmp_path))
    (record,) = records(tmp_path, "warning")
    assert record == {"type": "warning", "iteration": 3, "text": "it is slow"}


def test_the_bar_has_tails_and_the_slowest_rank():
    from ep_comm.pretrain.log import _tails

    step = {"ep/dispatch-ms-p99": 12.34, "ep/combine-ms-p99": 0.5, "ep/slowest-rank": 3.0}
    assert _tails(step) == "  dispatch/combine p99 12.3/0.5 ms  slowest rank 3"
    assert _tails({**step, "ep/slowest-rank": -1}) == "  dispatch/combine p99 12.3/0.5 ms"
    assert _tails({"lm loss": 3.0}) == ""  # another dispatcher


def test_wandb_without_a_key_writes_an_offline_run(tiny_runs):
    pytest.importorskip("wandb")
    run_dir = tiny_runs("alltoall")
    (folder,) = run_dir.glob("wandb/offline-run-*")
    written = wandb_records(folder)
    trained, validated = records(run_dir, "train"), records(run_dir, "valid")

    history = {r["step"]["num"]: r["item"] for r in written["history"]}
    assert list(history) == list(range(1, TINY_STEPS + 1))
    for record in [*trained, *validated]:
        logged = history[record["iteration"]]
        assert record.keys() - {"type", "iteration"} <= logged.keys()
        for key in record.keys() - {"type", "iteration", *OF_EACH_RANK}:
            assert record[key] == logged[key]
    summary = {key: value for r in written["summary"] for key, value in r["update"].items()}
    assert summary["lm loss"] == trained[-1]["lm loss"]
    assert summary["lm loss validation"] == validated[-1]["lm loss validation"]

    (run,) = written["run"]
    assert run["project"] == "ep_comm-test" and run["display_name"] == run_dir.name
    start = records(run_dir, "start")[0]
    assert run["run_id"] == start["wandb_run_id"]
    config = run["config"]["update"]
    assert start["config"].items() <= config.items() and config["world_size"] == 2
    # The last rank logs: rank 0 is the one that prints.
    assert not any(f"step {TINY_STEPS}/{TINY_STEPS}" in r["line"] for r in written["output_raw"])
    assert [r["exit_code"] for r in written["exit"]] == [0]


def test_failed_run_ends_its_logs(tmp_path):
    pytest.importorskip("wandb")
    flags = ["--lr", "1e30", "--clip-grad", "0", "--wandb-project", "ep_comm-test"]
    result = refused(*SMALL, *flags, "--run-dir", tmp_path)
    assert "the loss is nan at step" in result.error and "a lower --lr may help" in result.error
    assert f"log: {tmp_path / LOG_FILE}\n" in result.output
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert [r["exit_code"] for r in wandb_records(folder)["exit"]] == [1]
