"""What the NVLink backend launches, in which order and with which arguments; no GPU is needed."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from virtual_ranks import VirtualBuffer

from ep_comm import EPConfig, EventOverlap
from ep_comm._native import header
from ep_comm.backends.base import (
    CombineRequest,
    DispatchRequest,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencySizes,
    PlanRequest,
)
from ep_comm.backends.nvlink import backend as nvlink
from ep_comm.backends.nvlink import streams as nvlink_streams
from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.nvlink.prices import Chooser, Price, PriceTable
from ep_comm.backends.nvlink.streams import InFlight
from ep_comm.errors import EPArgumentError, EPRoutingError, EPUnsupportedError
from ep_comm.fp8_low_latency import ScaleForm
from ep_comm.handle import DispatchHandle
from ep_comm.telemetry.device import DeviceRecorder

CURRENT, SIDE, COMM = 5, 6, 7
COPIES = 8, 9  # of dispatches, of combines
CONFIG = EPConfig(num_experts=8, hidden=512, max_tokens_per_rank=16, num_topk=2)
X = torch.zeros(10, 512, dtype=torch.bfloat16)
TOPK = torch.zeros(10, 2, dtype=torch.int64)


class Launches:
    """Stands for the native library: keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def plan(self, args, stream, side_stream, event) -> None:
        self.calls.append(("plan", type(args).from_buffer_copy(args), stream, side_stream))

    def launch(self, name, args, stream) -> None:
        self.calls.append((name, type(args).from_buffer_copy(args), stream))

    def stream_wait(self, waiting, other, event) -> None:
        self.calls.append(("wait", waiting, other))

    def event_wait(self, waiting, event) -> None:
        self.calls.append(("event", waiting, event))

    def mailbox_wait(self, *_) -> bool:
        self.calls.append(("mailbox",))
        return True

    def load_kernels(self) -> None:
        pass

    def plan_scratch_bytes(self, *_) -> int:
        return 16

    def buffer_offsets(self, *_) -> header.BufferOffsets:
        return header.BufferOffsets(total=4096, max_chunks=4)

    def take(self) -> list[tuple]:
        calls, self.calls = self.calls, []
        return calls


def make_backend(config: EPConfig) -> NVLinkBackend:
    """By its own constructor; what that asks of CUDA is answered for a CPU."""
    mailbox = header.Mailbox()
    mailbox.num_sent_tokens[0], mailbox.num_recv_tokens[1] = 10, 7
    mailbox.num_tokens_per_expert[0] = 9
    memory = mock.Mock(
        rank=0, num_ranks=2,
        mailbox=mailbox, mailbox_address=0, fault_address=0, notice_address=0,
        counters=torch.zeros(3, 64, dtype=torch.int32),
        peers=lambda *_: header.Peers(num_ranks=2),
    )  # fmt: skip
    cpu = torch.device("cpu", 0)
    urgent, events = iter((COMM, *COPIES)), itertools.count(1)
    answers = {
        "Event": lambda: mock.Mock(cuda_event=next(events)),
        "Stream": lambda priority: mock.Mock(cuda_stream=next(urgent) if priority else SIDE),
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: SimpleNamespace(
            multi_processor_count=132, name="a GPU that nobody measured"
        ),
    }
    with (
        mock.patch.multiple(torch.cuda, **answers),
        mock.patch.object(torch, "device", lambda *_: cpu),
        mock.patch.object(nvlink._native, "load", Launches),
        mock.patch.object(nvlink_streams, "in_flight", lambda _: InFlight(132)),
    ):
        return NVLinkBackend(memory, config)


