"""Copy engines as the wire: what is refused, and what is launched; no GPU is needed."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from copy_engine_cases import BY_COPY
from nvlink_launches import (
    COMM,
    COPIES,
    CURRENT,
    SIDE,
    TOPK,
    Launches,
    X,
    dispatch,
    make_backend,
    plan,
)
from ranks import run_ranks

from ep_comm import (
    Buffer,
    EPArgumentError,
    EPConfig,
    EPMismatchError,
    EPOverflowError,
    EPUnsupportedError,
)
from ep_comm._native import NativeLibrary, header
from ep_comm.backends.nvlink import backend as nvlink
from ep_comm.backends.nvlink import support
from ep_comm.backends.nvlink.copy_engine import chunk_rows
from ep_comm.backends.requests import CombineRequest, DispatchRequest

CONFIG = EPConfig(num_experts=8, hidden=512, max_tokens_per_rank=200, num_topk=2, **BY_COPY)
by_copy = pytest.mark.parametrize("backend", [CONFIG], ids=["copies"], indirect=True)
COPY, COPY_BACK = COPIES


# ---- What is refused ---------------------------------------------------------------------------


def test_a_wire_that_is_none():
    with pytest.raises(EPArgumentError, match="wire must be one of sm, copy-engine, got 'ce'"):
        dataclasses.replace(CONFIG, wire="ce")


@pytest.mark.parametrize("other", ["nodes", "reference"])
def test_backends_without_copies(other):
    with pytest.raises(EPArgumentError, match=f'is one of the "nvlink" backend, not of {other!r}'):
        dataclasses.replace(CONFIG, backend=other)


@pytest.mark.parametrize(
    ("num_ranks", "num_topk", "wanted"),
    [(1, 1, None), (2, 2, None), (4, 8, None), (2, 1, "50%"), (4, 2, "44%"), (8, 8, "66%")],
)
def test_groups_for_which_most_rows_would_be_pushed_for_nothing(num_ranks, num_topk, wanted):
    config = dataclasses.replace(CONFIG, num_topk=num_topk)
    if wanted is None:
        config.check_group(num_ranks)
        return
    with pytest.raises(EPArgumentError, match=f"experts want {wanted} of them, and it takes 67%"):
        config.check_group(num_ranks)
    dataclasses.replace(config, wire="sm").check_group(num_ranks)


def on_cpus(rank: int, what: str) -> str:
    wire = "copy-engine" if what == "no GPU" or rank == 0 else "sm"
    error = EPArgumentError if what == "no GPU" else EPMismatchError
    with pytest.raises(error) as caught:
        Buffer(None, dataclasses.replace(CONFIG, wire=wire))
    return str(caught.value)


def test_machines_without_peer_copies_are_named():
    for message in run_ranks(2, on_cpus, "no GPU"):
        assert message.startswith("no backend with wire='copy-engine' for this group: nvlink: ")


def test_ranks_with_different_wires_are_named():
    for message in run_ranks(2, on_cpus, "mismatch"):
        assert "rank 0 has wire='copy-engine'" in message
        assert "rank 1 has wire='sm'" in message


def without_copies(rank: int) -> None:
    buffer = Buffer(None, dataclasses.replace(CONFIG, wire="sm"))
    with pytest.raises(EPUnsupportedError, match=r"begin_dispatch needs EPConfig\(wire='copy-eng"):
        buffer.begin_dispatch(X)
    with pytest.raises(EPArgumentError, match="x must be"):
        buffer.begin_dispatch(X[:, :-1])
    buffer.dispatch(X, TOPK[:, :1])  # as before


def test_rows_ahead_need_copies():
    run_ranks(1, without_copies)


def test_drivers_without_flags_behind_copies_are_named(monkeypatch):
    driver = mock.Mock(ep_check_copies=lambda: header.EP_ERR_CUDA, ep_last_error=lambda: b"no flag")
    native = mock.Mock(spec=NativeLibrary, _dll=driver, _last_error="no flag")
    native.copies_reason = lambda: NativeLibrary.copies_reason(native)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(support._native, "unusable_reason", lambda gpu: None)
    monkeypatch.setattr(support._native, "load", lambda: native)
    assert support.reason_here(2, CONFIG) == "no flag"
    # One rank sends nothing, and the other wire needs no such flags.
    assert support.reason_here(1, CONFIG) is None
    assert support.reason_here(2, dataclasses.replace(CONFIG, wire="sm")) is None
    driver.ep_check_copies = lambda: header.EP_OK
    assert support.reason_here(2, CONFIG) is None


# ---- What is launched --------------------------------------------------------------------------


def test_the_first_copy_to_a_peer_is_made_with_the_buffer(monkeypatch):
    """Zeros over zeros, on the stream of each kind, and no flag: nobody waits for anything yet."""
    offsets = header.BufferOffsets(total=4096, max_chunks=4, zeros=512)
    monkeypatch.setattr(Launches, "buffer_offsets", lambda *_: offsets)
    calls = make_backend(CONFIG).native.take()
    assert [(call[0], call[2]) for call in calls] == [("ep_push", COPY), ("ep_push", COPY_BACK)]
    for _, push, _ in calls:
        assert push.flag == -1 and push.event is None
        assert push.source == push.target_offset == 512
        assert push.row_bytes == 16 and list(push.num_rows[:2]) == [1, 1]


@by_copy
def test_a_new_dispatch_pushes_before_its_routing_is_known(backend):
    dispatch(backend, plan(backend))
    calls = backend.native.take()
    names = [call[0] for call in calls]
    assert names == [
        *("wait", "ep_gate", "plan"),  # 10 tokens of 200 are one chunk
        *("ep_push", "ep_push", "mailbox"),
        *(("event", "ep_expand") * 4),
        "wait",
    ]
    assert calls[0] == ("wait", COPY, CURRENT) and calls[-1] == ("wait", CURRENT, SIDE)
    gate, head, rows = (calls[i] for i in (1, 3, 4))
    assert gate[2] == head[2] == rows[2] == COPY
    assert not gate[1].begins  # the plan's kernel does
    assert (head[1].flag, rows[1].flag) == (0, 1)
    assert rows[1].row_bytes == 1024 and list(rows[1].num_rows[:2]) == [10, 10]
    assert head[1].event is None and rows[1].event is not None
    waits, expands = calls[6:-1:2], calls[7:-1:2]
    assert {wait[1:] for wait in waits} == {(SIDE, rows[1].event)}
    assert [(each[1].first_token, each[1].end_token) for each in expands] == [
        *((0, 64), (64, 128), (128, 192), (192, 200)),
    ]
    for _, args, stream in expands:
        assert stream == SIDE and args.is_planned
        assert args.num_expand_blocks == 132 and args.num_blocks == 4 * 132
        assert args.wire.number == rows[1].number == 1 and args.wire.chunk_rows == 64
        assert 32 % args.chunk_tokens == 0


@by_copy
def test_probabilities_that_come_late_do_not_hold_up_rows(backend):
    source = torch.zeros(10, 8, dtype=torch.bool)
    routing = plan(backend, source=source, has_weights=True)
    dispatch(backend, routing, weights=torch.rand(10, 2))
    calls = backend.native.take()
    pushed = [call for call in calls if COPY in call[1:2] + call[-1:]]
    assert [call[0] for call in pushed] == ["wait", "ep_gate", "ep_push", "wait", "ep_push"]
    first, late = pushed[-3][1], pushed[-1][1]
    assert (first.flag, first.event) == (1, None)  # expanding waits for the head too
    assert pushed[-2] == ("wait", COPY, CURRENT)
    assert late.flag == 0 and late.event is not None and late.row_bytes == 16


@by_copy
def test_rows_ahead_are_pushed_once(backend):
    backend.begin(X, None, torch.bfloat16)
    gate, rows = (call[1] for call in backend.native.take() if call[0].startswith("ep_"))
    assert gate.begins and (rows.flag, rows.event) == (1, None)
    routing = plan(backend)
    dispatch(backend, routing)
    calls = backend.native.take()
    assert [call[0] for call in calls].count("ep_gate") == 0
    [head] = [call[1] for call in calls if call[0] == "ep_push"]
    assert head.flag == 0 and head.event is not None
    [planned] = [call[1] for call in calls if call[0] == "plan"]
    assert planned.peers.record == gate.peers.record and planned.is_begun
    dispatch(backend, routing)  # the next one is as ever
    assert [call[0] for call in backend.native.take()].count("ep_push") == 2
    plan(backend)
    [planned] = [call[1] for call in backend.native.take() if call[0] == "plan"]
    assert not planned.is_begun


@by_copy
def test_what_follows_rows_ahead_is_an_operation_that_has_started(backend):
    """Else an error in it would free memory that copies and kernels still use."""
    routing = plan(backend)
    dispatch(backend, routing)
    backend.begin(X, None, torch.bfloat16)
    before = backend.num_started
    new_routing = plan(backend)
    assert backend.num_started > before
    dispatch(backend, new_routing)
    backend.begin(X, None, torch.bfloat16)
    before = backend.num_started
    dispatch(backend, routing)
    assert backend.num_started > before


@by_copy
def test_a_notice_before_a_known_dispatch_leaves_what_was_begun(backend):
    routing = plan(backend)
    dispatch(backend, routing)
    backend.begin(X, None, torch.bfloat16)
    backend.native.take()

    notice = mock.patch.object(backend.memory, "check", side_effect=EPOverflowError(9, 8))
    with notice, pytest.raises(EPOverflowError):
        dispatch(backend, routing)
    dispatch(backend, routing)  # once more: its rows are on their way, so the head alone is missing
    calls = backend.native.take()
    assert [call[0] for call in calls].count("ep_gate") == 0
    assert [call[1].flag for call in calls if call[0] == "ep_push"] == [0]


@by_copy
def test_rows_ahead_follow_the_dispatch_before_wherever_it_ran(backend):
    dispatch(backend, plan(backend, asynchronous=True), asynchronous=True)
    backend.native.take()
    backend.begin(X, None, torch.bfloat16)
    calls = backend.native.take()
    assert calls[:2] == [("wait", COPY, COMM), ("wait", COPY, CURRENT)]
    assert calls[2][0] == "ep_gate"


@by_copy
def test_rows_that_are_quantised_behind_the_plan_are_waited_for(backend, monkeypatch):
    quantized = X.to(torch.float8_e4m3fn), torch.ones(10, 4)
    monkeypatch.setattr(nvlink.fp8, "quantize", lambda x: quantized)
    routing = plan(backend)
    backend.native.take()
    request = DispatchRequest(X, None, None, torch.float8_e4m3fn, torch.bfloat16, False)
    backend.dispatch(routing, request)
    calls = [call for call in backend.native.take() if COPY in call[1:2] + call[-1:]]
    assert [call[0] for call in calls] == ["wait", "ep_push", "ep_push", "ep_push"]
    assert calls[0] == ("wait", COPY, CURRENT)
    scales, head, rows = (call[1] for call in calls[1:])
    assert (scales.flag, scales.row_bytes) == (-1, 16) and (head.flag, rows.flag) == (0, 1)


@pytest.mark.parametrize("is_known", [False, True])
@by_copy
def test_one_rank_quantises_nothing_ahead(backend, monkeypatch, is_known):
    """Its dispatch may run on another stream, which nothing orders behind that of `begin`."""
    quantized: list[torch.Tensor] = []

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantized.append(x)
        return x.to(torch.float8_e4m3fn), torch.ones(10, 4)

    monkeypatch.setattr(nvlink.fp8, "quantize", quantize)
    alone = make_backend(CONFIG, num_ranks=1)
    wire = torch.float8_e4m3fn
    routing = plan(alone)
    if is_known:
        dispatch(alone, routing)
    alone.native.take()
    alone.begin(X, None, wire)
    assert not quantized and not alone.native.take()
    with pytest.raises(EPArgumentError, match="wire_dtype is torch.bfloat16, and was"):
        alone.check_ahead(X, None, torch.bfloat16)
    alone.dispatch(routing, DispatchRequest(X, None, None, wire, torch.bfloat16, False))
    assert len(quantized) == 1
    pushed = [call[1] for call in alone.native.take() if call[0] == "ep_dispatch"]
    assert pushed and all((args.row_bytes, args.scale_bytes) == (512, 16) for args in pushed)
    alone.check_ahead(X, None, torch.bfloat16)  # the next one is any


@by_copy
def test_what_comes_between_rows_and_their_dispatch_keeps_its_record(backend):
    routing = plan(backend)
    received = dispatch(backend, routing).result
    backend.begin(X, None, torch.bfloat16)
    backend.combine(routing, CombineRequest(received.x, None, False))
    dispatch(backend, routing)
    started = [*backend.recorder._started(0)]
    assert [each.op for each in started] == ["dispatch", "dispatch", "combine"]
    assert [each.row_bytes for each in started] == [1024, 1024, 1024]


@by_copy
def test_a_combine_pushes_chunks_as_they_are_added_up(backend):
    routing = plan(backend)
    received = dispatch(backend, routing).result
    backend.native.take()
    backend.combine(routing, CombineRequest(received.x, None, False))
    calls = backend.native.take()
    assert [call[0] for call in calls] == [
        *("wait", "ep_gate", "wait", "ep_partial_sums", "wait", "ep_push", "wait", "ep_combine"),
    ]
    gate, partial, push, combine = (calls[i] for i in (1, 3, 5, 7))
    assert gate[1].begins and gate[2] == push[2] == COPY_BACK
    assert partial[2] == combine[2] == CURRENT
    assert calls[4] == ("wait", COPY_BACK, CURRENT)
    # The first so that what partial sums mark after a fault comes behind what the gate marks.
    assert calls[2] == calls[6] == ("wait", CURRENT, COPY_BACK)
    assert push[1].num_rows[1] == 7 and push[1].flag == 1
    assert combine[1].num_pushed == -1 and combine[1].chunk_rows == chunk_rows(200) == 64


@by_copy
def test_where_nobody_knows_how_many_rows_came_all_are_pushed(backend):
    routing = plan(backend, capacity=40)
    received = dispatch(backend, routing).result
    backend.native.take()
    weights = torch.rand(40)
    backend.combine(routing, CombineRequest(received.x, weights, False))
    pushes = [call[1] for call in backend.native.take() if call[0] == "ep_push"]
    assert [push.flag for push in pushes] == [-1, 1, 2, 3, 4]  # weights come with the first chunk
    assert all(list(push.num_rows[:2]) == [200, 200] for push in pushes)
    assert pushes[0].chunk_rows == 200 and pushes[0].row_bytes == 8


@by_copy
def test_flags_in_graphs_are_not_the_others(backend):
    """A replay counts on: so its flags follow the epoch, those outside the host's own count."""
    dispatch(backend, plan(backend, capacity=40))
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
        dispatch(backend, plan(backend, capacity=40))
    dispatch(backend, plan(backend, capacity=40))
    pushes = [call[1] for call in backend.native.take() if call[0] == "ep_push"]
    assert [push.number for push in pushes] == [1, 1, 0, 0, 2, 2]
    outside, inside = pushes[0].flag_offset, pushes[2].flag_offset
    assert inside - outside == 4 * 2 * header.EP_COPY_FLAGS == 4 * 16
    assert pushes[4].flag_offset == outside
