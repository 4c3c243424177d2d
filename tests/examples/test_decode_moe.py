"""examples/decode_moe.py: what it refuses, what it computes, and that it sees a fault."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace

import pytest
import torch
from example_runs import EXAMPLES, torchrun
from ranks import run_ranks

from ep_comm import Buffer

SCRIPT = EXAMPLES / "decode_moe.py"

import decode_moe  # noqa: E402 - example_runs has put it on the path
from decode_moe import IN_TURN, OVERLAPPED  # noqa: E402

ALL = ["alltoall", "normal", "low-latency", IN_TURN, OVERLAPPED]
SIZES = dict(layers=2, ffn=64, experts=8, topk=2, steps=5)


def test_every_way_gives_the_same_tokens(tmp_path):
    figures = tmp_path / "decode.json"
    result = torchrun("--overlap", "--steps", 5, "--json", figures, script=SCRIPT)
    assert result.code == 0, result.output
    assert "2 × CPU without graphs, 16 tokens each" in result.output
    document = json.loads(figures.read_text())
    assert document["settings"]["steps"] == 5
    found = document["results"]
    assert list(found) == [row[0] for row in document["tables"][0]["rows"]] == ALL
    for each in found.values():
        assert each["same_tokens"] == 1
        assert 0 < each["p50_us"] <= each["p99_us"]
        assert 5 * 32 / each["tokens_per_s"] >= 2.5e-6 * each["p50_us"]
    saved = [
        found[name]["p50_us"] - found[OVERLAPPED]["p50_us"] for name in (IN_TURN, "low-latency")
    ]
    told = re.search("overlap saves (.*) µs of two in turn, (.*) of one batch", result.output)
    assert told and [float(us) for us in told.groups()] == pytest.approx(saved, abs=0.51)
    assert result.output.count("32 of 32") == len(ALL)


WITH_WRONG_WEIGHTS = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import decode_moe

def wrong(buffer, split, x, topk_idx, weights, experts):
    return (yield from right(buffer, split, x, topk_idx, weights.flip(1).contiguous(), experts))

right, decode_moe.low_latency = decode_moe.low_latency, wrong
decode_moe.main()
"""


def test_wrong_weights_are_seen(tmp_path):
    script = tmp_path / "with_wrong_weights.py"
    script.write_text(WITH_WRONG_WEIGHTS)
    result = torchrun("--steps", 1, script=script)
    assert result.code == 1
    assert "error: low-latency gives other tokens than alltoall" in result.output
    assert "32 of 32" in result.output  # the others


def options(**changes) -> Namespace:
    sizes = dict(SIZES, tokens=6, hidden=64, dispatcher="low-latency", overlap=True)
    return Namespace(**{**sizes, **changes})


def most_dispatches_out(rank: int) -> int:
    """Run it, and count dispatches that were sent and not yet received."""
    sent: list[object] = []
    most = 0
    dispatch = Buffer.low_latency_dispatch

    def counted(self, *args, **how):
        nonlocal most
        out = dispatch(self, *args, **how)
        if out.hook is None:
            return out
        sent.append(out.hook)
        most = max(most, len(sent))
        return out._replace(hook=lambda: (sent.remove(out.hook), out.hook()))

    Buffer.low_latency_dispatch = counted
    try:
        decode_moe.run(options(steps=1), torch.device("cpu"))
    finally:
        Buffer.low_latency_dispatch = dispatch
    assert not sent
    return most


def test_two_micro_batches_are_in_flight_at_once():
    assert run_ranks(2, most_dispatches_out) == [2, 2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "start it with torchrun"),
        ("--overlap --tokens 7", "--tokens to be even"),
        ("--overlap --dispatcher normal", "--overlap needs the low-latency dispatcher"),
        ("--steps 0", "--steps must be at least 1, got 0"),
    ],
)
def test_refusals(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decode_moe.py", *flags.split()])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        decode_moe.main()
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def on_gpus(rank: int, given: Namespace) -> dict[str, dict[str, float]]:
    return decode_moe.run(given, torch.device("cuda", rank))


def check_on_gpus(num_ranks: int) -> None:
    """Graphs of every way, and of two micro-batches."""
    given = options(tokens=12, hidden=256, steps=50, dispatcher="all")
    for found in run_ranks(num_ranks, on_gpus, given, backend="nccl"):
        assert list(found) == ALL
        for each in found.values():
            assert each["same_tokens"] >= decode_moe.LEAST_SAME
            assert 0 < each["p50_us"] <= each["p99_us"] < 1e6


@pytest.mark.gpu
def test_graphs_on_one_gpu():
    check_on_gpus(1)


@pytest.mark.multi_gpu
def test_graphs_on_gpus():
    check_on_gpus(2)