def test_the_state_of_kernels_when_ranks_are_masked(monkeypatch):
    """As if all operations before number 8 had been received by all, with a bit for each masked."""
    config = dataclasses.replace(CONFIG, low_latency_tokens=4)
    memory_bytes = torch.full((4096,), 7, dtype=torch.uint8)
    synchronized = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronized.append(True))
    backend = make_backend(config)
    backend.memory.tensor = memory_bytes
    backend.offsets.low_latency_credits = 512
    state = backend.low_latency._state
    words = header.LowLatencyState(launches=9, sent=(6, 5), masked=4)
    ints = torch.frombuffer(bytearray(words), dtype=torch.int32)
    state[0, : len(ints)] = ints
    state[1:, 0] = 3  # blocks of a kernel that gave up
    assert backend.quiesce() == 6 and synchronized == [True]
    dispatch_args = backend.low_latency.calls[0].common
    backend.restart((1, 3), 8, dist.HashStore())
    assert backend.memory.restart.call_args.args == (backend.offsets, (1, 3))
    words = header.LowLatencyState.from_address(dispatch_args.state)
    assert list(words.sent) == [8, 8] and words.masked == 0b1010
    assert {n for of_kind in words.received for n in of_kind} == {4}
    assert {n for of_launch in words.known for kind in of_launch for n in kind} == {4}
    assert not state[1:].any() and not state[0, len(ints) :].any()
    credits = memory_bytes[512:].view(torch.int32)
    assert (credits[: 4 * 2] == 4).all() and credits[8] == 0x07070707  # two kinds, halves, ranks
    assert (memory_bytes[:512] == 7).all() and synchronized == [True] * 2
    assert backend.quiesce() == 8
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(EPUnsupportedError, match="while a CUDA graph is captured"):
        backend.quiesce()


@pytest.fixture
def backend(request):
    with (
        mock.patch.object(nvlink_streams, "raw_stream", lambda _: CURRENT),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(nvlink_streams, "EventOverlap", lambda *args: SimpleNamespace(args=args)),
    ):
        made = make_backend(getattr(request, "param", CONFIG))
        made.native.take()
        yield made


def plan(backend: NVLinkBackend, capacity=None, asynchronous=False, num_sms=None, **changes):
    backend.set_num_sms(num_sms)
    request = PlanRequest(
        source=TOPK, num_topk=2, layout="expert", expert_alignment=16, has_weights=False,
        capacity=capacity, expert_capacity=None, overflow_stats=None, asynchronous=asynchronous,
    )  # fmt: skip
    return backend.plan(request._replace(**changes))


def dispatch(backend: NVLinkBackend, routing, asynchronous=False, num_sms=None, weights=None):
    backend.set_num_sms(num_sms)
    dtype = torch.bfloat16
    request = DispatchRequest(X, None, weights, dtype, dtype, asynchronous)
    return backend.dispatch(routing, request)


def test_a_new_dispatch_pushes_while_the_host_waits(backend):
    received = dispatch(backend, plan(backend))
    planned, push, mailbox, expand, joined = backend.native.take()
    assert planned[0] == "plan" and planned[2:] == (CURRENT, SIDE) and planned[1].ticket == 1
    assert planned[1].capacity == 2**31 - 1
    assert joined == ("wait", CURRENT, SIDE)
    assert mailbox == ("mailbox",)
    assert push[0] == expand[0] == "ep_dispatch" and (push[2], expand[2]) == (CURRENT, SIDE)
    assert (push[1].num_push_blocks, push[1].num_expand_blocks) == (24, 0)
    assert (expand[1].num_push_blocks, expand[1].num_expand_blocks) == (0, 108)
    assert push[1].num_blocks == expand[1].num_blocks == 132
    assert (
        push[1].is_planned
        and push[1].peers.record == expand[1].peers.record == planned[1].peers.record
    )
    assert received.result.x.shape == (16, 512) == (expand[1].num_rows, 512)
    assert planned[1].num_send_blocks == planned[1].num_receive_blocks == 64


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


def test_a_given_number_of_rows_spares_the_wait_and_a_launch(backend):
    routing = plan(backend, capacity=40)
    received = dispatch(backend, routing)
    planned, both = backend.native.take()  # and nothing else: no wait
    assert planned[0] == "plan" and planned[2:] == (CURRENT, CURRENT)
    assert planned[1].ticket == 0 and planned[1].capacity == 40
    assert both[0] == "ep_dispatch" and both[2] == CURRENT
    assert both[1].is_planned and both[1].is_behind_plan
    assert (both[1].num_push_blocks, both[1].num_expand_blocks) == (24, 108)
    assert received.result.x.shape == (40, 512)
    dispatch(backend, routing)
    [cached] = backend.native.take()
    assert not cached[1].is_behind_plan


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


