"""What an error during an operation does to the buffer."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
from virtual_ranks import VirtualBuffer

from ep_comm import EPConfig
from ep_comm.errors import (
    EPArgumentError,
    EPOverflowError,
    EPRoutingError,
    EPStateError,
    EPTimeoutError,
    EPUnsupportedError,
)

CONFIG = EPConfig(num_experts=8, hidden=32, max_tokens_per_rank=16, num_topk=2)
LATE = dict(op="combine", phase="rows", rank=0, late_ranks=(1,), epoch=3, timeout_s=2.0)


def make_buffer(has_failed: bool = False) -> VirtualBuffer:
    backend = SimpleNamespace(
        rank=0, num_ranks=1, num_local_experts=8,
        num_started=3, has_failed=has_failed, abandon=mock.Mock(), give_up=mock.Mock(),
    )  # fmt: skip
    return VirtualBuffer(backend, CONFIG)


@pytest.mark.parametrize(
    ("error", "started", "has_failed", "usable"),
    [
        (EPArgumentError("why"), False, False, True),
        (EPArgumentError("why"), True, False, False),  # others may wait for what did not follow
        (EPUnsupportedError("why"), False, False, True),
        (EPRoutingError("why"), True, False, True),  # the others got all that they wait for
        (EPRoutingError("why"), True, True, False),
        (EPOverflowError(20, 10), False, False, True),
        (EPTimeoutError(**LATE), False, True, False),  # of an operation before, found by this one
        (MemoryError("why"), True, False, False),
        (KeyboardInterrupt("why"), False, False, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_an_error_in_an_operation(error, started, has_failed, usable):
    buffer = make_buffer(has_failed)
    with pytest.raises(type(error)), buffer.guard() as backend:
        backend.num_started += started
        raise error
    assert buffer.is_usable == usable
    assert backend.abandon.called == (started or has_failed)
    assert backend.give_up.called == (not usable)  # then other ranks may not know
    if not usable:
        with pytest.raises(EPStateError, match="an earlier operation failed: "):
            buffer.guard()


def test_what_is_left_behind_is_abandoned_even_if_that_fails():
    buffer = make_buffer()
    buffer._backend.abandon.side_effect = RuntimeError("the GPU is gone")
    with pytest.raises(RuntimeError, match="gone"), buffer.guard() as backend:
        backend.num_started += 1
        raise TimeoutError
    assert not buffer.is_usable


def test_waiting_for_operations_raises_what_ended_them():
    buffer = make_buffer(has_failed=True)
    buffer._backend.synchronize = mock.Mock(side_effect=EPTimeoutError(**LATE))
    with pytest.raises(EPTimeoutError):
        buffer.synchronize()
    with pytest.raises(EPStateError, match="waited 2 s for rank 1"):
        buffer.synchronize()


def test_an_operation_without_an_error():
    buffer = make_buffer()
    with buffer.guard() as backend:
        backend.num_started += 1
    assert buffer.is_usable and not backend.abandon.called
