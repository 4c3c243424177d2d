"""Low-latency calls that are taken for like the one before, and those that are not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from low_latency_calls import BAD_COMBINE, BAD_DISPATCH, DISPATCH, SIZES, TOPK, WEIGHTS, Y, raised
from ranks import run_ranks

from ep_comm import Buffer, EPConfig
from ep_comm.low_latency import known
from ep_comm.low_latency.known import Known

ROUTINGS = ("no_such_expert", "expert_twice")  # whose content a backend looks at


# ---- What is seen ------------------------------------------------------------------------------

CALL = (4, True, None)
X, IDX = torch.zeros(4, 16), torch.zeros(4, 2, dtype=torch.int32)


def without_memory() -> torch.Tensor:
    tensor = torch.zeros(4, 16)
    tensor.untyped_storage().resize_(0)
    return tensor


LIKE = {
    "the same": (X, None, IDX),
    "other tensors": (X + 1, None, IDX.clone()),
    "a part of another": (torch.zeros(8, 16)[4:], None, IDX),
}
UNLIKE = {
    "dtype": (X.to(torch.int32), None, IDX),
    "rows": (torch.zeros(3, 16), None, IDX),
    "columns": (torch.zeros(4, 32), None, IDX),
    "dimensions": (torch.zeros(1, 4, 16), None, IDX),
    "strides": (torch.zeros(16, 4).t(), None, IDX),
    "device": (X.to("meta"), None, IDX),
    "grad": (X.clone().requires_grad_(), None, IDX),
    "parameter": (torch.nn.Parameter(X, requires_grad=False), None, IDX),
    "negated": (torch._neg_view(X), None, IDX),
    "sparse": (X.to_sparse(), None, IDX),
    "memory": (without_memory(), None, IDX),
    "address": (torch.zeros(65)[1:].view(4, 16), None, IDX),
    "no tensor": ([[0.0] * 16] * 4, None, IDX),
    "left out": (X, None, None),
    "another left out": (X, IDX, None),
    "one more": (X, X.clone(), IDX),
    "second tensor": (X, None, IDX.long()),
}


@pytest.mark.parametrize("given", LIKE.values(), ids=LIKE)
def test_calls_that_differ_in_values_are_alike(given):
    first = Known(CALL, (X, None, IDX), (X, None, IDX))
    assert first.is_like(CALL, given)
    assert not first.is_like((4, False, None), given)


@pytest.mark.parametrize("given", UNLIKE.values(), ids=UNLIKE)
def test_whatever_checks_look_at_is_seen(given):
    first = Known(CALL, (X, None, IDX), (X, None, IDX))
    assert not first.is_like(CALL, given)


def test_a_call_whose_tensors_were_changed_is_like_none():
    """They have to be changed for the next one too."""
    for given, checked in {
        "copied": ((X, IDX), (X.clone(), IDX)),
        "requires grad": ((leaf := X.clone().requires_grad_(), IDX), (leaf, IDX)),
    }.values():
        with torch.no_grad():
            assert not Known(CALL, given, checked).is_like(CALL, given)


def test_where_torch_compares_no_tensors_every_call_is_checked(monkeypatch):
    monkeypatch.setattr(known, "_guards", None)
    assert not Known(CALL, (X, IDX), (X, IDX)).is_like(CALL, (X, IDX))


# ---- Calls behind good ones --------------------------------------------------------------------


def bad_calls_behind_good_ones(rank: int) -> dict[str, tuple[str, str]]:
    """Of each bad call what it raises, right behind a good call that is like the one before it."""
    buffer = Buffer(None, EPConfig(**SIZES))
    dispatch, combine = buffer.low_latency_dispatch, buffer.low_latency_combine
    messages = {}
    call, tensors = (
        (4, 4, True, False, False, False, False),
        (DISPATCH["x"], TOPK, WEIGHTS, None, None),
    )
    for name, (changes, expected) in BAD_DISPATCH.items():
        dispatch(**DISPATCH)
        assert buffer._arguments._dispatch.is_like(call, tensors)
        bad = {**DISPATCH, **changes}
        messages[f"dispatch {name}"] = raised(lambda bad=bad: dispatch(**bad)), expected
    handle = dispatch(**DISPATCH).handle
    good: dict[str, Any] = dict(x=Y, topk_idx=TOPK, topk_weights=None, handle=handle)
    for name, (changes, expected) in BAD_COMBINE.items():
        combine(**good)
        assert buffer._arguments._combine.is_like((handle.sizes, False, False), (Y, *[None] * 3))
        bad = {**good, **changes}
        messages[f"combine {name}"] = raised(lambda bad=bad: combine(**bad)), expected
    combined = combine(Y, TOPK, None, handle).combined_x
    assert torch.equal(combined, (TOPK >= 0).sum(1)[:, None] * DISPATCH["x"])
    return messages


def test_bad_calls_are_refused_behind_good_ones():
    mine, theirs = run_ranks(2, bad_calls_behind_good_ones)
    assert mine == theirs and len(mine) == len(BAD_DISPATCH) + len(BAD_COMBINE)
    for name, (message, expected) in mine.items():
        kind = "EPRoutingError" if name.removeprefix("dispatch ") in ROUTINGS else "EPArgumentError"
        assert re.match(rf"{kind}: .*{expected}", message, re.DOTALL), (name, message)


def sizes_that_change(rank: int) -> None:
    """Each call gives what a buffer gives that has seen no other."""
    buffer = Buffer(None, EPConfig(**SIZES))
    forms = [
        dict(num_tokens=num_tokens, max_tokens=max_tokens, use_fp8=use_fp8, has_weights=has_weights)
        for num_tokens, max_tokens, use_fp8, has_weights in (
            (4, 4, False, True),
            (4, 4, False, True),
            (3, 4, False, True),
            (4, 6, False, True),
            (4, 4, True, True),
            (4, 4, False, False),
            (4, 4, False, True),
            (0, 4, False, True),
        )  # fmt: skip
    ]
    for form in forms:
        fresh = Buffer(None, EPConfig(**SIZES))
        of_both = [both_ways(each, rank, **form) for each in (buffer, fresh)]
        for mine, theirs in zip(*of_both, strict=True):
            assert torch.equal(mine, theirs), form
        fresh.destroy()


def both_ways(
    buffer: Buffer, rank: int, num_tokens: int, max_tokens: int, use_fp8: bool, has_weights: bool
) -> list[torch.Tensor]:
    rows = torch.arange(4 * 512, dtype=torch.float32).view(4, 512)[:num_tokens]
    x, topk_idx = (rows + rank).bfloat16(), TOPK[:num_tokens]
    weights = torch.rand(num_tokens, 2, generator=torch.Generator().manual_seed(rank))
    out = buffer.low_latency_dispatch(
        x, topk_idx, max_tokens, 4, weights if has_weights else None, use_fp8=use_fp8
    )
    data, *scales = out.recv_x if use_fp8 else (out.recv_x,)
    came = [slice(int(count)) for count in out.recv_count]
    received = [
        part.view(torch.uint8 if part is data and use_fp8 else part.dtype)[expert, rows].clone()
        for part in (data, *scales)
        for expert, rows in enumerate(came)
    ]
    y = data.bfloat16()
    for expert, rows in enumerate(came):
        y[expert, rows.stop :] = 0
    back = buffer.low_latency_combine(y, topk_idx, None if has_weights else weights, out.handle)
    sources = [out.handle.recv_src_info[expert, rows] for expert, rows in enumerate(came)]
    return [*received, *sources, out.recv_count, back.combined_x]


def test_sizes_may_change_from_call_to_call():
    run_ranks(2, sizes_that_change)