@pytest.mark.parametrize("made", ["nothing", "rows", "probabilities"])
def test_an_input_that_was_made_after_the_plan_is_waited_for(backend, made, monkeypatch):
    quantized = X.to(torch.float8_e4m3fn), torch.ones(10, 4)
    monkeypatch.setattr(nvlink.fp8, "quantize", lambda x: quantized)
    routing = plan(backend, capacity=40)
    wire = torch.float8_e4m3fn if made == "rows" else torch.bfloat16
    weights = torch.rand(10, 2 if made == "probabilities" else 4)  # rows of 8 bytes are copied
    request = DispatchRequest(X, None, weights, wire, torch.bfloat16, False)
    backend.dispatch(routing, request)
    _, launch = backend.native.take()  # in order on one stream: nothing to wait for
    assert launch[0] == "ep_dispatch" and launch[2] == CURRENT
    assert launch[1].is_behind_plan == (made == "nothing")


@pytest.mark.parametrize("num_sms", [None, 24])
@pytest.mark.parametrize("source", [TOPK, torch.zeros(10, 8, dtype=torch.bool)])
def test_a_graph_has_no_branches(backend, num_sms, source):
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
        routing = plan(backend, capacity=40, num_sms=num_sms, source=source, has_weights=True)
        dispatch(backend, routing, weights=torch.rand(10, 4))
    planned, both = backend.native.take()
    assert planned[2:] == (CURRENT, CURRENT) and both[2] == CURRENT
    assert both[1].is_planned and not both[1].is_behind_plan
    assert both[1].num_push_blocks > 0 < both[1].num_expand_blocks


def test_with_few_sms_the_halves_are_two_launches(backend):
    dispatch(backend, plan(backend, capacity=40, num_sms=24))
    planned, push, expand, joined = backend.native.take()
    assert planned[2:] == (CURRENT, SIDE)
    assert (push[2], expand[2], joined) == (CURRENT, SIDE, ("wait", CURRENT, SIDE))
    assert not push[1].is_behind_plan and not expand[1].is_behind_plan


def test_a_cached_dispatch_and_a_combine_are_one_launch_each(backend):
    routing = plan(backend)
    received = dispatch(backend, routing).result
    backend.native.take()
    dispatch(backend, routing)
    backend.combine(routing, CombineRequest(received.x, None, False))
    cached, combine = backend.native.take()
    assert cached[0] == "ep_dispatch" and not cached[1].is_planned
    assert (cached[1].num_push_blocks, cached[1].num_expand_blocks) == (24, 108)
    assert combine[0] == "ep_combine"
    assert combine[1].num_blocks == 132
    assert combine[1].peers.record > cached[1].peers.record > 0  # records of their own


def test_asynchronous_operations_run_beside_others_on_few_sms(backend):
    routing = plan(backend)
    received = dispatch(backend, routing).result
    backend.native.take()
    combined = backend.combine(routing, CombineRequest(received.x, None, True))
    fork, combine = backend.native.take()
    assert fork == ("wait", COMM, CURRENT) and combine[2] == COMM
    assert combine[1].num_blocks == 24
    keep = combined.event.args[1]
    assert any(tensor is received.x for tensor in keep)
    dispatch(backend, routing, num_sms=108)
    assert [call[0] for call in backend.native.take()] == ["ep_dispatch"]  # both fit
    dispatch(backend, routing, num_sms=109)
    assert backend.native.take()[0] == ("wait", CURRENT, COMM)


def test_an_asynchronous_plan_with_probabilities_of_a_map_is_waited_for(backend):
    routing_map = torch.zeros(10, 8, dtype=torch.bool)
    plan(backend, capacity=32, asynchronous=True, source=routing_map, has_weights=True)
    assert backend.native.take()[-1] == ("wait", CURRENT, COMM)


