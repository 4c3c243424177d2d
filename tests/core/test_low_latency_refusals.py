"""Low-latency calls refused before anything is sent, and ranks that do different things."""

from __future__ import annotations

import gc
import re

import pytest
import torch
import torch.distributed as dist
from low_latency_calls import (
    BAD_COMBINE,
    BAD_DISPATCH,
    DISPATCH,
    SIZES,
    TOPK,
    WEIGHTS,
    X,
    Y,
    raised,
)
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
