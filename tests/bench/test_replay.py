"""A captured routing is replayed: by each benchmark, with its own sizes, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from commands import run_command
from example_runs import ROOT
from made_up_operations import LIMIT
from ranks import run_ranks
from typer.testing import CliRunner

from ep_comm.bench import timing
from ep_comm.bench.low_latency.inputs import make_inputs as make_low_latency_inputs
from ep_comm.bench.low_latency.settings import Point, sizes
from ep_comm.bench.low_latency.settings import Settings as LowLatencySettings
from ep_comm.bench.ops.cases import make_inputs
from ep_comm.bench.ops.report import headline
from ep_comm.bench.ops.routing import NUM_SETS, RoutingSpec, routing_of
from ep_comm.bench.ops.run import Run, run
from ep_comm.bench.ops.settings import MIN_ITERS, Settings, Shape, shape_of_flags
from ep_comm.cli.app import app
from ep_comm.job.exits import UserError
from ep_comm.routing.capture import RankFile, read, spread, write_step

CAPTURE = ROOT / "tests" / "data" / "routing-capture"
SPEC = RoutingSpec.of_flags(None, None, None, replay=CAPTURE)
CAPTURED = read(CAPTURE)
LAYER_OF_SET = [0, 0, 1]  # of two captured layers, spread over three sets


def settings_of(spec: RoutingSpec = SPEC, **changed: int) -> Settings:
    return Settings(
        shape=shape_of_flags(None, spec, **changed),
        routing=spec,
        sms=(0,),
        fp8=False,
        layout="expert",
        iters=MIN_ITERS,
    )


def test_a_capture_has_sizes_of_its_own():
    settings = settings_of()
    settings.check()
    settings.check_job(num_ranks=2, available_sms=132)
    assert settings.shape == Shape(tokens=1024, hidden=128, experts=8, topk=2)
    assert settings_of(tokens=100, hidden=512).shape == Shape(100, 512, 8, 2)
    low_latency = sizes(tokens=None, hidden=None, replays=None, full=False, quick=False,
                        topk=None, experts=None, routing=SPEC)  # fmt: skip
    assert (low_latency.hidden, low_latency.topk, low_latency.experts) == ((128,), 2, 8)
    assert SPEC.describe() == "replay of routing-capture/step-00000064"
    assert (
        RoutingSpec.of_flags(None, None, None, replay=CAPTURE / "step-00000002").captured.step == 2
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_tokens_select_what_they_selected_in_the_run(rank):
    for i, inputs in enumerate(make_inputs(settings_of(), rank, torch.device("cpu"))):
        captured = CAPTURED.topk_idx[LAYER_OF_SET[i]][rank]
        np.testing.assert_array_equal(inputs.topk_idx.numpy(), captured)
        assert inputs.topk_idx.dtype == torch.int64
        torch.testing.assert_close(inputs.topk_weights.sum(dim=1), torch.ones(1024))


def test_of_more_tokens_than_asked_for_those_spread_evenly_are_taken():
    topk_idx, weights = routing_of(SPEC, 5, 8, 2, rank=1, number=2, seed=0)
    expected = CAPTURED.topk_idx[1][1][[0, 256, 512, 767, 1023]]
    np.testing.assert_array_equal(topk_idx.numpy(), expected)
    assert weights.shape == (5, 2)


def test_low_latency_replays_each_rank():
    settings = LowLatencySettings(topk=2, experts=8, routing=SPEC, fp8=False)
    point = Point(hidden=128, tokens=1024, room=1024, num_sms=0)
    sets = make_low_latency_inputs(settings, point, 1, 2, torch.device("cpu"))
    assert len(sets) == NUM_SETS
    for i, inputs in enumerate(sets):
        captured = CAPTURED.topk_idx[LAYER_OF_SET[i]]
        np.testing.assert_array_equal(inputs.topk_idx.numpy(), captured[1])
        counts = np.bincount(np.concatenate(captured).ravel(), minlength=8)
        assert inputs.counts.tolist() == counts[4:].tolist()  # of the experts of rank 1


def a_run(rank: int, settings: Settings) -> Run:
    with mock.patch.multiple(timing, UNALIGNED_CALLS=2, _UNALIGNED_REPEATS=1):
        return run(
            settings, torch.device("cpu"), lambda text: None, measure_limit=lambda watch: LIMIT
        )


def test_dispatch_and_combine_are_measured_with_it():
    found = run_ranks(2, a_run, replace(settings_of(tokens=64), iters=3))[0]
    assert "replay of routing-capture/step-00000064" in headline(found)
    counts, busiest = [], []
    for i in LAYER_OF_SET:
        of_ranks = [rows[spread(1024, 64)] for rows in CAPTURED.topk_idx[i]]
        counts.append(np.bincount(np.concatenate(of_ranks).ravel(), minlength=8))
        sent = [(rows // 4 == 1 - rank).any(axis=1).sum() for rank, rows in enumerate(of_ranks)]
        busiest.append(max(sent) * 128 * 2)
    by_name = {result.case: result for result in found.results}
    assert by_name["dispatch, fresh"].wire_bytes == pytest.approx(np.mean(busiest))
    imbalances = [each.max() / each.mean() for each in counts]
    assert found.expert_imbalance == pytest.approx(np.mean(imbalances)) and min(imbalances) > 1.3


def command(folder: Path, *flags: object) -> SimpleNamespace:
    words = ["bench", "low-latency", "--backend", "reference", "--replays", 10, "--out", folder]
    return run_command(*words, *flags, COLUMNS="200")


@pytest.mark.slow
def test_the_command_replays_on_the_reference_backend(tmp_path):
    done = command(tmp_path, "--replay", CAPTURE, "--tokens", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "top-2 of 8, replay of routing-capture/step-00000064" in done.stdout
    found = json.loads((tmp_path / "bench-low-latency.json").read_text())
    assert found["settings"]["routing"]["replay"] == str(CAPTURE / "step-00000064")
    assert found["num_wrong"] == 0 and found["settings"]["hidden"] == [128]


@pytest.mark.slow
def test_the_command_refuses_a_capture_of_other_ranks(tmp_path):
    changed(tmp_path / "capture", num_ranks=4)
    done = command(tmp_path / "out", "--replay", tmp_path / "capture", "--tokens", "4")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1
    assert "is of 4 ranks, and this job has 2" in errors[0]
    assert not (tmp_path / "out").exists()  # nothing was begun


def changed(folder: Path, **sizes: int) -> RoutingSpec:
    """The last step of the shipped capture as if its run had had other sizes."""
    others = CAPTURED.sizes._replace(**sizes)
    for rank in range(others.num_ranks):
        rows = {layer: of[rank % 2] for layer, of in zip((1, 2), CAPTURED.topk_idx, strict=True)}
        write_step(folder, rank, RankFile(64, others, rank, rows))
    return RoutingSpec.of_flags(None, None, None, replay=folder)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(experts=16), "--experts 16: the capture .* has 8"),
        (dict(topk=4), "--topk 4: the capture .* has 2"),
        (dict(tokens=2048), "--tokens 2048 is more than the 1024 of a rank"),
    ],
)
def test_other_sizes_than_the_captured_ones_are_refused(asked, words):
    settings = settings_of(**asked)
    with pytest.raises(UserError, match=words):
        settings.check()
        settings.check_job(num_ranks=2, available_sms=132)


def test_other_ranks_than_the_captured_ones_are_refused(tmp_path):
    settings = settings_of(changed(tmp_path, num_ranks=4))
    settings.check()
    settings.check_job(num_ranks=4, available_sms=132)
    with pytest.raises(UserError, match="is of 4 ranks, and this job has 2: which experts live"):
        settings.check_job(num_ranks=2, available_sms=132)


def test_dropped_tokens_are_refused(tmp_path):
    rows = {1: np.array([[0, 3], [2, -1]], dtype=np.int16)}
    for rank in range(2):
        write_step(tmp_path, rank, RankFile(1, CAPTURED.sizes, rank, rows))
    spec = RoutingSpec.of_flags(None, None, None, replay=tmp_path)
    with pytest.raises(UserError, match="the run dropped tokens"):
        settings_of(spec).check_job(num_ranks=2, available_sms=132)


@pytest.mark.parametrize("subcommand", [[], ["low-latency"], ["overlap"]])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--replay", "nowhere"], "the capture nowhere is no folder"),
        (["--replay", "empty"], "the capture empty: it has no step"),
        (["--replay", "cut"], "cut/step-00000064/rank-0001.routing is damaged: it is cut off"),
        (["--replay", str(CAPTURE), "--num-groups", "2", "--topk-groups", "1"], "no other flag of"),
        (["--replay", str(CAPTURE), "--topk", "3"], "--topk 3: the capture"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_launched(
    subcommand, flags, words, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty").mkdir()
    changed(tmp_path / "cut")
    cut = tmp_path / "cut" / "step-00000064" / "rank-0001.routing"
    cut.write_bytes(cut.read_bytes()[:-7])
    result = CliRunner().invoke(app, ["bench", *subcommand, *flags])
    error = capfd.readouterr().err + result.output
    assert result.exit_code == 2 and error.startswith("error: ") and words in error, error
    assert error.count("\n") == 1


def test_a_preset_and_a_capture_contradict_each_other():
    with pytest.raises(UserError, match="--preset W2 and --replay: a capture has sizes"):
        shape_of_flags("W2", SPEC)
