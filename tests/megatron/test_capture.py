"""Routing is captured in training runs: what files have is what the run dispatched."""

from __future__ import annotations

import contextlib
import errno
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from example_runs import (
    NEW,
    SMALL,
    TINY,
    losses,
    pretrain,
    records,
    refused,
    train,
)
from ranks import run_ranks

from ep_comm import events
from ep_comm.routing.capture import Sizes, read

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.slow

# One micro-batch is a step: the log has the tokens of all of its experts.
ONE_MICRO_BATCH = [*TINY, "--seq-length", "32", "--micro-batch-size", "2", "--eval-iters", "1",
                   "--lr-decay-iters", "20", "--eval-interval", "1", "--log-interval", "1",
                   "--save-interval", "3"]  # fmt: skip


def steps_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.glob("step-*"))]


def assert_as_logged(folder: Path, run_dir: Path, times: int = 1) -> None:
    """Captured experts are those that the run's log counts, layer by layer.

    The log counts recomputed dispatches too: `times` as many.
    """
    logged = {r["iteration"]: r["layers"] for r in records(run_dir, "balance")}
    for step in steps_in(folder):
        capture = read(folder / f"step-{step:08d}")
        assert capture.step == step
        layers = {each["layer"]: each["tokens"] for each in logged[step]}
        assert set(capture.layers) <= set(layers)
        for layer, of_ranks in zip(capture.layers, capture.topk_idx, strict=True):
            assert all(len(rows) == 64 for rows in of_ranks)
            counts = np.bincount(np.concatenate(of_ranks).ravel(), minlength=8)
            assert (times * counts).tolist() == layers[layer], (step, layer)


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_training_run_leaves_what_it_dispatched(recomputes, tmp_path):
    folder = tmp_path / "capture"
    flags = [*ONE_MICRO_BATCH, "--global-batch-size", "4", "--train-iters", "9"]
    flags += ["--recompute-granularity", "full"] if recomputes else []
    captured = train(tmp_path / "run", *flags, "--ep-capture-routing", folder)
    assert steps_in(folder) == [1, 2, 4, 8]
    assert read(folder).sizes == Sizes(8, 2, 128, 2) and read(folder).layers == (1, 2)
    assert_as_logged(folder, tmp_path / "run", times=1 + recomputes)
    assert captured == train(tmp_path / "without", *flags)


def test_a_resumed_run_goes_on_in_the_same_folder(tmp_path):
    folder, run_dir = tmp_path / "capture", tmp_path / "run"
    flags = [*ONE_MICRO_BATCH, "--global-batch-size", "4", "--save", tmp_path / "save", "--load",
             tmp_path / "save", "--ep-capture-routing", folder]  # fmt: skip
    train(run_dir, *flags, "--train-iters", 3)
    train(run_dir, *flags, "--train-iters", 8)
    assert steps_in(folder) == [1, 2, 4, 5, 7]  # the 1st, 2nd and 4th after step 3
    assert_as_logged(folder, run_dir)


def test_few_layers_of_many_and_one_replica(tmp_path):
    folder, run_dir = tmp_path / "capture", tmp_path / "run"
    flags = [*ONE_MICRO_BATCH, "--global-batch-size", "8", "--train-iters", "2", "--num-layers", 9]
    words = [str(flag) for flag in (*flags, "--run-dir", run_dir, "--ep-capture-routing", folder)]
    run_ranks(4, pretrain, words, timeout_s=240, **NEW)
    assert read(folder).layers == (1, 4, 6, 9)
    assert read(folder).sizes.num_ranks == 2
    assert len(list((folder / "step-00000002").iterdir())) == 2
    assert_as_logged(folder, run_dir)


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_graph_does_not_copy_to_the_host(in_graph, monkeypatch, tmp_path):
    """Its replays would, into memory that was given back; and nobody may wait for its event."""
    from ep_comm.megatron import RoutingCapture, capture

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: in_graph)
    monkeypatch.setattr(events, "_is_default_stream", lambda: False)
    monkeypatch.setattr(capture.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(capture.dist, "get_rank", lambda group: 0)
    taking = RoutingCapture([], None)
    taking._folder = tmp_path
    config = SimpleNamespace(num_moe_experts=4, moe_router_topk=2)
    dispatcher = SimpleNamespace(config=config, tp_ep_group=None, tp_size=1)
    taking._take(1, dispatcher, torch.zeros(3, 8), torch.zeros(3, 4, dtype=torch.bool))
    assert list(taking._taken) == ([] if in_graph else [1])


def a_full_disk(rank: int, flags: list[str]) -> str:
    """Train, and return what goes to stderr."""
    from ep_comm.routing import capture

    def full(path: Path, written: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    capture.write_bytes = full
    with contextlib.redirect_stderr(io.StringIO()) as said:
        pretrain(rank, flags)
    return said.getvalue()


def test_a_full_disk_costs_a_warning(tmp_path):
    folder, run_dir = tmp_path / "capture", tmp_path / "run"
    flags = [*SMALL, "--train-iters", "4", "--run-dir", run_dir, "--ep-capture-routing", folder]
    words = [str(flag) for flag in flags]
    said = run_ranks(2, a_full_disk, words, timeout_s=240, **NEW)
    assert max(losses(run_dir)) == 4
    for of_rank in said:
        (warning,) = (line for line in of_rank.splitlines() if "captured" in line)
        assert warning == (
            f"warning: no more routing is captured, training goes on: {folder} cannot be written: "
            "No space left on device"
        )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--moe-token-dispatcher", "alltoall"], "needs moe_token_dispatcher ep_comm"),
        ([], "cannot be written"),
    ],
)
def test_what_cannot_be_captured_is_refused_before_training(flags, words, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / ("file/capture" if not flags else "capture")
    flags = [*SMALL, *flags, "--run-dir", tmp_path / "run", "--ep-capture-routing", folder]
    assert words in refused(*flags).error
    assert not (tmp_path / "run").exists()
