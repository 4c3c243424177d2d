"""Wrong arguments: named before anything is sent, and the buffer goes on working."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ep_comm import (
    Buffer,
    EPArgumentError,
    EPConfig,
    EPMismatchError,
    EPRoutingError,
    EPStateError,
    EventOverlap,
    checks,
    fp8,
)
from ep_comm._native import header
from ep_comm.topology import backend_by_device_type, device_types

SIZES = dict(num_experts=8, hidden=32, max_tokens_per_rank=6, num_topk=3, dtype=torch.float32)
X = torch.ones(4, 32)
TOPK = torch.tensor([[0, 5, -1]] * 4)
MAP = torch.zeros(4, 8, dtype=torch.bool)

# name: (arguments of dispatch, part of the message)
BAD_DISPATCH = {
    "hidden": (dict(x=torch.ones(4, 31), topk_idx=TOPK), r"x must be \[num_tokens, 32\].*31"),
    "dtype": (dict(x=X.int(), topk_idx=TOPK), "bfloat16, float16 or float32, got torch.int32"),
    "not_contiguous": (dict(x=torch.ones(32, 4).t(), topk_idx=TOPK), "contiguous.*strides"),
    "x_list": (dict(x=X.tolist(), topk_idx=TOPK), "x must be a torch.Tensor, got list"),
    "x_none": (dict(x=None, topk_idx=TOPK), "x must be a torch.Tensor, got NoneType"),
    "scales_none": (dict(x=(X, None), topk_idx=TOPK), r"x\[1\] must be a torch.Tensor"),
    "topk_list": (dict(x=X, topk_idx=TOPK.tolist()), "topk_idx must be a torch.Tensor, got list"),
    "weights_list": (dict(x=X, topk_idx=TOPK, topk_weights=[1.0]), "topk_weights.*got list"),
    "wider": (dict(x=X.double(), topk_idx=TOPK), "bfloat16, float16 or float32, got torch.float64"),
    "no_routing": (dict(x=X), "exactly one of topk_idx, routing_map and handle"),
    "two_routings": (dict(x=X, topk_idx=TOPK, routing_map=MAP), "exactly one of"),
    "token_count": (dict(x=X, topk_idx=TOPK[:3]), "3 tokens, x has 4"),
    "topk_dtype": (
        dict(x=X, topk_idx=TOPK.float()),
        "topk_idx has dtype torch.float32, expected torch.int32 or torch.int64",
    ),
    "topk_dims": (dict(x=X, topk_idx=TOPK[0]), r"topk_idx has shape \[3\], expected 2 dimensions"),
    "topk_empty": (dict(x=X, topk_idx=TOPK[:, :0]), "0 entries a token, .* 1 to num_topk 3"),
    "topk_too_wide": (dict(x=X, topk_idx=torch.zeros(4, 4).long()), "4 entries.*num_topk 3"),
    "expert_too_large": (dict(x=X, topk_idx=TOPK + 4), r"9"),
    "expert_negative": (dict(x=X, topk_idx=TOPK - 2), r"-2|-3"),
    "expert_twice": (dict(x=X, topk_idx=torch.zeros(4, 2).long()), "each expert may come once"),
    "map_dtype": (dict(x=X, routing_map=MAP.int()), "dtype torch.int32, expected torch.bool"),
    "map_dims": (dict(x=X, routing_map=MAP[0]), r"routing_map has shape \[8\], expected 2 dimens"),
    "map_width": (dict(x=X, routing_map=MAP[:, :7]), "routing_map has 7 columns, .* num_experts ="),
    "map_too_many": (dict(x=X, routing_map=~MAP), "3"),
    "weights_dtype": (dict(x=X, topk_idx=TOPK, topk_weights=torch.ones(4, 3).double()), "float64"),
    "weights_shape": (dict(x=X, topk_idx=TOPK, topk_weights=torch.ones(4, 2)), r"\[4, 3\].*2"),
    "x_device": (dict(x=X.to("meta"), topk_idx=TOPK), "x is on meta, .* moves tensors on cpu"),
    "topk_device": (dict(x=X, topk_idx=TOPK.to("meta")), "the routing is on meta, x on cpu"),
    "weights_device": (
        dict(x=X, topk_idx=TOPK, topk_weights=torch.ones(4, 3, device="meta")),
        "topk_weights must be on cpu, got meta",
    ),
    "weights_strides": (
        dict(x=X, topk_idx=TOPK, topk_weights=torch.ones(3, 4).t()),
        "topk_weights must be contiguous, got strides",
    ),
    "layout": (dict(x=X, topk_idx=TOPK, layout="row"), "'row'"),
    "alignment": (dict(x=X, topk_idx=TOPK, expert_alignment=0), "expert_alignment.*0"),
    "alignment_type": (dict(x=X, topk_idx=TOPK, expert_alignment=2.5), "integer.*got 2.5"),
    "event_type": (dict(x=X, topk_idx=TOPK, previous_event=3), "EventOverlap, got int"),
    "callback_type": (dict(x=X, topk_idx=TOPK, during_backward=3), "callable, got int"),
    "wire_dtype": (dict(x=X, topk_idx=TOPK, wire_dtype=torch.bfloat16), "wire_dtype.*bfloat16"),
    "fp8_hidden": (dict(x=X, topk_idx=TOPK, wire_dtype=fp8.FP8_DTYPE), "hidden 32"),
    "recv_dtype": (dict(x=X, topk_idx=TOPK, recv_dtype=torch.bfloat16), "needs FP8 on the wire"),
    "handle_type": (dict(x=X, handle=3), "DispatchHandle.*int"),
    "comm_stream": (dict(x=X, topk_idx=TOPK, allocate_on_comm_stream=True), "previous_event"),
}


WIDE = torch.ones(4, 128)
FP8, SCALES = WIDE.to(fp8.FP8_DTYPE), torch.ones(4, 1)

# The same for FP8, in a buffer of hidden 128.
BAD_FP8 = {
    "payload_dtype": (dict(x=(WIDE, SCALES)), "x with scales must be float8_e4m3fn, .*float32"),
    "scales_shape": (dict(x=(FP8, torch.ones(4, 2))), r"scales must be \[4, 1\], got \[4, 2\]"),
    "scales_dtype": (dict(x=(FP8, SCALES.double())), "scales must be float32 on cpu, .*float64"),
    "scales_device": (dict(x=(FP8, SCALES.to("meta"))), "scales must be float32 on cpu, .*on meta"),
    "wire_dtype": (dict(x=(FP8, SCALES), wire_dtype=torch.float32), "x's own dtype .*float8"),
    "recv_dtype": (
        dict(x=WIDE, wire_dtype=fp8.FP8_DTYPE, recv_dtype=torch.float16),
        "recv_dtype must be bfloat16, float32 or float8, got torch.float16",
    ),
    "fp16": (
        dict(x=WIDE.half(), wire_dtype=fp8.FP8_DTYPE),
        "x is torch.float16: only bfloat16 and float32 travel as FP8",
    ),
    "gradient": (
        dict(x=WIDE.clone().requires_grad_(), wire_dtype=fp8.FP8_DTYPE, recv_dtype=fp8.FP8_DTYPE),
        "x requires grad, so the received rows must have its dtype",
    ),
    "alignment": (dict(x=(FP8, SCALES), expert_alignment=6), "multiple of 4, got 6"),
    "group": (
        dict(x=(FP8, SCALES), expert_capacity=6),
        "or expert_capacity, to be a multiple of 4, got 6",
    ),
}


def bad_calls(buffer: Buffer, cases: dict) -> dict[str, str]:
    """Run every bad dispatch; give its message."""
    messages = {}
    for name, (arguments, _) in cases.items():
        try:
            buffer.dispatch(**arguments)
        except EPArgumentError as error:
            messages[name] = f"{type(error).__name__}: {error}"
        else:
            messages[name] = "accepted"
    assert buffer.records.num_operations == 0, "something was sent"
    return messages


def try_fp8(rank: int) -> dict[str, str]:
    buffer = Buffer(None, EPConfig(**{**SIZES, "hidden": 128}))
    cases = {name: ({"topk_idx": TOPK, **a}, m) for name, (a, m) in BAD_FP8.items()}
    messages = bad_calls(buffer, cases)
    good = buffer.dispatch((FP8, SCALES), TOPK)
    assert good.recv_x[0].dtype == fp8.FP8_DTYPE
    return messages


def test_bad_fp8_arguments_are_named():
    for messages in run_ranks(2, try_fp8):
        for name, (_, pattern) in BAD_FP8.items():
            assert re.search(pattern, messages[name]), f"{name}: {messages[name]}"


def try_dispatch(rank: int) -> dict[str, str]:
    """Run every bad call; give its message. One good call at the end."""
    buffer = Buffer(None, EPConfig(**SIZES))
    messages = bad_calls(buffer, BAD_DISPATCH)
    good = buffer.dispatch(X, TOPK)
    assert torch.equal(buffer.combine(good.recv_x, good.handle).combined_x, 2 * X)
    return messages


def test_bad_dispatch_arguments_are_named():
    for messages in run_ranks(2, try_dispatch):
        for name, (_, pattern) in BAD_DISPATCH.items():
            assert re.search(pattern, messages[name]), f"{name}: {messages[name]}"
        for name in ("expert_too_large", "expert_negative", "expert_twice", "map_too_many"):
            assert messages[name].startswith(EPRoutingError.__name__)


@pytest.mark.parametrize("name, source", [("topk_idx", TOPK), ("routing_map", MAP)])
def test_strides_of_a_routing_do_not_matter(name, source):
    strided = source.t().contiguous().t()
    assert not strided.is_contiguous()
    arguments = {"topk_idx": None, "routing_map": None, name: strided}
    checked, num_topk = checks.checked_source(**arguments, rows=X, config=EPConfig(**SIZES))
    assert checked.is_contiguous() and torch.equal(checked, source) and num_topk == 3


def test_docstrings_give_the_numbers_of_the_code():
    config, dispatch = (" ".join(each.__doc__.split()) for each in (EPConfig, Buffer.dispatch))
    assert f"Experts over all ranks, at most {header.EP_MAX_EXPERTS}." in config
    assert f"Most experts that a token selects, at most {header.EP_MAX_TOPK}." in config
    assert f"The default, {checks.DEFAULT_ALIGNMENT}, is" in dispatch


def try_combine(rank: int) -> dict[str, str]:
    buffer, other = (Buffer(None, EPConfig(**SIZES)) for _ in range(2))
    out = buffer.dispatch(X, TOPK)
    rows, handle = out.recv_x, out.handle
    by_rank = buffer.dispatch(X, TOPK, torch.ones(TOPK.shape), layout="rank")
    calls = {
        "handle of another buffer": lambda: other.combine(rows, handle),
        "cached on another buffer": lambda: other.dispatch(X, handle=handle),
        "must be [": lambda: buffer.combine(rows[1:], handle),
        "got torch.float64": lambda: buffer.combine(rows.double(), handle),
        "x must be a torch.Tensor, got list": lambda: buffer.combine(rows.tolist(), handle),
        "num_sms must be at least 2": lambda: buffer.set_num_sms(1),
        "topk_weights must be [": lambda: buffer.combine(rows, handle, torch.ones(1)),
        "own dtype torch.float32 or float8_e4m3fn, got torch.bfloat16": lambda: buffer.combine(
            rows, handle, grad_wire_dtype=torch.bfloat16
        ),
        "hidden 32 is not a multiple": lambda: buffer.combine(
            rows, handle, grad_wire_dtype=fp8.FP8_DTYPE
        ),
        "take_grad needs grad_wire_dtype float8_e4m3fn, got torch.float32": lambda: buffer.combine(
            rows, handle, take_grad=lambda *_: None
        ),
        "x must be [4, 32]": lambda: buffer.dispatch(X[1:], handle=handle),
        "topk_weights must be [4, 3], got [4, 1]": lambda: buffer.dispatch(
            X, handle=handle, topk_weights=torch.ones(4, 1)
        ),
        "add_weights needs the rank layout, the handle has 'expert'": lambda: buffer.combine(
            rows, handle, add_weights=True
        ),
        "add_weights has no backward": lambda: buffer.combine(
            by_rank.recv_x.requires_grad_(),
            by_rank.handle,
            by_rank.recv_topk_weights,
            add_weights=True,
        ),
        "x is on meta": lambda: buffer.combine(rows.to("meta"), handle),
        "exactly one of topk_idx": lambda: buffer.dispatch(X, TOPK, handle=handle),
        "routing_map and handle": lambda: buffer.dispatch(X, routing_map=MAP, handle=handle),
        "layout is that of the handle, 'expert', got 'rank'": lambda: buffer.dispatch(
            X, handle=handle, layout="rank"
        ),
        "expert_alignment is that of the handle, 16, got 8": lambda: buffer.dispatch(
            X, handle=handle, expert_alignment=8
        ),
    }
    buffer.dispatch(X, handle=handle, layout="expert", expert_alignment=16)
    messages = {}
    for name, call in calls.items():
        with pytest.raises(EPArgumentError) as caught:
            call()
        messages[name] = str(caught.value)
    buffer.destroy()
    for call in (lambda: buffer.dispatch(X, TOPK), lambda: buffer.set_num_sms(None)):
        with pytest.raises(EPStateError, match="destroyed"):
            call()
    return messages


def test_bad_combine_arguments_are_named():
    for messages in run_ranks(2, try_combine):
        for name, message in messages.items():
            wanted = "another buffer" if "another buffer" in name else name
            assert wanted in message, message


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (dict(num_experts=0), "num_experts must be a positive integer, got 0"),
        (dict(hidden=2.5), "hidden must be a positive integer, got 2.5"),
        (dict(num_topk=9), "num_topk 9 is more than num_experts 8"),
        (dict(ranks_per_node=0), "ranks_per_node must be a positive integer, got 0"),
        (dict(backend="nccl"), "auto, nvlink, nodes, reference, got 'nccl'"),
        (
            dict(dtype=torch.float64),
            "dtype must be bfloat16, float16 or float32, got torch.float64",
        ),
        (dict(ranks_per_node=1.5), "ranks_per_node must be a positive integer, got 1.5"),
        (dict(num_topk=33, num_experts=64), "num_topk is at most 32, got 33"),
        (dict(num_experts=8192), "num_experts is at most 4096, got 8192"),
        (dict(timeout_s=0), "timeout_s must be a positive number of seconds, .* got 0"),
        (dict(timeout_s="30"), "timeout_s must be a positive number of seconds, .* got '30'"),
        (dict(timeout_s=1e9), "timeout_s .* at most 1e\\+08, got 1000000000.0"),
    ],
)
def test_bad_config_is_named(change, pattern):
    with pytest.raises(EPArgumentError, match=pattern):
        EPConfig(**{**SIZES, **change})


def try_groups(rank: int) -> None:
    with pytest.raises(EPArgumentError, match="config must be an EPConfig, got dict"):
        Buffer(None, SIZES)
    of_rank_0 = dist.new_group([0])
    if rank == 1:
        with pytest.raises(EPArgumentError, match="this process is not a member of the group"):
            Buffer(of_rank_0, EPConfig(**SIZES))
    with pytest.raises(EPArgumentError, match="group must be a ProcessGroup or None, got str"):
        Buffer("world", EPConfig(**SIZES))
    bf16 = Buffer(None, EPConfig(**{**SIZES, "dtype": torch.bfloat16}))
    with pytest.raises(EPArgumentError, match="pass dtype=torch.float32 to EPConfig"):
        bf16.dispatch(X, TOPK)
    with pytest.raises(EPArgumentError, match="num_experts 7 is not divisible by the group's 2"):
        Buffer(None, EPConfig(**{**SIZES, "num_experts": 7}))
    with pytest.raises(EPArgumentError, match="2 ranks are not divisible by ranks_per_node 3"):
        Buffer(None, EPConfig(**SIZES, ranks_per_node=3))


def test_config_that_does_not_fit_the_group_is_named():
    run_ranks(2, try_groups)


def test_buffer_needs_torch_distributed():
    with pytest.raises(EPStateError, match="init_process_group"):
        Buffer(None, EPConfig(**SIZES))


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ("cpu:gloo,cuda:gloo", ("cpu",)),  # what torch says of a gloo group
        ("cuda:nccl", ("cuda",)),
        ("cpu:gloo,cuda:nccl", ("cpu", "cuda")),
    ],
)
def test_tensors_of_a_device_that_the_group_cannot_send_from(config, kinds, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: config)
    assert device_types(backend_by_device_type(None)) == kinds


def ranks_want_different_backends(rank: int) -> str:
    with pytest.raises(EPMismatchError) as caught:
        Buffer(None, EPConfig(**SIZES, backend="auto" if rank else "reference"))
    return str(caught.value)


def test_ranks_that_want_different_backends():
    for rank, message in enumerate(run_ranks(2, ranks_want_different_backends)):
        mine, other = ("auto", "reference") if rank else ("reference", "auto")
        assert f"rank {rank} has backend='{mine}'; rank {1 - rank} has backend='{other}'" in message


def stream_arguments_on_cpu(rank: int) -> None:
    buffer = Buffer(None, EPConfig(**SIZES))
    out = buffer.dispatch(
        X, TOPK, previous_event=Buffer.capture(), async_finish=True, allocate_on_comm_stream=True
    )
    assert isinstance(out.event, EventOverlap)
    with out.event:
        pass
    back = buffer.combine(out.recv_x, out.handle, async_finish=True)
    back.event.current_stream_wait()
    assert torch.equal(back.combined_x, 2 * X)


def test_stream_arguments_are_accepted_on_cpu():
    run_ranks(2, stream_arguments_on_cpu)