def test_what_is_made_after_the_plan_is_waited_for(backend):
    def first(weights, asynchronous=False, **changes) -> list[tuple]:
        routing = plan(backend, 32, asynchronous, num_sms=24, has_weights=True, **changes)
        backend.native.take()
        dispatch(backend, routing, asynchronous, num_sms=24, weights=weights)
        return backend.native.take()

    whole = torch.zeros(10, 4)
    assert [call[0] for call in first(whole)] == ["ep_dispatch", "ep_dispatch", "wait"]
    padded = whole[:, :2]
    assert first(padded)[0] == ("wait", SIDE, CURRENT)
    assert first(padded, asynchronous=True)[:2] == [("wait", COMM, CURRENT), ("wait", SIDE, COMM)]
    routing_map = torch.zeros(10, 8, dtype=torch.bool)
    selected = first(whole, source=routing_map)
    assert selected[0] == ("wait", SIDE, CURRENT)
    misaligned = torch.zeros(44)[1:41].view(10, 4)
    assert first(misaligned)[0] == ("wait", SIDE, CURRENT)


def test_rows_quantised_after_the_plan_are_waited_for(backend):
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    for asynchronous, waits in (
        (False, [("wait", SIDE, CURRENT)]),
        (True, [("wait", COMM, CURRENT), ("wait", SIDE, COMM)]),
    ):
        routing = plan(backend, 32, asynchronous, num_sms=24)
        backend.native.take()
        request = DispatchRequest(X, None, None, fp8, bf16, asynchronous)
        backend.dispatch(routing, request)
        calls = backend.native.take()
        assert [call for call in calls if call[0] == "wait"][: len(waits)] == waits
        assert calls.index(waits[-1]) < [call[0] for call in calls].index("ep_dispatch")


def test_what_was_started_outlives_an_error(backend):
    backend.memory.mailbox.routing_error[0] = header.EP_ROUTING_OUT_OF_RANGE
    with pytest.raises(EPRoutingError):
        dispatch(backend, plan(backend))
    backend.native.take()
    backend.abandon()
    assert backend.native.take() == [("wait", CURRENT, SIDE), ("wait", CURRENT, COMM)]


def test_inside_a_graph_only_what_it_holds_is_waited_for(backend):
    routing = plan(backend, capacity=32)
    dispatch(backend, routing)
    dispatch(backend, routing, asynchronous=True)
    backend.native.take()
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
        mock.patch.object(backend._streams, "_is_within_reach", lambda stream: stream == COMM),
    ):
        dispatch(backend, routing)
        assert backend.native.take()[0] == ("wait", CURRENT, COMM)
        with pytest.raises(EPUnsupportedError, match="num_worst_tokens"):
            plan(backend)
        backend.abandon()
        assert backend.native.take() == []
    with mock.patch.object(backend._streams, "_is_within_reach", lambda stream: False):
        dispatch(backend, routing, asynchronous=True)
        backend.native.take()
        dispatch(backend, routing)
        assert [call[0] for call in backend.native.take()] == ["ep_dispatch"]


@pytest.mark.parametrize("num_sms", [1, 133])
def test_sms_that_there_are_not(backend, num_sms):
    with pytest.raises(EPArgumentError, match="num_sms must be 2 to 132"):
        plan(backend, num_sms=num_sms)
    assert backend.recorder.num_operations == 0


def test_records_are_what_the_kernels_wrote():
    recorder = DeviceRecorder(1, 3, torch.device("cpu"), lambda: None)
    recorder.start("dispatch", 0)
    recorder.complete(100, (4, 9))
    recorder.start("combine", 7)
    written = header.Record(epoch=1, begin_ns=1_000, end_ns=4_000)
    written.num_rows[:3] = 5, 6, 2
    written.longest_wait_ns[:3] = 0, 900, 2_000
    recorder._ring[0] = torch.frombuffer(bytearray(written), dtype=torch.uint8)
    dispatch_record, combine_record = recorder
    assert (dispatch_record.op, dispatch_record.epoch) == ("dispatch", 1)
    assert dispatch_record.rows_to_rank == (5, 6, 2)
    assert dispatch_record.rows_of_experts == (4, 9)
    assert combine_record.rows_of_experts == ()
    assert dispatch_record.wire_bytes_to_rank == (500, 0, 200)
    assert dispatch_record.wait_s_by_rank == (0.0, 0.0, 2e-6)
    assert dispatch_record.slowest_rank == 2 and dispatch_record.seconds == pytest.approx(3e-6)
    assert combine_record.wire_bytes == 0 and recorder.since(1)[0].op == "combine"
    assert recorder.since(2) == []


