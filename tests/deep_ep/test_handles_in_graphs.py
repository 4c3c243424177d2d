"""What is read of DeepEP's handles where a CUDA graph is captured, or was; no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

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
            recv_src_info=torch.zeros(2, 8, dtype=torch.int32),
        )

    def replay(self) -> None:
        self.topk_idx += 1
        self.device_tokens_per_rank += 1
        self.device_tokens_per_expert += 1
        self.num_recv_tokens_per_rank = (2, 3)
        self.recv_src_info += 1


def elastic(native: Any) -> EPHandle:
    return EPHandle(
        native, BUFFER, torch.zeros(3, 2), do_expand=False, do_handle_copy=True,
        expert_alignment=1, num_max_tokens_per_rank=4, num_sms=0, counts=[],
    )  # fmt: skip


def of_elastic(name: str) -> Callable[[Any], Callable[[], torch.Tensor]]:
    def make(native: Any) -> Callable[[], torch.Tensor]:
        handle = elastic(native)
        return lambda: getattr(handle, name)

    return make


def prefix_matrix(native: Any) -> Callable[[], torch.Tensor]:
    handle = NormalHandle(native, BUFFER, None)
    return lambda: handle[0]


def source_tokens(native: Any) -> Callable[[], torch.Tensor]:
    handle = LowLatencyHandleTuple(native, BUFFER, ints(1, 0))
    return lambda: handle[0]


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
