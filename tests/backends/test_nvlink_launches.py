"""What the NVLink backend launches, in which order and with which arguments; no GPU is needed."""

from __future__ import annotations

import ctypes
import math
from array import array
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from nvlink_launches import COMM, CONFIG, CURRENT, SIDE, TOPK, X, dispatch, plan
from virtual_ranks import VirtualBuffer

from ep_comm import EventOverlap, blank
from ep_comm._native import header
from ep_comm.backends.nodes.backend import NodesBackend
from ep_comm.backends.nodes.memory import NodesMemory
from ep_comm.backends.nvlink import backend as nvlink
from ep_comm.backends.nvlink import streams as nvlink_streams
from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.requests import CombineRequest, DispatchRequest
from ep_comm.errors import EPArgumentError, EPRoutingError, EPUnsupportedError
from ep_comm.handle import DispatchHandle
from ep_comm.telemetry.device import DeviceRecorder
from ep_comm.telemetry.records import RING_LENGTH
from ep_comm.topology import Spot


@pytest.mark.parametrize("kind", [NVLinkBackend, NodesBackend])
def test_what_a_buffer_begins_with_is_there_for_every_stream(kind, monkeypatch):
    calls = []

    class Backend(kind):
        def __init__(self, *_) -> None:
            calls.append("made")  # zeros on the current stream

    monkeypatch.setattr(nvlink._native, "load", mock.Mock())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 2)
    monkeypatch.setattr(nvlink.PeerMemory, "of_group", mock.Mock())
    monkeypatch.setattr(NodesMemory, "of_one_host", mock.Mock())
    stream = SimpleNamespace(synchronize=lambda: calls.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    spots = [Spot("host", (0,)), Spot("host", (1,))]
    Backend.create(None, CONFIG, None, spots)
    assert calls == ["made", "waited"]


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


@pytest.mark.parametrize("is_captured", [True, False])
def test_counts_of_a_captured_plan_are_those_of_the_last_replay(backend, is_captured):
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: is_captured):
        routing = plan(backend, capacity=40)
        dispatch(backend, routing)
    routing.wait_for_kernels = mock.Mock()
    for tokens in (3, 5):
        routing.array("expert_tokens").fill_(tokens)
        expected = tokens if is_captured else 3
        assert routing.sizes.expert_rows == (expected,) * 4
    assert routing.wait_for_kernels.call_count == (2 if is_captured else 1)


def test_counts_cannot_be_read_while_a_graph_is_captured(backend):
    routing = plan(backend, capacity=40)
    dispatch(backend, routing)
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
        pytest.raises(EPUnsupportedError, match="cannot hold a wait of the host"),
    ):
        _ = routing.sizes


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
    started = [(each.op, each.rows_of_experts) for each in backend.recorder._started(0)]
    of_dispatch = "dispatch", (9, 0, 0, 0)
    assert started == [of_dispatch, of_dispatch, ("combine", ())]


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


@pytest.fixture(params=["filled", "allocated"])
def in_order(request, monkeypatch):
    """Outputs that torch fills, or CUDA allocates, in the order of the current stream."""
    monkeypatch.setattr(blank, "_in_order", request.param == "allocated")
    torch.use_deterministic_algorithms(request.param == "filled")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("capacity", [None, 40])
def test_outputs_are_there_before_their_rows(backend, in_order, capacity, asynchronous):
    calls, stream = backend.native.calls, COMM if asynchronous else CURRENT
    allocate = torch.empty

    def empty(*args, **kwargs):
        calls.append(("empty", args))
        return allocate(*args, **kwargs)

    with mock.patch.object(torch, "empty", empty):
        dispatch(backend, plan(backend, capacity, asynchronous), asynchronous)
    behind = {CURRENT}  # the streams that are behind the last memory
    for call in calls:
        if call[0] == "empty":
            behind = {CURRENT}
        elif call[0] == "wait" and call[2] in behind:
            behind.add(call[1])
        elif call[0] == "plan":
            assert call[2] in behind  # its second kernel follows the first one
        elif call[0] == "ep_dispatch" and call[1].num_expand_blocks:
            assert call[2] in behind
    assert stream in behind


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