def test_after_an_error_or_the_end_nothing_is_left_behind(backend):
    routing = plan(backend)
    dispatch(backend, routing)
    backend.native.take()
    backend.abandon()
    assert backend.native.take() == [("wait", CURRENT, SIDE), ("wait", CURRENT, COMM)]
    in_flight = backend._streams._in_flight
    assert in_flight.start("another buffer's", COMM, 100) == [CURRENT]
    backend.destroy()
    assert backend.memory.free.called
    assert in_flight.start("another buffer's", SIDE, 100) == [COMM]


def test_outputs_may_be_freed_where_the_communication_stream_keeps_them(backend, monkeypatch):
    kept = []
    monkeypatch.setattr(backend, "keep_for_comm_stream", kept.append)
    monkeypatch.setattr(backend, "check_device", lambda *_: None)
    buffer = VirtualBuffer(backend, CONFIG)
    how = dict(async_finish=True, previous_event=EventOverlap(), allocate_on_comm_stream=True)
    out = buffer.dispatch(X, torch.zeros(10, 1, dtype=torch.int32), layout="rank", **how)
    assert kept.pop() == (out.recv_x, None, None, out.recv_topk_idx)
    combined = buffer.combine(out.recv_x, out.handle, **how).combined_x
    assert kept.pop() == (combined, None)
    buffer.combine(out.recv_x, out.handle, async_finish=True)
    assert not kept


def test_rows_that_are_not_on_the_buffers_gpu_are_refused(backend):
    buffer = VirtualBuffer(backend, CONFIG)
    handle = DispatchHandle(session=buffer._session, routing=plan(backend, capacity=40))
    rows = torch.zeros(handle.num_rows, 512, dtype=torch.bfloat16)
    backend.native.take()
    for call in (lambda: buffer.dispatch(X, TOPK), lambda: buffer.combine(rows, handle)):
        with pytest.raises(EPArgumentError, match="x is on cpu, the buffer on"):
            call()
    assert not backend.native.calls


def test_what_callers_say_of_an_operation_reaches_it(backend, monkeypatch):
    monkeypatch.setattr(backend, "check_device", lambda *_: None)
    monkeypatch.setattr(
        EventOverlap, "current_stream_wait", lambda self: backend.native.calls.append(("before",))
    )
    buffer = VirtualBuffer(backend, CONFIG)
    buffer.set_num_sms(48)
    how = dict(previous_event=EventOverlap())
    out = buffer.dispatch(X, TOPK, **how)
    before, planned, *calls = backend.native.take()
    assert before == ("before",) and planned[0] == "plan"
    push, expand = (call for call in calls if call[0] == "ep_dispatch")
    assert push[1].num_push_blocks + expand[1].num_expand_blocks == 48
    combined = buffer.combine(out.recv_x, out.handle, async_finish=True, **how)
    before, *_, launch = backend.native.take()
    assert before == ("before",) and launch[0] == "ep_combine"
    assert launch[1].num_blocks == 48 and launch[2] == COMM
    assert combined.event is out.handle.event


def test_the_backward_combine_is_in_flight_during_other_work(backend, monkeypatch):
    monkeypatch.setattr(backend, "check_device", lambda *_: None)
    buffer = VirtualBuffer(backend, CONFIG)
    meanwhile = []
    out = buffer.dispatch(
        X.clone().requires_grad_(),
        TOPK + torch.tensor([0, 1]),
        during_backward=lambda: meanwhile.extend(backend.native.take()),
    )
    backend.native.take()
    joined = SimpleNamespace(current_stream_wait=lambda: backend.native.calls.append(("joined",)))
    with mock.patch.object(backend._streams, "comm_event", lambda keep: joined):
        out.recv_x.sum().backward()
    assert [(call[0], call[-1]) for call in meanwhile] == [("wait", CURRENT), ("ep_combine", COMM)]
    assert backend.native.take() == [("joined",)]


