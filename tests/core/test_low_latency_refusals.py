"""Low-latency calls refused before anything is sent, and ranks that do different things."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from low_latency_calls import DISPATCH, SIZES, TOPK, WEIGHTS, X, Y, raised
from ranks import run_ranks

from ep_comm import (
    Buffer,
    EPArgumentError,
    EPConfig,
    EPMismatchError,
    EPRoutingError,
    EPStateError,
    EPTimeoutError,
)

# name: (changed arguments of a good dispatch, part of the message)
BAD_DISPATCH: dict[str, tuple[dict[str, Any], str]] = {
    "more_tokens": (dict(num_max_dispatch_tokens_per_rank=3), "x has 4 tokens, more than .* 3"),
    "more_room": (
        dict(num_max_dispatch_tokens_per_rank=7),
        r"from 1 to the 6 that .*low_latency_tokens=.*got 7",
    ),
    "no_room": (dict(num_max_dispatch_tokens_per_rank=0), "got 0"),
    "room_type": (dict(num_max_dispatch_tokens_per_rank=4.0), r"got 4\.0"),
    "experts": (dict(num_experts=8), "num_experts is 4 in this buffer, got 8"),
    "hidden": (dict(x=X[:, :256].contiguous()), r"x must be \[num_tokens, 512\], got \[4, 256\]"),
    "dtype": (dict(x=X.float()), "x must be torch.bfloat16, got torch.float32"),
    "x_fp8": (dict(x=(X, WEIGHTS)), "x must be a torch.Tensor, got tuple"),
    "strides": (dict(x=torch.ones(512, 4).bfloat16().t()), "x must be contiguous, got strides"),
    "device": (dict(x=X.to("meta")), "x is on meta"),
    "topk_tokens": (dict(topk_idx=TOPK[:3]), "the routing has 3 tokens, x has 4"),
    "topk_dtype": (dict(topk_idx=TOPK.float()), "topk_idx has dtype torch.float32"),
    "topk_too_wide": (dict(topk_idx=TOPK.repeat(1, 2)), "4 entries a token.*num_topk 2"),
    "topk_none": (dict(topk_idx=None), "pass exactly one of topk_idx"),
    "no_such_expert": (dict(topk_idx=TOPK + 1), "token 0, k 1 is 4"),
    "expert_twice": (dict(topk_idx=TOPK * 0), "each expert may come once"),
    "weights_shape": (dict(topk_weights=WEIGHTS[:, :1]), r"topk_weights must be \[4, 2\]"),
    "weights_dtype": (dict(topk_weights=WEIGHTS.double()), "must be torch.float32, got .*64"),
    "grad": (dict(x=X.clone().requires_grad_()), "x requires grad.*no_grad"),
    "rounded_bf16": (dict(use_fp8=False, round_scale=True), "round_scale=True needs use_fp8"),
    "ue8m0_alone": (dict(use_ue8m0=True), "use_ue8m0=True needs round_scale"),
    "both_phases": (dict(async_finish=True, return_recv_hook=True), "not both"),
    "recv_stats": (
        dict(cumulative_local_expert_recv_stats=torch.zeros(3, dtype=torch.int32)),
        r"cumulative_local_expert_recv_stats must be \[2\], got \[3\]",
    ),
    "wait_stats": (
        dict(dispatch_wait_recv_cost_stats=torch.zeros(2)),
        "dispatch_wait_recv_cost_stats must be torch.int64, got torch.float32",
    ),
}

# The same for a combine of a dispatch with which weights travelled.
BAD_COMBINE: dict[str, tuple[dict[str, Any], str]] = {
    "x_shape": (dict(x=Y[:, :7].contiguous()), r"x must be \[2, 8, 512\], got \[2, 7, 512\]"),
    "x_dtype": (dict(x=Y.float()), "x must be torch.bfloat16"),
    "x_strides": (dict(x=Y.transpose(0, 1).contiguous().transpose(0, 1)), "x must be contiguous"),
    "topk_shape": (dict(topk_idx=TOPK[:3]), r"topk_idx must be that of the dispatch, \[4, 2\]"),
    "topk_values": (dict(topk_idx=TOPK.flip(0)), "other values than that of the dispatch"),
    "other_weights": (dict(topk_weights=WEIGHTS.clone()), "pass the same tensor, or None"),
    "handle_type": (dict(handle=3), "handle must be a LowLatencyHandle, got int"),
    "no_place": (dict(zero_copy=True), "get_next_low_latency_combine_buffer"),
    "both_phases": (dict(async_finish=True, return_recv_hook=True), "not both"),
    "out_shape": (dict(out=X[:3]), r"out must be \[4, 512\], got \[3, 512\]"),
    "out_dtype": (dict(out=X.float()), "out must be torch.bfloat16"),
    "grad": (dict(x=Y.clone().requires_grad_()), "x requires grad"),
    "wait_stats": (
        dict(combine_wait_recv_cost_stats=torch.zeros(3, dtype=torch.int64)),
        r"combine_wait_recv_cost_stats must be \[2\], got \[3\]",
    ),
}


def check_good(buffer: Buffer) -> None:
    """A dispatch and its combine still give what they should."""
    out = buffer.low_latency_dispatch(**DISPATCH)
    back = buffer.low_latency_combine(Y, TOPK, WEIGHTS, out.handle)
    assert torch.equal(back.combined_x, (TOPK >= 0).sum(1)[:, None] * X)


def bad_calls(rank: int) -> dict[str, str]:
    buffer, other = Buffer(None, EPConfig(**SIZES)), Buffer(None, EPConfig(**SIZES))
    dispatch, combine = buffer.low_latency_dispatch, buffer.low_latency_combine
    messages = {
        f"dispatch {name}": raised(lambda changes=changes: dispatch(**{**DISPATCH, **changes}))
        for name, (changes, _) in BAD_DISPATCH.items()
    }
    good = dict(x=Y, topk_idx=TOPK, topk_weights=None, handle=dispatch(**DISPATCH).handle)
    for name, (changes, _) in BAD_COMBINE.items():
        messages[f"combine {name}"] = raised(lambda changes=changes: combine(**{**good, **changes}))
    messages["another buffer's handle"] = raised(lambda: other.low_latency_combine(**good))
    combine(**good)
    again = combine(**{**good, "return_recv_hook": True})
    messages["handle whose combine is out"] = raised(lambda: combine(**good))
    messages["its place whose combine is out"] = raised(
        lambda: buffer.get_next_low_latency_combine_buffer(good["handle"])
    )
    again.hook()
    bare = dispatch(**{**DISPATCH, "topk_weights": None}).handle
    messages["no weights"] = raised(lambda: combine(**{**good, "handle": bare}))
    combine(**{**good, "handle": bare, "topk_weights": WEIGHTS})

    split = {**DISPATCH, "return_recv_hook": True}
    first, second = dispatch(**split), dispatch(**split)
    messages["third dispatch"] = raised(lambda: dispatch(**split))
    messages["third dispatch without hook"] = raised(lambda: dispatch(**DISPATCH))
    messages["not received"] = raised(lambda: combine(**{**good, "handle": first.handle}))
    second.hook()
    messages["third dispatch out of turn"] = raised(lambda: dispatch(**split))
    first.hook()
    messages["dispatch hook twice"] = raised(first.hook)
    third = dispatch(**split)
    third.hook()
    backs = [
        combine(**{**good, "handle": out.handle, "return_recv_hook": True})
        for out in (first, second)
    ]
    messages["third combine"] = raised(lambda: combine(**{**good, "handle": third.handle}))
    for back in backs:
        back.hook()
    messages["combine hook twice"] = raised(backs[1].hook)
    combine(**{**good, "handle": third.handle})

    clean = buffer.clean_low_latency_buffer
    messages["clean tokens"] = raised(lambda: clean(9, 512, 4))
    messages["clean hidden"] = raised(lambda: clean(4, 256, 4))
    messages["size hint"] = raised(lambda: Buffer.get_low_latency_size_hint(4, 100, 2, 4))

    without = Buffer(None, EPConfig(**{**SIZES, "low_latency_tokens": None}))
    messages["not made for it"] = raised(lambda: without.low_latency_dispatch(**DISPATCH))
    for hidden in (8, 128):
        small = Buffer(None, EPConfig(**{**SIZES, "hidden": hidden}))
        rounded = dict(round_scale=hidden == 128, use_ue8m0=hidden == 128)
        given = {**DISPATCH, "x": X[:, :hidden].contiguous(), **rounded}
        messages[f"FP8 hidden {hidden}"] = raised(lambda: small.low_latency_dispatch(**given))  # noqa: B023 - called at once
    check_good(buffer)
    check_good(other)
    destroyed = dispatch(**split)
    buffer.destroy()
    messages["destroyed"] = raised(lambda: dispatch(**DISPATCH))
    messages["hook of a destroyed buffer"] = raised(destroyed.hook)
    return messages


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    mine, theirs = run_ranks(2, bad_calls)
    assert mine == theirs
    return mine


SAID = {
    **{f"dispatch {name}": message for name, (_, message) in BAD_DISPATCH.items()},
    **{f"combine {name}": message for name, (_, message) in BAD_COMBINE.items()},
    "another buffer's handle": "the handle belongs to another buffer",
    "handle whose combine is out": "the hook of low_latency_combine #2 was not called",
    "its place whose combine is out": "the hook of low_latency_combine #2 was not called",
    "no weights": "pass topk_weights: none travelled with the dispatch",
    "third dispatch": "low_latency_dispatch #5: the hook of low_latency_dispatch #3 was not called",
    "third dispatch without hook": "low_latency_dispatch #5: the hook of",
    "third dispatch out of turn": "#5: the hook of low_latency_dispatch #3 was not called yet",
    "not received": "the hook of low_latency_dispatch #3 was not called",
    "dispatch hook twice": "the hook of low_latency_dispatch #3 was called before",
    "third combine": "the hook of low_latency_combine #4 was not called yet, whose memory",
    "combine hook twice": "the hook of low_latency_combine #5 was called before",
    "clean tokens": "from 1 to the 6",
    "clean hidden": "hidden is 512 in this buffer, got 256",
    "size hint": "a multiple of 8, got 100",
    "not made for it": r"made without low-latency operations: pass EPConfig\(low_latency_tokens",
    "FP8 hidden 8": "FP32 needs a hidden size that is a multiple of 128, got 8",
    "FP8 hidden 128": "UE8M0 needs a hidden size that is a multiple of 512, got 128",
    "destroyed": "it was destroyed",
    "hook of a destroyed buffer": "it was destroyed",
}
_STATE = ("third", "not received", "hook", "destroyed", "is out")
_ROUTING = ("no_such_expert", "expert_twice")


@pytest.mark.parametrize("name", SAID)
def test_bad_calls_are_named_before_anything_is_sent(name, messages):
    kind = EPArgumentError
    if any(word in name for word in _STATE):
        kind = EPStateError
    elif name.removeprefix("dispatch ") in _ROUTING:
        kind = EPRoutingError
    assert re.match(rf"{kind.__name__}: .*{SAID[name]}", messages[name], re.DOTALL), messages[name]


def test_every_bad_call_was_made(messages):
    assert set(messages) == set(SAID)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(low_latency_tokens=0), "low_latency_tokens must be a positive integer, got 0"),
        (dict(low_latency_tokens=2.5), "low_latency_tokens must be a positive integer, got 2.5"),
        (dict(hidden=100), "low-latency operations need a hidden size that is a multiple of 8"),
    ],
)
def test_bad_sizes_of_a_buffer(changes, message):
    with pytest.raises(EPArgumentError, match=message):
        EPConfig(**{**SIZES, **changes})


def test_a_rank_has_not_too_many_experts():
    config = EPConfig(**{**SIZES, "num_experts": 2050})
    with pytest.raises(EPArgumentError, match="at most 1024 experts a rank, got 1025"):
        config.check_group(2)


# ---- Ranks that do not do the same -------------------------------------------------------------


def ranks_disagree(rank: int, what: str) -> str:
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=20))
    given = dict(DISPATCH)
    if what == "format":
        given["use_fp8"] = rank == 0
    if what == "weights":
        given["topk_weights"] = WEIGHTS if rank else None
    if what == "room":
        given["num_max_dispatch_tokens_per_rank"] = 4 + rank
    with pytest.raises(EPMismatchError) as caught:
        outs = [buffer.low_latency_dispatch(**given) for _ in range(2)]
        if what == "operation" and rank:
            buffer.dispatch(X, TOPK)
        buffer.low_latency_combine(Y, TOPK, None, outs[rank if what == "handle" else 0].handle)
    assert not buffer.is_usable
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "rank0", "rank1"),
    [
        ("format", "scale_form=ScaleForm.FP32", "scale_form=None"),
        ("weights", "has_weights=0", "has_weights=1"),
        ("room", "max_tokens=4", "max_tokens=5"),
        ("operation", "op=low_latency_combine", "op=plan"),
        ("handle", "routing_epoch=1", "routing_epoch=2"),
    ],
)
def test_disagreement_is_raised_on_both_sides(what, rank0, rank1):
    for message in run_ranks(2, ranks_disagree, what, fresh=True):
        assert f"rank 0 has {rank0}" in message and f"rank 1 has {rank1}" in message


def one_rank_stays_away(rank: int) -> str:
    dist.barrier()  # or making the buffer may take longer
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=3))
    check_good(buffer)
    if rank == 1:
        return ""
    with pytest.raises(EPTimeoutError) as caught:
        buffer.low_latency_dispatch(**DISPATCH)
    assert not buffer.is_usable
    return str(caught.value)


def test_a_late_rank_is_named():
    message, _ = run_ranks(2, one_rank_stays_away, fresh=True)
    assert message.startswith("low_latency_dispatch #2: rank 0 waited 3 s for rank 1 (phase: ")


def leave_an_operation(rank: int) -> None:
    """Nobody calls the hook, and the buffer goes: others on the group are none the worse for it."""
    buffer = Buffer(None, EPConfig(**SIZES))
    buffer.low_latency_dispatch(**DISPATCH, return_recv_hook=True)
    buffer.destroy()
    del buffer
    gc.collect()
    with Buffer(None, EPConfig(**SIZES, timeout_s=10)) as another:
        check_good(another)


def test_an_operation_that_is_left_unfinished_blocks_nobody():
    run_ranks(2, leave_an_operation, fresh=True)
