"""What streams wait for, and the copy of a tensor for the host."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from unittest import mock

import pytest
import torch

from ep_comm.events import EventOverlap, HostCopy, is_captured


def test_inputs_are_kept_until_their_own_stream_has_waited(monkeypatch):
    stream, event, inputs = mock.Mock(), mock.Mock(), (torch.ones(1),)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    overlap = EventOverlap(event, inputs)
    overlap.order_current_stream()
    assert overlap.extra_tensors is inputs
    overlap.current_stream_wait()
    assert overlap.extra_tensors is None
    assert stream.method_calls == [mock.call.wait_event(event)] * 2


@pytest.mark.parametrize(("stream", "asked"), [(0, 0), (7, 1)], ids=["default", "another"])
def test_cuda_is_not_asked_whether_the_default_stream_is_captured(stream, asked, monkeypatch):
    """While another thread captures on a stream of its own the question would void that graph."""
    ask = mock.Mock(return_value=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", ask)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3, raising=False)
    raw_stream = {3: stream}.__getitem__
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", raw_stream, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not is_captured() and not ask.called
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert is_captured() == bool(asked) and ask.call_count == asked


def captured() -> bool:
    raise RuntimeError("operation not permitted on an event last recorded in a capturing stream")


def captured_elsewhere() -> bool:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("ended", [lambda: True, captured], ids=["ended", "captured"])
@pytest.mark.parametrize("not_yet", [lambda: False, captured_elsewhere], ids=["runs", "refused"])
def test_inputs_of_what_nobody_waits_for_are_kept_until_it_ends(not_yet, ended):
    inputs = torch.ones(1)
    is_there = weakref.ref(inputs)
    answers = iter([not_yet, ended])
    event = mock.Mock(query=lambda: next(answers)())
    EventOverlap(event, (inputs,))  # dropped at once
    del inputs
    assert is_there() is not None
    EventOverlap()
    assert is_there() is not None
    EventOverlap()
    assert is_there() is None


def test_what_is_kept_stays_so_where_two_threads_look_at_once():
    ended, others = mock.Mock(), [mock.Mock() for _ in range(3)]
    inputs = [torch.ones(1) for _ in others]
    are_there = [weakref.ref(each) for each in inputs]

    def another_thread_looks() -> bool:
        ended.query.side_effect = [True]
        thread = threading.Thread(target=EventOverlap)
        thread.start()
        thread.join()
        return True

    for event in (ended, *others):
        event.query.return_value = False
    EventOverlap(ended, (torch.ones(1),))
    for event in others:
        EventOverlap(event, (inputs.pop(),))
    ended.query.side_effect = another_thread_looks
    EventOverlap()
    assert all(each() is not None for each in are_there)
    for event in others:
        event.query.return_value = True
    EventOverlap()
    assert all(each() is None for each in are_there)


def test_one_that_could_not_be_made_says_nothing_when_it_goes(monkeypatch):
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(TypeError):
        EventOverlap(None, None, None)
    gc.collect()
    assert not said


def test_what_was_waited_for_is_not_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    inputs = torch.ones(1)
    is_there = weakref.ref(inputs)
    EventOverlap(mock.Mock(), (inputs,)).current_stream_wait()
    del inputs
    assert is_there() is None


def test_a_copy_for_the_host_is_what_was_there():
    tensor = torch.arange(6).view(2, 3)
    copy = HostCopy(tensor)
    tensor.zero_()
    assert copy.is_there and copy.wait() is copy.host
    assert copy.host.tolist() == [[0, 1, 2], [3, 4, 5]]