def price(op: str, num_sms: int, lost_us: float) -> Price:
    return Price(
        op=op,
        layout="expert",
        num_ranks=2,
        num_bytes=10 * 1024,
        tiles=512,
        num_sms=num_sms,
        lost_us=lost_us,
        serial_us=200,
    )


def give_prices(backend: NVLinkBackend, *prices: Price) -> None:
    table = PriceTable(gpu="GPU", available_sms=132, source="a test", prices=prices)
    backend._chooser = Chooser(table, backend.num_ranks)


def test_asynchronous_operations_take_the_sms_of_the_best_price(backend):
    give_prices(
        backend, price("dispatch", 64, 170), price("dispatch", 24, 237), price("combine", 32, 158)
    )
    routing = plan(backend, asynchronous=True)
    received = dispatch(backend, routing, asynchronous=True).result
    first = [call[1] for call in backend.native.take() if call[0] == "ep_dispatch"]
    assert [args.num_blocks for args in first] == [64, 64]
    dispatch(backend, routing, asynchronous=True)
    assert backend.native.take()[-1][1].num_blocks == 64
    backend.combine(routing, CombineRequest(received.x, None, True))
    assert backend.native.take()[-1][1].num_blocks == 32
    backend.combine(routing, CombineRequest(received.x, None, False))
    assert backend.native.take()[-1][1].num_blocks == 132  # nothing is beside
    backend.set_overlapped(True)
    backend.combine(routing, CombineRequest(received.x, None, False))
    assert backend.native.take()[-1][1].num_blocks == 32
    backend.set_num_sms(20)
    backend.combine(routing, CombineRequest(received.x, None, True))
    assert backend.native.take()[-1][1].num_blocks == 20  # what the caller says counts


@pytest.mark.parametrize(("lost_us", "is_beside"), [(199, True), (201, False)])
def test_a_backward_combine_that_does_not_pay_runs_before_the_other_work(
    backend, monkeypatch, lost_us, is_beside
):
    monkeypatch.setattr(backend, "check_device", lambda *_: None)
    give_prices(backend, price("combine", 32, lost_us))
    buffer = VirtualBuffer(backend, CONFIG)
    launched = []
    out = buffer.dispatch(
        X.clone().requires_grad_(),
        TOPK + torch.tensor([0, 1]),
        during_backward=lambda: launched.extend(backend.native.take()),
    )
    backend.native.take()
    joined = SimpleNamespace(current_stream_wait=lambda: backend.native.calls.append(("joined",)))
    with mock.patch.object(backend._streams, "comm_event", lambda keep: joined):
        out.recv_x.sum().backward()
    combine = launched[-1]
    assert (combine[2], combine[1].num_blocks) == ((COMM, 32) if is_beside else (CURRENT, 132))
    assert backend.native.take() == ([("joined",)] if is_beside else [])
    loss = buffer.overlap_loss("combine", "expert", 10)
    assert (loss is None) == is_beside
    if not is_beside:
        assert loss == "it would cost the GEMMs beside it 201 µs, and takes 200 between them"
        buffer.set_num_sms(32)  # asked for, so it stays beside
        assert buffer.overlap_loss("combine", "expert", 10) is None


def test_the_gemm_beside_is_checked_and_handed_on(backend):
    buffer = VirtualBuffer(backend, CONFIG)
    buffer.set_gemm_tiles(64)
    assert backend._chooser.tiles == 64
    buffer.set_gemm_tiles(None)
    assert backend._chooser.tiles is None
    with pytest.raises(EPArgumentError, match="tiles must be a positive integer, got 0"):
        buffer.set_gemm_tiles(0)


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


def test_outputs_are_kept_for_the_communication_stream(backend):
    tensor = mock.Mock()
    backend.keep_for_comm_stream((tensor, None))
    tensor.record_stream.assert_called_once_with(backend._streams.comm)


