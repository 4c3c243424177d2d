"""What is planted in a log is found, at its place, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up_log import LAYERS, write_run

from ep_comm.job.exits import UserError
from ep_comm.job.files import take_folder
from ep_comm.report.findings import compare, find, find_all
from ep_comm.report.run import MODEL_KEYS, read
from ep_comm.telemetry import advice

STEPS = 300


def found(tmp_path: Path, change=lambda record: None, **config) -> list:
    return find(read(write_run(tmp_path / "run", STEPS, change, **config)))


def of_step(change):
    """Change the records of steps alone."""
    return lambda record: change(record) if record["type"] == "train" else None


def test_nothing_stands_out_of_an_even_run(tmp_path):
    assert found(tmp_path) == []


def test_a_late_rank_is_named_with_its_stretch(tmp_path):
    def late(record):
        if record["iteration"] >= 120:
            record["ep/wait-share"] = 0.15
            if record["iteration"] % 10 < 8:
                record["ep/slowest-rank"] = 3

    (finding,) = found(tmp_path, of_step(late))
    begin = int(finding.text.split("From step ")[1].split()[0])
    assert abs(begin - 120) <= 2 and "on rank 3 was the one" in finding.text
    assert finding.level == "look" and finding.section == "ranks"
    assert finding.todo == advice.LATE_RANK


def test_a_rank_that_nobody_had_to_wait_for_is_not_named(tmp_path):
    assert found(tmp_path, of_step(lambda record: record.update({"ep/slowest-rank": 3}))) == []


def test_waits_without_a_culprit(tmp_path):
    (finding,) = found(tmp_path, of_step(lambda record: record.update({"ep/wait-share": 0.35})))
    assert "35%" in finding.text and finding.todo == advice.WAIT_SHARE.when_high


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (STEPS, "From step 200 on a step takes 1.50"),
        (250, "From step 200 to 250 a step took 1.50"),
    ],
)
def test_slow_steps(tmp_path, last, says):
    def slow(record):
        if 200 <= record["iteration"] <= last:
            record["iteration-time"] *= 1.5

    (finding,) = found(tmp_path, of_step(slow))
    assert finding.text.replace("1.49", "1.50").replace("1.51", "1.50").startswith(says)


def test_tails(tmp_path):
    def tail(record):
        if record["iteration"] % 20 == 0:
            record["ep/combine-ms-p99"] = 30.0 if record["iteration"] == 100 else 9.0

    (finding,) = found(tmp_path, of_step(tail))
    assert "In 15 of 299 steps, the 99th percentile of a combine" in finding.text
    assert "at worst 30 ms in step 100" in finding.text and finding.todo == advice.TAILS.when_high


@pytest.mark.parametrize(
    ("name", "value"), [("lm loss", float("nan")), ("grad-norm", float("inf"))]
)
def test_a_number_that_is_none(tmp_path, name, value):
    def break_it(record):
        if record["iteration"] >= 250:
            record[name] = value

    finding = found(tmp_path, of_step(break_it))[0]
    assert finding.level == "bad" and finding.text == f"`{name}` is no finite number at step 250."


def test_a_loss_that_rises(tmp_path):
    def rise(record):
        if record["iteration"] > 200:
            record["lm loss"] += (record["iteration"] - 200) / 20

    assert any("training loss rose" in each.text for each in found(tmp_path, of_step(rise)))


def test_hot_and_idle_experts(tmp_path):
    def skew(record):
        if record["type"] == "balance" and record["iteration"] > 150:
            tokens = record["layers"][4]["tokens"]
            tokens[17] *= 8
            tokens[40:48] = [0] * 8

    hot, idle = found(tmp_path, skew)
    assert hot.text.startswith("Expert 17 of layer 5 got")
    assert idle.text.startswith("8 of 64 experts of layer 5 got no token")
    assert hot.todo == idle.todo == advice.IMBALANCE.when_high


def test_uneven_ranks_from_a_step_on(tmp_path):
    def skew(record):
        if record["iteration"] > 100:
            record["ep/imbalance-rank"] = 2.2

    texts = [each.text for each in found(tmp_path, of_step(skew))]
    assert len(texts) == 2 and "2.20 times the mean" in texts[0]
    assert texts[1].startswith("From step 101 on tokens are less even")


def test_exposed_communication_says_which_flag_is_off(tmp_path):
    def expose(record):
        record["ep/exposed-ms"] = 120

    flags = {"ep_overlap_wgrad": False, "ep_fp8_dispatch": True}
    (finding,) = found(tmp_path, of_step(expose), **flags)
    assert "40% of the time" in finding.text and "--ep-overlap-wgrad" in finding.todo
    assert advice.FP8 not in finding.todo


def test_a_run_that_ended_early_and_one_that_is_still_going(tmp_path):
    folder = write_run(tmp_path / "run", 30, asked=100)
    (finding,) = find(read(folder))
    assert "ended at step 30 of 100" in finding.text
    take_folder(folder, "--run-dir")
    run = read(folder)
    (finding,) = find(run)
    assert "still going" in finding.text and run.state.startswith("still going: step 30 of 100")


def test_damaged_lines_are_counted_and_the_rest_is_read(tmp_path):
    folder = write_run(tmp_path / "run", 30)
    path = folder / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = b"\xff\xfe\x00" + lines[5][:9] + b"\n"
    lines[7] = b"[1, 2]\n"
    path.write_bytes(b"".join(lines) + b"\n" + lines[9][:20])  # killed while it wrote
    (finding,) = find(read(folder))
    assert "3 lines of the log cannot be read: 6, 8, 63" in finding.text


def test_warnings_of_the_run(tmp_path):
    folder = write_run(tmp_path / "run", 30)
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"type": "warning", "iteration": 1, "text": "slow backend"}) + "\n")
    (finding,) = find(read(folder))
    assert finding.text == "The run warned at step 1: slow backend"


def test_a_failure_is_told(tmp_path):
    folder = write_run(tmp_path / "run", 30)
    (folder / "faults").mkdir()
    (folder / "faults" / "a-1-rank0.json").write_text("{}")
    finding = find(read(folder))[0]
    assert finding.level == "bad" and "cannot be read" in finding.text
    assert "ep-comm explain" in finding.todo


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "is no folder"),
        (lambda folder: folder.mkdir(), "has no log.jsonl, which a run of"),
        (lambda folder: write_run(folder / "alltoall", 3), "it has runs in alltoall"),
        (lambda folder: write_run(folder, 0), "has no step yet"),
    ],
    ids=["missing", "empty", "parent", "begun"],
)
def test_folders_that_are_no_runs(tmp_path, make, words):
    make(tmp_path / "run")
    with pytest.raises(UserError, match=words):
        read(tmp_path / "run")


def test_different_models_are_named(tmp_path):
    first = read(write_run(tmp_path / "a", 30))
    second = read(write_run(tmp_path / "b", 30, seed=2, num_layers=LAYERS + 1, run_dir="elsewhere"))
    (finding,) = compare(first, second)
    assert finding.level == "bad" and f"`num_layers` {LAYERS} and {LAYERS + 1}" in finding.text
    assert find_all([first, second]) == [[finding], [], []]
    assert compare(first, first) == []


def test_the_keys_of_a_model_are_those_of_the_configuration():
    pytest.importorskip("pydantic")
    from ep_comm.pretrain.config import MixtureOfExperts, Model

    ours = set(MODEL_KEYS)
    assert set(Model.model_fields) <= ours
    assert ours - set(Model.model_fields) <= set(MixtureOfExperts.model_fields)
