"""What a routing over NVLink keeps, how large it is, and for how long; no GPU is needed."""

from __future__ import annotations

import ctypes
import dataclasses
from unittest import mock

import pytest
import torch
from nvlink_launches import CONFIG, TOPK, dispatch, plan
from virtual_ranks import VirtualBuffer

from ep_comm._native import header
from ep_comm.backends.nvlink import streams as nvlink_streams
from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.requests import CombineRequest
from ep_comm.handle import DispatchHandle


@pytest.mark.parametrize("capacity", [None, 40])
def test_arrays_of_a_routing_stand_where_kernels_look_for_them(backend, capacity):
    routing = plan(backend, capacity)
    first_word = {name: first for name, (first, _) in routing.places.items()}
    if capacity is None:  # nobody knows yet how many rows will come
        assert routing.native.entries == backend._planner.entries.data_ptr()
        assert routing.places["entries"][1] == 0 and first_word.pop("entries")
    for name, kind in header.Routing._fields_:
        if kind is ctypes.c_void_p:
            if name in first_word:
                address = getattr(routing.native, name)
                assert address == routing.arena.data_ptr() + 4 * first_word.pop(name)
        else:
            assert (
                getattr(routing.native, name)
                == dict(num_tokens=10, num_topk=2, num_topk4=4, expert_major=True, last_entry=31)[
                    name
                ]
            )
    assert not first_word


ENTRY_BYTES = 4 * 3 * 4  # of two experts a token


def bytes_of_own_tokens(num_tokens: int) -> int:
    """Experts and slots of 2 ranks, 5 arrays of 2 numbers or 4 and one of 5; all whole 16 bytes."""
    return 4 * num_tokens * (2 + 2) + 5 * 16 + 32


ROOMY = dataclasses.replace(CONFIG, max_tokens_per_rank=1600)


@pytest.mark.parametrize("backend", [CONFIG, ROOMY], ids=["exact", "roomy"], indirect=True)
def test_what_a_layer_keeps_is_described(backend):
    # Three parts of four int32 numbers: two experts a token, in whole vectors of 16 bytes.
    assert "a layer in flight keeps 48 bytes a received row" in backend.describe()


def test_a_handle_is_as_large_as_what_came(backend):
    """7 rows do, for 10 tokens of this rank; the buffer alone has room for more."""
    routing = plan(backend)
    dispatch(backend, routing)
    assert routing.num_bytes == bytes_of_own_tokens(10) + 7 * ENTRY_BYTES
    assert routing.native.last_entry == 6  # whatever comes, no kernel looks behind it
    room = 2 * backend.config.max_tokens_per_rank * ENTRY_BYTES
    assert backend._planner.entries.nbytes == room
    assert backend.buffer_bytes - backend.offsets.total >= backend._planner.entries.nbytes
    routing = plan(backend, layout="rank")
    dispatch(backend, routing)
    experts = routing.recv_topk_idx.nbytes
    assert routing.num_bytes == bytes_of_own_tokens(10) + 7 * ENTRY_BYTES + experts


@pytest.mark.parametrize(
    "layout, capacity, entries",
    [("expert", 5, 32), ("expert", 500, 32), ("rank", 5, 6), ("rank", 31, 32), ("rank", 500, 32)],
)
def test_a_handle_that_nobody_waits_for_has_room_for_the_worst(backend, layout, capacity, entries):
    """In the rank layout that is what the output has, and an entry for the rows that it has not."""
    routing = plan(backend, capacity, layout=layout)
    assert routing.native.last_entry == entries - 1
    assert routing.num_bytes == bytes_of_own_tokens(10) + entries * ENTRY_BYTES
    dispatch(backend, routing)
    [launch] = [call for call in backend.native.take() if call[0] == "ep_dispatch"]
    assert launch[1].planned_entries is None
    assert launch[1].routing.entries == routing.native.entries