def test_records_are_what_the_kernels_wrote():
    recorder = DeviceRecorder(1, 3, torch.device("cpu"), lambda: None)
    first, second = recorder.start(header.EP_OP_DISPATCH), recorder.start(header.EP_OP_COMBINE)
    recorder.complete(100, bytes(array("i", (4, 9))), 1)
    note = header.Call.from_address(second + recorder.addresses.call_offset)
    note.called_ns, note.row_bytes = 2_500_000_000, 7  # as the library does
    assert second - first == ctypes.sizeof(header.Record)
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
    assert math.isnan(dispatch_record.called_s) and combine_record.called_s == 2.5
    assert combine_record.wire_bytes == 0 and recorder.since(1)[0].op == "combine"
    assert recorder.since(2) == []


def test_of_a_launch_that_was_refused_no_older_call_is_told():
    recorder = DeviceRecorder(0, 2, torch.device("cpu"), lambda: None)
    offset = recorder.addresses.call_offset
    for number in range(1, RING_LENGTH + 1):
        call = header.Call.from_address(recorder.start(header.EP_OP_COMBINE) + offset)
        call.called_ns = number * 10**9
    recorder.start(header.EP_OP_DISPATCH)  # where the first one stood
    before, refused = recorder.since(RING_LENGTH - 1)
    assert (before.op, before.called_s) == ("combine", RING_LENGTH)
    assert refused.op == "dispatch" and math.isnan(refused.called_s)
    (alone,) = recorder.since(RING_LENGTH)
    assert math.isnan(alone.called_s)
    assert [record.called_s for record in recorder][:2] == [2.0, 3.0]


@pytest.mark.parametrize("is_backward", [False, True])
def test_a_record_tells_nothing_of_the_one_that_stood_there(is_backward):
    recorder = DeviceRecorder(0, 2, torch.device("cpu"), lambda: None)
    kinds = {
        header.EP_OP_DISPATCH: "dispatch",
        header.EP_OP_COMBINE: "combine",
        header.EP_OP_LOW_LATENCY_DISPATCH: "low_latency_dispatch",
        header.EP_OP_LOW_LATENCY_COMBINE: "low_latency_combine",
    }
    recorder.is_backward = not is_backward
    for _ in range(RING_LENGTH):
        recorder.start(header.EP_OP_DISPATCH, bytes(array("i", (1, 2))))
    recorder.is_backward = is_backward
    for op in kinds:
        recorder.start(op)
    recorder.start(header.EP_OP_DISPATCH, bytes(array("i", (3, 0))))
    recorder.complete(10, bytes(array("i", (5, 6))), 1)  # so late that another one stands there
    found = recorder.since(RING_LENGTH)
    assert [record.op for record in found] == [*kinds.values(), "dispatch"]
    assert {record.is_backward for record in found} == {is_backward}
    assert [record.rows_of_experts for record in found] == [(), (), (), (), (3, 0)]
    before = recorder.since(RING_LENGTH - 1)[0]
    assert before.is_backward is not is_backward and before.rows_of_experts == (1, 2)


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
    stream = SimpleNamespace(wait_event=lambda event: backend.native.calls.append((event,)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    buffer = VirtualBuffer(backend, CONFIG)
    buffer.set_num_sms(48)
    kept, event = (X,), mock.Mock()
    how = dict(previous_event=EventOverlap(event, kept))
    out = buffer.dispatch(X, TOPK, **how)
    before, planned, *calls = backend.native.take()
    assert before == (event,) and planned[0] == "plan"
    push, expand = (call for call in calls if call[0] == "ep_dispatch")
    assert push[1].num_push_blocks + expand[1].num_expand_blocks == 48
    combined = buffer.combine(out.recv_x, out.handle, async_finish=True, **how)
    before, *_, launch = backend.native.take()
    assert before == (event,) and launch[0] == "ep_combine"
    assert launch[1].num_blocks == 48 and launch[2] == COMM
    assert combined.event is out.handle.event
    # The event is another operation's, whose inputs may belong to another stream.
    assert how["previous_event"].extra_tensors is kept


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("alignment", [1, 16])
def test_rows_that_are_allocated_are_those_of_the_sizes(backend, layout, alignment):
    mailbox = backend.memory.mailbox
    mailbox.num_recv_tokens[:2] = 3, 14
    mailbox.num_tokens_per_expert[:4] = 9, 0, 16, 1
    routing = plan(backend, layout=layout, expert_alignment=alignment)
    received = dispatch(backend, routing).result
    *_, joined = (call for call in backend.native.take() if call[0] == "ep_dispatch")
    rows = {"rank": 17, "expert": 26 if alignment == 1 else 48}[layout]
    assert len(received.x) == routing.num_rows == joined[1].num_rows == rows
    assert routing.sizes.num_rows(layout) == rows and joined[1].num_received == 17


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
