"""What is read of DeepEP's handles in CUDA graphs and on other streams; no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from ep_comm import events
from ep_comm.deep_ep import EPHandle
from ep_comm.deep_ep.handles import LowLatencyHandleTuple, NormalHandle
from ep_comm.events import EventOverlap


class Capture:
    """Whether the current stream is captured, as torch says it."""

    is_going_on = False


@pytest.fixture
def capture(monkeypatch) -> Capture:
    now = Capture()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.is_going_on)
    monkeypatch.setattr(events, "_is_default_stream", lambda: False)
    return now


BUFFER: Any = SimpleNamespace(
    native=SimpleNamespace(rank=0, num_ranks=2, config=SimpleNamespace(num_experts=4, hidden=256))
)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Native(SimpleNamespace):
    """Stands for a dispatch's handle, whose counts `replay` changes."""

    def __init__(self, event: EventOverlap | None = None) -> None:
        super().__init__(
            event=event or EventOverlap(),
            topk_idx=torch.zeros(3, 2, dtype=torch.int32),
            device_tokens_per_rank=ints(1, 2),
            device_tokens_per_expert=ints(3, 0),
            num_recv_tokens_per_rank=(1, 2),
            max_tokens=4,
            device_expert_offsets=ints(0, 3, 3),
            recv_src_info=torch.zeros(2, 8, dtype=torch.int32),
            recv_count=ints(1, 0),
        )

    def replay(self) -> None:
        self.topk_idx += 1
        self.device_tokens_per_rank += 1
        self.device_tokens_per_expert += 1
        self.num_recv_tokens_per_rank = (2, 3)
        self.recv_src_info += 1


def elastic(native: Any, do_expand: bool = False) -> EPHandle:
    return EPHandle(
        native, BUFFER, torch.zeros(3, 2), do_expand=do_expand, do_handle_copy=True,
        expert_alignment=1, num_max_tokens_per_rank=4, num_sms=0, counts=[],
    )  # fmt: skip


def of_elastic(name: str, do_expand: bool = False) -> Callable[[Any], Callable[[], torch.Tensor]]:
    def make(native: Any) -> Callable[[], torch.Tensor]:
        handle = elastic(native, do_expand)
        return lambda: getattr(handle, name)

    return make


def prefix_matrix(native: Any) -> Callable[[], torch.Tensor]:
    handle = NormalHandle(native, BUFFER, None)
    return lambda: handle[0]


def source_tokens(native: Any) -> Callable[[], torch.Tensor]:
    handle = LowLatencyHandleTuple(native, BUFFER, native.recv_count)
    return lambda: handle[0]


ends_of_groups = of_elastic("psum_num_recv_tokens_per_expert", do_expand=True)
READ = [
    of_elastic("topk_idx"),
    of_elastic("psum_num_recv_tokens_per_scaleup_rank"),
    of_elastic("psum_num_recv_tokens_per_expert"),
    prefix_matrix,
    source_tokens,
]
each = pytest.mark.parametrize("make", READ, ids=["topk", "ranks", "experts", "matrix", "sources"])


@each
def test_outside_of_its_graph_a_handle_has_what_the_last_replay_found(make, capture):
    native = Native()
    capture.is_going_on = True
    read = make(native)
    capture.is_going_on = False
    before = read().clone()
    native.replay()
    assert not torch.equal(read(), before)


@each
def test_what_is_read_in_the_graph_of_the_dispatch_is_part_of_it(make, capture):
    capture.is_going_on = True
    read = make(Native())
    in_graph = read()
    capture.is_going_on = False
    assert read() is in_graph


@each
def test_a_graph_leaves_nothing_in_a_handle_of_before(make, capture):
    """What it makes is not there before it is replayed."""
    read = make(Native())
    capture.is_going_on = True
    in_graph = read()
    capture.is_going_on = False
    assert read() is not in_graph and read() is read()
    capture.is_going_on = True
    assert read() is not in_graph


@pytest.mark.parametrize("of_graph", [False, True])
@pytest.mark.parametrize("in_graph", [False, True])
def test_the_end_of_a_dispatch_is_waited_for_where_it_was_recorded(
    capture, monkeypatch, of_graph, in_graph
):
    """CUDA refuses to wait for it in a graph of a later time, and outside of its own."""
    stream, event = mock.Mock(), mock.Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    native = Native(EventOverlap(event))
    capture.is_going_on = of_graph
    handle = elastic(native)
    native.event = EventOverlap(mock.Mock())  # of a combine
    capture.is_going_on = in_graph
    assert handle.psum_num_recv_tokens_per_expert.tolist() == [3, 3]
    waits = [mock.call.wait_event(event)] if of_graph == in_graph else []
    assert stream.method_calls == waits


def test_help_is_there_for_what_is_made_later():
    assert EPHandle.topk_idx.__doc__.startswith("[T, K], the experts")


# ---- On another stream --------------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """Says that it is on a GPU, and notes the streams that its memory is kept for."""

    is_cuda = True

    def record_stream(self, stream: object) -> None:
        streams[self.data_ptr()] = stream


streams: dict[int, object] = {}


@pytest.mark.parametrize(
    ("make", "reads"),
    [
        (of_elastic("topk_idx"), ["topk_idx"]),
        (of_elastic("psum_num_recv_tokens_per_scaleup_rank"), ["device_tokens_per_rank"]),
        (of_elastic("psum_num_recv_tokens_per_expert"), ["device_tokens_per_expert"]),
        (ends_of_groups, ["device_tokens_per_expert", "device_expert_offsets"]),
        (source_tokens, ["recv_src_info", "recv_count"]),
    ],
    ids=["topk", "ranks", "experts", "groups", "sources"],
)
def test_memory_of_a_dispatch_is_kept_for_the_stream_that_reads_it(monkeypatch, make, reads):
    """The allocator would else give it to the dispatch's own stream as soon as nobody holds it."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: "another")
    streams.clear()
    native = Native()
    for name, value in vars(native).items():
        if isinstance(value, torch.Tensor):
            setattr(native, name, value.as_subclass(OnGpu))
    make(native)()
    assert streams == {getattr(native, name).data_ptr(): "another" for name in reads}


@pytest.mark.parametrize("make", [NormalHandle, LowLatencyHandleTuple])
def test_a_handle_is_a_tuple_that_equals_itself_alone(make):
    """What it is made of, tensors among it, is not compared."""
    native, tensor = Native(), torch.arange(4)
    one, other = make(native, BUFFER, tensor), make(native, BUFFER, tensor)
    assert isinstance(one, tuple) and len(one) == (6 if make is NormalHandle else 5)
    assert one == one and not one != one and one != other and not one == other
    assert {one: 1, other: 2} == {other: 2, one: 1}