@pytest.mark.parametrize("current", [CURRENT, 0], ids=["stream", "default"])
def test_reading_waits_for_every_stream_with_an_operation(backend, current, monkeypatch):
    waited = []

    def stream(handle, *_):
        return SimpleNamespace(synchronize=lambda: waited.append(handle))

    monkeypatch.setattr(nvlink_streams, "raw_stream", lambda _: current)
    monkeypatch.setattr(nvlink_streams, "ExternalStream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream("another"))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: stream("default"))
    routing = plan(backend)
    dispatch(backend, routing)  # before the caller goes on with another stream
    backend.combine(routing, CombineRequest(torch.zeros(9, 512, dtype=torch.bfloat16), None, True))
    backend.memory.check.reset_mock()
    backend.synchronize()
    assert backend.memory.check.called
    assert waited[0] == "another"
    assert set(waited[1:]) == {current or "default", COMM} and len(waited) == 3


# ---- Low latency -------------------------------------------------------------------------------

DECODING = dataclasses.replace(CONFIG, low_latency_tokens=16)
MAX_TOKENS = 12
NUM_PLACES = 4 * 2 * MAX_TOKENS  # local experts x ranks x tokens


SIZES = LowLatencySizes(
    num_tokens=10, num_topk=2, idx_bytes=8, max_tokens=MAX_TOKENS, scale_form=None,
    recv_shape=(4, 2 * MAX_TOKENS, 512), device=X.device,
)  # fmt: skip


def low_latency_dispatch(backend: NVLinkBackend, **changes):
    low_latency = backend.low_latency
    num_ints = NUM_PLACES + low_latency.num_kept_ints(MAX_TOKENS, 2)
    request = LowLatencyDispatchRequest(
        sizes=SIZES, x=X, topk_idx=TOPK, topk_weights=torch.ones(10, 2),
        recv_x=torch.empty(SIZES.recv_shape, dtype=torch.bfloat16),
        recv_scales=None, recv_src_info=torch.empty(num_ints, dtype=torch.int32),
        recv_count=torch.empty(4, dtype=torch.int32), recv_stats=None, wait_stats=None,
        is_split=True, asynchronous=False,
    )  # fmt: skip
    request = dataclasses.replace(request, **changes)
    return low_latency.dispatch(request), request


def low_latency_combine(backend: NVLinkBackend, routing, **changes):
    request = LowLatencyCombineRequest(
        x=torch.empty(SIZES.recv_shape, dtype=torch.bfloat16), topk_weights=None,
        out=torch.empty_like(X), wait_stats=None, is_split=True, asynchronous=False,
    )  # fmt: skip
    request = dataclasses.replace(request, **changes)
    return backend.low_latency.combine(routing, request), request


@pytest.mark.parametrize("backend", [DECODING], indirect=True)
def test_what_a_dispatch_leaves_stands_behind_the_sources_of_its_rows(backend):
    """All of it, nothing twice, and nothing behind the end; its combine looks for it there."""
    sent, request = low_latency_dispatch(backend)
    ((_, args, _),) = backend.native.take()
    ints = request.recv_src_info
    assert args.recv_src_info == ints.data_ptr()
    words = dict(
        epochs=2, num_tokens=header.EP_MAX_PEERS, num_rows=header.EP_MAX_PEERS,
        ranks=MAX_TOKENS, rows=2 * MAX_TOKENS * 2, weights=2 * MAX_TOKENS * 2,
    )  # fmt: skip
    at = ints.data_ptr() + 4 * NUM_PLACES
    for name, count in words.items():
        assert getattr(args.handle, name) == at, name
        at += 4 * count
    assert at == ints.data_ptr() + ints.nbytes and list(words) == [
        name for name, _ in header.LowLatencyHandle._fields_
    ]
    low_latency_dispatch(backend)  # another in between
    low_latency_combine(backend, sent.result)
    *_, (function, combined, _) = backend.native.take()
    assert function == "ep_low_latency_combine"
    assert bytes(combined.handle) == bytes(args.handle)
    assert combined.common.topk_idx == TOPK.data_ptr()


@pytest.mark.parametrize("backend", [DECODING], indirect=True)
def test_the_phases_of_low_latency_operations_are_launches_of_their_own(backend):
    sent, request = low_latency_dispatch(backend)
    other, _ = low_latency_dispatch(backend, recv_x=torch.empty(4, 2 * MAX_TOKENS, 512))
    sent.wait()
    send, _, receive = backend.native.take()
    assert send[0] == receive[0] == "ep_low_latency_dispatch" and send[2] == receive[2] == CURRENT
    assert [call[1].common.phases for call in (send, receive)] == [1, 2]
    assert send[1].recv_x == receive[1].recv_x == request.recv_x.data_ptr()
    assert send[1].common.peers.record == receive[1].common.peers.record
    combined, _ = low_latency_combine(backend, sent.result, is_split=False)
    combined.wait()
    ((_, whole, stream),) = backend.native.take()
    assert whole.common.phases == 3 and stream == CURRENT
    back, _ = low_latency_combine(backend, other.result, asynchronous=True, is_split=False)
    backend.native.take()
    assert back.event.args[0] is backend._streams.comm.record_event()


@pytest.mark.parametrize("backend", [DECODING], indirect=True)
def test_what_a_dispatch_leaves_is_kept_for_the_streams_that_use_it(backend, monkeypatch):
    another = object()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: another)
    with mock.patch.object(torch.Tensor, "record_stream") as record_stream:
        first, second = (low_latency_dispatch(backend)[0] for _ in range(2))
        first.wait()
        low_latency_combine(backend, first.result)[0].wait()
        assert not record_stream.called
        monkeypatch.setattr(nvlink_streams, "raw_stream", lambda _: 9)
        second.wait()
        back, _ = low_latency_combine(backend, second.result)
        back.wait()
        # Two tensors each: received, combined, and the sums received.
        assert record_stream.call_args_list == [mock.call(another)] * 6


