"""`ep_comm.deep_ep.ElasticBuffer` on real processes, against a loop over tokens."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import Case, assert_same, to_numpy, to_torch
from deep_ep_elastic import Layout, buffer_of, every_way, fp8_rows
from deep_ep_normal import CASES, Rank
from own_name import patience
from ranks import run_ranks

from ep_comm import EPArgumentError, EPMismatchError, EPStateError, EPUnsupportedError, fp8
from ep_comm.deep_ep import ElasticBuffer, EventOverlap
from ep_comm.deep_ep.elastic_calls import finish
from ep_comm.deep_ep.hints import TIMEOUT_VARIABLE
from ep_comm.deep_ep.payload import empty_scales, scales_by_row

patience()


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_call(case):
    run_ranks(case.num_ranks, every_way, case)


def test_fp8_rows():
    run_ranks(2, fp8_rows, Case(tokens=(7, 5), layout="rank", hidden=512))


def test_scales_of_groups_by_row():
    """An empty group, groups of different sizes, and room behind the last."""
    offsets = [0, 4, 4, 12]
    by_row = torch.arange(15 * 3, dtype=torch.float32).view(15, 3)
    joined = fp8.join_scales(by_row, [*offsets, 15])
    assert not torch.equal(joined, by_row.flatten())
    got = scales_by_row(joined, torch.tensor(offsets, dtype=torch.int32), 15)
    assert torch.equal(got, by_row)
    none = torch.zeros(0, 256, dtype=torch.uint8)
    assert scales_by_row(joined[:0], torch.zeros(4, dtype=torch.int32), 0).shape[0] == 0
    assert empty_scales(none, True).shape == empty_scales(none, False).shape == (0, 2)


@pytest.mark.parametrize("is_filled", [False, True])
def test_scales_are_arranged_behind_what_fills_their_memory(monkeypatch, is_filled):
    """torch fills new memory on the current stream where algorithms are to be deterministic."""
    stream = mock.Mock()
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    monkeypatch.setattr(torch.Tensor, "record_stream", mock.Mock())
    rows = torch.zeros(3, 256, dtype=torch.float8_e4m3fn), torch.rand(3, 2)
    out = mock.Mock(recv_x=rows, event=EventOverlap(mock.Mock()))
    kept = mock.Mock(do_expand=False)
    kept.buffer.native.comm_stream = stream
    torch.use_deterministic_algorithms(is_filled)
    try:
        (_, scales), _ = finish(out, kept, None, column_major=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(scales, rows[1])
    waits = [mock.call.wait_stream("current")] if is_filled else []
    assert stream.method_calls == [*waits, mock.call.record_event()]


# ---- What is said of it, and sizes --------------------------------------------------------------


class Noted(EventOverlap):
    waits = 0

    def order_current_stream(self) -> None:
        self.waits += 1


def attributes(rank: int) -> None:
    case = Case(tokens=(3, 9), layout="rank")
    os.environ.pop(TIMEOUT_VARIABLE, None)
    buffer = buffer_of(case, num_gpu_timeout_secs=25, num_bytes=1 << 21)
    assert (buffer.rank_idx, buffer.num_ranks, buffer.group) == (rank, 2, dist.group.WORLD)
    assert buffer.num_bytes == 1 << 21 and buffer.num_max_tokens_per_rank == 9
    assert buffer.explicitly_destroy and buffer.prefer_overlap_with_compute
    assert buffer.get_physical_domain_size() == buffer.get_logical_domain_size() == (1, 2)
    assert buffer.get_theoretical_num_sms(num_experts=8, num_topk=2) == 24
    hint = ElasticBuffer.get_buffer_size_hint(dist.group.WORLD, 8192, 7168, num_topk=8)
    assert hint == 2 * 8192 * 7168 * 2 and hint % (2 << 20) == 0
    with pytest.raises(EPArgumentError, match="no communication stream"):
        buffer.get_comm_stream()
    mine = Rank(rank, case)
    events = Noted(), Noted()
    handle = dispatch(
        buffer,
        mine,
        do_handle_copy=False,
        previous_event=events[0],
        previous_event_before_epilogue=events[1],
    )[3]
    assert [event.waits for event in events] == [1, 1]
    assert handle.topk_idx is mine.topk_idx and handle.num_sms == 0
    assert copy.deepcopy(handle) is copy.copy(handle) is handle
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(handle)
    native = handle.buffer.native
    assert (native.config.timeout_s, native.config.max_tokens_per_rank) == (25, 64)
    for name in ("recv_src_metadata", "dst_buffer_slot_idx"):
        with pytest.raises(AttributeError, match=f"no '{name}'"):
            getattr(handle, name)
    for name in ("engram_write", "pp_send", "all_gather", "barrier"):
        with pytest.raises(AttributeError, match=f"no '{name}'.*expert-parallel part"):
            getattr(buffer, name)

    # A larger number makes a larger buffer, without a question; handles of the smaller one stay.
    large = Rank(rank, Case(tokens=(2, 300), layout="rank"))
    want = Layout(large, False, 1)
    recv_x, *_, of_large, _ = dispatch(buffer, large, num_max_tokens_per_rank=512)
    want.check_rows(recv_x)
    assert of_large.buffer.native.config.max_tokens_per_rank == 512
    combined = buffer.combine(to_torch(Layout(mine, False, 1).made_rows(rank), "cpu"), handle)[0]
    assert_same(to_numpy(combined), Layout(mine, False, 1).want_combined(), "combined")
    buffer.destroy()
    with pytest.raises(EPStateError):
        dispatch(buffer, mine)


def dispatch(buffer: ElasticBuffer, mine: Rank, **how: Any) -> tuple:
    given = dict(topk_idx=mine.topk_idx, topk_weights=mine.weights)
    return buffer.dispatch(mine.x, num_experts=mine.case.num_experts, **{**given, **how})


def test_attributes_and_sizes():
    run_ranks(2, attributes)


def refused(rank: int) -> None:
    """Before anything is sent: the buffer goes on."""
    mine = Rank(rank, Case(tokens=(3, 9), layout="rank"))
    with pytest.raises(EPUnsupportedError, match="num_cpu_bytes=4096"):
        ElasticBuffer(dist.group.WORLD, num_cpu_bytes=4096)
    buffer = ElasticBuffer(dist.group.WORLD)
    with pytest.raises(EPArgumentError, match="num_max_tokens_per_rank must be"):
        dispatch(buffer, mine)
    most = dict(num_max_tokens_per_rank=9)
    handle = dispatch(buffer, mine, **most)[3]
    if rank == 1:
        with pytest.raises(EPArgumentError, match="x has 9 tokens, more than .* 8"):
            dispatch(buffer, mine, num_max_tokens_per_rank=8)
    dist.barrier()
    for bad, match in (
        (dict(topk_idx=None), "pass a handle, or topk_idx and num_experts"),
        (dict(previous_event="now"), "previous_event must be an EventOverlap, got str"),
        (dict(previous_event_before_epilogue="now"), "must be an EventOverlap, got str"),
        (dict(cumulative_local_expert_recv_stats=torch.zeros(4)), "recv_stats must be torch.int32"),
        (dict(handle=handle), "exactly one"),
        (dict(handle=handle, topk_idx=None, do_expand=True), "do_expand is that of the handle"),
        (dict(handle=handle, topk_idx=None, expert_alignment=8), "is that of the handle, 1, got 8"),
        (dict(handle=handle.native, topk_idx=None), "handle must be what ElasticBuffer.dispatch"),
        (dict(expert_alignment=-1, do_expand=True), "expert_alignment must be an integer"),
    ):
        with pytest.raises(EPArgumentError, match=match):
            dispatch(buffer, mine, **{**most, **bad})
    packed = torch.zeros(len(mine.x), 1, dtype=torch.int32)
    rows = torch.zeros(len(mine.x), 128).to(fp8.FP8_DTYPE)
    with pytest.raises(EPArgumentError, match="scales must be float32 on cpu, got torch.int32"):
        buffer.dispatch((rows, packed), mine.topk_idx, num_experts=8, **most)
    with pytest.raises(EPArgumentError, match="bias must be"):
        buffer.combine(mine.y, handle, bias=mine.y[:1])
    with pytest.raises(EPArgumentError, match="handle must be what ElasticBuffer.dispatch"):
        buffer.combine(mine.y, None)
    combined = buffer.combine(mine.y, handle)[0]
    assert_same(to_numpy(combined), mine.want_combined(), "combined")
    buffer.destroy()


def test_bad_calls_leave_the_buffer_as_it_was():
    run_ranks(2, refused)


def different_kinds(rank: int) -> None:
    from ep_comm.deep_ep import Buffer

    with pytest.raises(EPMismatchError, match="ElasticBuffer"):
        (ElasticBuffer if rank else Buffer)(dist.group.WORLD)


def test_ranks_make_the_same_kind():
    run_ranks(2, different_kinds)