def test_entries_are_copied_by_the_kernel_that_expands_for_the_first_time(backend):
    """Several handles at once, used in another order: each has its own, a plan's are used anew."""
    handles = [plan_and_dispatch(backend) for _ in range(3)]
    planned = backend._planner.entries.data_ptr()
    for (_, calls), number in zip(handles, (1, 2, 3), strict=True):
        plans, (push, expand) = calls[0], [call[1] for call in calls if call[0] == "ep_dispatch"]
        assert plans[1].ticket == number and plans[1].routing.entries == planned
        assert push.routing.entries == planned and not push.num_expand_blocks
        assert expand.planned_entries == planned and expand.num_received == 7
        assert expand.routing.entries not in (planned, None)
        assert expand.routing.topk_idx == push.routing.topk_idx
    own = [calls[3][1].routing.entries for _, calls in handles]
    assert len(set(own)) == 3
    rows = torch.zeros(16, 512, dtype=torch.bfloat16)
    for i in (1, 0, 2):
        backend.combine(handles[i][0], CombineRequest(rows, None, False))
        dispatch(backend, handles[i][0])
        combine, cached = (call[1] for call in backend.native.take())
        assert combine.routing.entries == cached.routing.entries == own[i]
        assert not cached.is_planned  # so that nothing is copied


def plan_and_dispatch(backend: NVLinkBackend) -> tuple[DispatchHandle, list[tuple]]:
    routing = plan(backend)
    dispatch(backend, routing)
    return routing, backend.native.take()


def test_the_input_of_a_plan_is_let_go_with_the_first_dispatch(backend):
    topk = TOPK.clone()
    routing = plan(backend, source=topk)
    assert routing.first.source is topk
    pending = dispatch(backend, routing, asynchronous=True)
    keep = pending.event.args[1]  # until the kernels are done
    assert any(kept is topk for kept in keep)
    assert any(kept is routing.memory for kept in keep) and len(routing.memory) == 2
    assert not any(value is topk for value in vars(routing).values())


def test_the_first_rank_major_dispatch_writes_the_experts_of_its_rows(backend):
    routing_map = torch.zeros(10, 8, dtype=torch.bool)
    for source, dtype in (
        (TOPK, torch.int64),
        (TOPK.int(), torch.int32),
        (routing_map, torch.int32),
    ):
        for num_sms in (None, 24):  # one launch, and two
            routing = plan(backend, capacity=40, layout="rank", source=source, num_sms=num_sms)
            dispatch(backend, routing)
            dispatch(backend, routing)
            calls = backend.native.take()
            *push, expand, again = [call[1] for call in calls if call[0] == "ep_dispatch"]
            assert len(push) == (num_sms is not None)
            experts = routing.recv_topk_idx
            assert experts.shape == (40, 2) and experts.dtype == dtype
            assert expand.recv_topk_idx == experts.data_ptr()
            assert expand.recv_idx_bytes == experts.element_size()
            assert all(launch.recv_topk_idx is None for launch in (*push, again))


def test_groups_of_one_size_are_known_without_a_wait(backend):
    buffer = VirtualBuffer(backend, CONFIG)
    rows, num_local_experts = 24, buffer.num_local_experts
    stats = torch.zeros(2, num_local_experts, dtype=torch.int32)
    routing = plan(
        backend,
        rows * num_local_experts,
        expert_capacity=rows,
        overflow_stats=stats,
        expert_alignment=rows,
    )
    handle = DispatchHandle(session=buffer._session, routing=routing)
    assert handle.padded_tokens_per_expert.tolist() == [rows] * num_local_experts
    assert handle.num_rows == rows * num_local_experts
    [planned] = backend.native.take()  # and nothing that waits
    args = planned[1]
    assert (args.ticket, args.expert_capacity, args.expert_alignment) == (0, 24, 24)
    assert args.overflow == stats.data_ptr()
    plan(backend)
    [planned] = backend.native.take()
    assert planned[1].expert_capacity == 0 and planned[1].overflow is None


def test_a_routing_is_kept_for_the_stream_that_it_is_used_on(backend, monkeypatch):
    routing, another = plan(backend), object()
    rows = torch.zeros(9, 512, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: another)
    with mock.patch.object(torch.Tensor, "record_stream") as record_stream:
        dispatch(backend, routing)
        dispatch(backend, routing)
        backend.combine(routing, CombineRequest(rows, None, False))
        assert not record_stream.called
        monkeypatch.setattr(nvlink_streams, "raw_stream", lambda _: 9)
        dispatch(backend, routing)
        backend.combine(routing, CombineRequest(rows, None, True))
        assert record_stream.call_args_list == [mock.call(another)] * 4  # two tensors