@pytest.mark.parametrize("backend", [DECODING], indirect=True)
def test_operations_of_other_sizes_in_between_change_nothing_of_one_that_is_out(backend):
    few = SIZES._replace(num_tokens=3, num_topk=1, idx_bytes=4, max_tokens=5)
    few_topk = torch.zeros(3, 1, dtype=torch.int32)
    scales = torch.empty(4, 4, 8).transpose(1, 2)
    first, request = low_latency_dispatch(backend)
    other = dict(sizes=few._replace(scale_form=ScaleForm.FP32), topk_idx=few_topk)
    second, _ = low_latency_dispatch(backend, **other, topk_weights=None, recv_scales=scales)
    first.wait()
    second.wait()
    for _ in range(2):  # in the place of each of them
        low_latency_dispatch(backend, is_split=False)
    calls = [args for _, args, _ in backend.native.take()]
    sent, small, received, small_received, *again = calls
    for args in (sent, received, *again):
        common = args.common
        assert (common.num_tokens, common.num_topk, common.idx_bytes) == (10, 2, 8)
        assert (common.max_tokens, args.scale_stride) == (MAX_TOKENS, 0)
        assert args.format == header.EP_LOW_LATENCY_BF16 and common.has_weights
    for args in (small, small_received):
        common = args.common
        assert (common.num_tokens, common.num_topk, common.idx_bytes) == (3, 1, 4)
        assert (common.max_tokens, args.scale_stride) == (5, 8)
        assert args.format == header.EP_LOW_LATENCY_FP8 and not common.has_weights
        assert common.topk_idx == few_topk.data_ptr()
    assert received.recv_src_info == request.recv_src_info.data_ptr()
    assert bytes(sent.handle) == bytes(received.handle) != bytes(small.handle)
    for dispatched in (first, second, second, first):
        low_latency_combine(backend, dispatched.result, is_split=False)
    combined = [args for _, args, _ in backend.native.take()]
    for args, of in zip(combined, (sent, small, small, sent), strict=True):
        assert bytes(args.handle) == bytes(of.handle)
        for name in ("topk_idx", "idx_bytes", "num_tokens", "num_topk", "max_tokens"):
            assert getattr(args.common, name) == getattr(of.common, name)
