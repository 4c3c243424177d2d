"""Megatron-Core models with our dispatcher against the same models with alltoall, on CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from unittest import mock

import numpy as np
import pytest
from megatron_cases import CLOSE, CLOSE_BF16, CLOSE_FP16, FEATURES, WIDE, padded, run
from megatron_model import Setup, assert_close_runs, assert_same_bits, train
from ranks import run_ranks

import ep_comm

pytest.importorskip("megatron.core")


@pytest.mark.parametrize("feature", FEATURES)
def test_trains_like_alltoall(feature):
    setup = FEATURES[feature]
    stock = "allgather" if feature == "allgather_too" else "alltoall"
    ours = run(setup)
    assert ours[0]["losses"][-1] < ours[0]["losses"][0]
    assert (ours[0]["metrics"]["ep/wire-mib"] > 0) == (setup.ep > 1)
    theirs = run(dataclasses.replace(setup, dispatcher=stock))
    assert_close_runs(
        ours, theirs, CLOSE_BF16 if setup.bf16 else CLOSE_FP16 if setup.fp16 else CLOSE
    )


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("factor", [0.7, 1.25])
def test_padding_to_capacity_changes_no_bit(factor, bf16):
    """Neither for alltoall nor for ours. Two summands a token: so both are the same, too."""
    dropped = Setup(config=(("moe_expert_capacity_factor", factor),), bf16=bf16, steps=2)
    filled = dataclasses.replace(dropped, config=padded(factor))
    theirs = run(dataclasses.replace(filled, dispatcher="alltoall"))
    assert_same_bits(run(dataclasses.replace(dropped, dispatcher="alltoall")), theirs)
    ours = run(filled)
    assert_same_bits(run(dropped), ours)
    assert_same_bits(ours, theirs)


def test_fp8_gradients_are_those_of_a_quantised_dispatch():
    """Only what goes back through the experts differs: the loss of the first step does not."""
    plain = run(Setup(config=WIDE, steps=1))
    in_fp8 = run(Setup(config=WIDE, steps=1, options=(("fp8_grad_dispatch", True),)))
    for a, b in zip(plain, in_fp8, strict=True):
        assert a["losses"] == b["losses"]
        ratio = b["metrics"]["ep/wire-mib"] / a["metrics"]["ep/wire-mib"]
        # Of four legs in FP32 one carries 1 byte an element, and 4 a block of 128. Legs are not
        # quite equal: two carry the rows of a rank's own tokens, two those that it received.
        assert ratio == pytest.approx((3 + (1 + 4 / 128) / 4) / 4, rel=0.03)
        different = 0
        for name, gradient in a["gradients"].items():
            error = np.abs(b["gradients"][name] - gradient).max()
            different += error > 0
            assert error <= 0.1 * np.abs(gradient).max(), name
        assert different > 0


def test_repeats_itself_bitwise_on_four_ranks():
    setup = Setup(ep=4)
    assert_same_bits(run(setup, 4), run(setup, 4))


def test_metrics_are_those_of_the_step():
    ours = run(Setup())[0]
    metrics = ours["metrics"]
    stock = run(Setup(dispatcher="alltoall"))[0]["metrics"]
    assert ours["metrics_of_nothing"] == {
        "ep/dispatch-ms": 0, "ep/combine-ms": 0, "ep/expert-ms": 0, "ep/wire-mib": 0,
        "ep/dispatch-ms-p99": 0, "ep/combine-ms-p99": 0, "ep/wait-share": 0, "ep/exposed-ms": 0,
        "ep/slowest-rank": -1,
    }  # fmt: skip
    for name in ("ep/dispatch-ms", "ep/combine-ms", "ep/expert-ms"):
        assert 0 < metrics[name] < 5000 and 0 < stock[name] < 5000
    assert 1 <= metrics["ep/imbalance-rank"] <= 2
    assert metrics["ep/imbalance-rank"] <= metrics["ep/imbalance-expert"] <= 8
    assert metrics["ep/imbalance-expert"] == pytest.approx(stock["ep/imbalance-expert"], rel=0.05)
    ours_alone = metrics.keys() - stock.keys()
    assert ours_alone == {
        "ep/wire-mib", "ep/dispatch-ms-p99", "ep/combine-ms-p99", "ep/wait-share",
        "ep/exposed-ms", "ep/slowest-rank",
    }  # fmt: skip
    for op in ("dispatch", "combine"):
        assert 0 < metrics[f"ep/{op}-ms-p99"] < 5000
    assert 0 < metrics["ep/wait-share"] <= 1 and metrics["ep/slowest-rank"] in range(2)
    assert metrics["ep/exposed-ms"] > metrics["ep/dispatch-ms-p99"]


def install_and_train(rank: int, setup: Setup) -> dict:
    from ep_comm.errors import EPStateError

    result = train(rank, setup)
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from ep_comm.megatron import EPOptions, install
    from ep_comm.megatron.layer import complete

    install(EPOptions(**dict(setup.options)))  # again: nothing happens
    with pytest.raises(EPStateError, match="is installed with"):
        install(EPOptions(timeout_s=1))
    completed = complete(max_tokens_per_rank=5, overlap_wgrad=False)
    assert completed == EPOptions(overlap_wgrad=True, max_tokens_per_rank=5)
    assert MoELayer.__init__.__wrapped__ is not None
    return result


def test_install_reaches_every_layer():
    """Both ways in train the same model; `install` also sets DDP up for the overlap."""
    options = (("overlap_wgrad", True),)
    setup = Setup(options=options, through_install=True, dense_first=True)
    installed = run_ranks(2, install_and_train, setup, fresh=True, pool="megatron")
    spec = run(dataclasses.replace(setup, through_install=False))
    assert installed[0]["losses"] == spec[0]["losses"]


def printed_while_training(rank: int) -> str:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    ep_comm.megatron.destroy_buffers()  # of earlier tests: a new one prints the line
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train(rank, Setup(steps=2))
    return output.getvalue()


def printed_where_overlap_does_not_pay(rank: int) -> str:
    setup = Setup(steps=2, options=(("overlap_wgrad", True),))
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    ep_comm.megatron.destroy_buffers()
    output = io.StringIO()
    loss = "it would cost 201 µs"
    with (
        contextlib.redirect_stdout(output),
        mock.patch.object(ep_comm.Buffer, "overlap_loss", lambda *_: loss),
    ):
        train(rank, setup)
    return output.getvalue()


def test_the_line_says_where_overlap_does_not_pay():
    first, _ = run_ranks(2, printed_where_overlap_does_not_pay, pool="megatron")
    assert "wgrad overlap (a combine is not run beside GEMMs: it would cost 201 µs)" in first


def test_one_line_at_start_up_says_what_is_used():
    first, other = run_ranks(2, printed_while_training, pool="megatron")
    assert other == ""
    (line,) = first.splitlines()
    assert line.startswith(f"ep_comm {ep_comm.__version__}: reference over gloo, EP 2, 8 experts")
    for part in (
        "32 tokens of 32 a rank",
        "wire float32 out, float32 back, gradients float32 out, float32 back",
        "buffer 0 bytes",
        "off: nvlink backend (the group has no NCCL backend",
        "FP8 dispatch (not asked for)",
        "FP8 gradient dispatch (not asked for)",
        "FP8 direct (not asked for)",
        "wgrad overlap (not asked for)",
    ):
        assert part in line
