"""scripts/soak.py on CPU ranks: it is right, goes on where it stopped, and finds a planted bit."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import RankFailure, run_ranks

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import soak as script  # noqa: E402 - its folder has come to the path


def run_soak(rank: int, words: list[str]) -> tuple[bool, str]:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        sound = script.soak(script.parse_args(words), torch.device("cpu"))
    return sound, output.getvalue()


def soak(operations: int, *words: object, round_operations: int = 25) -> list[tuple[bool, str]]:
    every = ["--operations", operations, "--round-operations", round_operations, *words]
    return run_ranks(2, run_soak, [str(word) for word in every])


def test_it_goes_on_where_it_has_stopped(tmp_path):
    state = tmp_path / "soak.json"
    (sound, first), _ = soak(20, "--state", state, round_operations=10)
    assert sound and "round 2: 2" in first
    (sound, second), _ = soak(40, "--state", state, round_operations=10)
    assert sound and "round 3: " in second and "round 1: " not in second
    found = json.loads(state.read_text())
    assert found["operations"] >= 40 and found["wrong"] == 0
    assert found["full"] == found["rounds"] == 4
    assert sum(call["operations"] for call in found["calls"]) == found["operations"]
    (sound, nothing), _ = soak(40, "--state", state)
    assert sound and nothing == ""


@pytest.mark.parametrize("plant", [0, 9])
def test_one_wrong_bit_is_found(plant, tmp_path):
    """In whatever operation: a dispatch, a combine, of low latency, in full."""
    state = tmp_path / "soak.json"
    (sound, first), (also, last) = soak(25, "--plant", plant, "--state", state)
    assert not sound and not also and not state.exists()
    assert "1 wrong" in first and "WRONG" not in first
    assert "WRONG on rank 1, 1 values of operation" in last


def test_another_seed_is_another_soak(tmp_path):
    state = tmp_path / "soak.json"
    state.write_text('{"seed": 1, "ranks": 2}')
    with pytest.raises(RankFailure, match="is of seed 1 on 2 ranks"):
        soak(25, "--state", state)
    state.write_text('{"seed": 1')
    with pytest.raises(RankFailure, match="is no state of a soak"):
        soak(25, "--state", state)


def test_what_grows_is_told():
    used = [{"files": files, "host MiB": 100.0} for files in (5, 9, 9, 9, 10, 11)]
    assert script.growth(used) == {"files": 1, "host MiB": 0.0}
    assert script.growth(used[:3]) == {}
