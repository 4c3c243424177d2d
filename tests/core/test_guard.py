"""What an error during an operation does to the buffer."""

from __future__ import annotations

import copy
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from virtual_ranks import VirtualBuffer

from ep_comm import Buffer, EPConfig
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
        recorder=SimpleNamespace(),
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
    with pytest.raises(type(error)), buffer._session.operation() as backend:
        backend.num_started += started
        raise error
    assert buffer.is_usable == usable
    assert backend.abandon.called == (started or has_failed)
    assert backend.give_up.called == (not usable)  # then other ranks may not know
    if not usable:
        with pytest.raises(EPStateError, match="an earlier operation failed: "):
            buffer._session.operation()


def test_what_is_left_behind_is_abandoned_even_if_that_fails():
    buffer = make_buffer()
    buffer._session.backend.abandon.side_effect = RuntimeError("the GPU is gone")
    with pytest.raises(RuntimeError, match="gone"), buffer._session.operation() as backend:
        backend.num_started += 1
        raise TimeoutError
    assert not buffer.is_usable


def test_an_interrupt_while_others_are_asked_leaves_nothing_half_done():
    buffer = make_buffer()
    session, backend = buffer._session, buffer._session.backend
    session._blame = mock.Mock(trace=mock.Mock(side_effect=KeyboardInterrupt("again")))
    with pytest.raises(KeyboardInterrupt, match="again"), session.operation():
        backend.num_started += 1
        raise KeyboardInterrupt("once")
    assert not buffer.is_usable and backend.give_up.called and backend.abandon.called


def test_waiting_for_operations_raises_what_ended_them():
    buffer = make_buffer(has_failed=True)
    buffer._session.backend.synchronize = mock.Mock(side_effect=EPTimeoutError(**LATE))
    with pytest.raises(EPTimeoutError):
        buffer.synchronize()
    with pytest.raises(EPStateError, match="waited 2 s for rank 1"):
        buffer.synchronize()


def test_an_operation_without_an_error():
    buffer = make_buffer()
    with buffer._session.operation() as backend:
        backend.num_started += 1
    assert buffer.is_usable and not backend.abandon.called


def test_one_thread_at_a_time():
    buffer = make_buffer()
    with buffer._session.operation(), buffer._session.operation():  # as an op inside of a call does
        with ThreadPoolExecutor(1) as pool, pytest.raises(EPStateError, match="another thread"):
            pool.submit(buffer._session.operation().__enter__).result()
    backward = buffer._session.operation(is_backward=True)
    with backward as backend, ThreadPoolExecutor(1) as pool:
        assert pool.submit(buffer._session.operation().__enter__).exception()
        assert backend.recorder.is_backward  # what is refused leaves no trace
    with ThreadPoolExecutor(1) as pool:  # as autograd does, when the caller waits
        pool.submit(lambda: buffer._session.operation().__enter__()).result()
    assert buffer.is_usable


def test_a_fork_has_no_buffer(monkeypatch):
    buffer = make_buffer()
    monkeypatch.setattr("ep_comm.session._process", -5)
    with pytest.raises(
        EPStateError, match=r"belongs to process \d+, of which this one \(-5\) is a"
    ):
        buffer._session.operation()
    monkeypatch.undo()
    assert buffer._session.operation() and buffer.is_usable


X, TOPK = torch.ones(4, 8), torch.tensor([[0, 2], [1, 3], [2, 1], [3, 0]])


def work_in_a_fork(rank: int) -> None:
    """The child is told; the buffer of the others lives."""
    sizes = dict(num_experts=4, hidden=8, max_tokens_per_rank=8, num_topk=2, dtype=torch.float32)
    buffer = Buffer(None, EPConfig(**sizes, timeout_s=10))
    if rank == 0:
        child = os.fork()
        if not child:
            try:
                buffer.dispatch(X, TOPK)
            except EPStateError:
                os._exit(17)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    out = buffer.dispatch(X, TOPK)
    for handle in (copy.copy(out.handle), copy.deepcopy(out.handle)):
        assert handle is out.handle
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(out.handle)
    assert torch.equal(buffer.combine(out.recv_x, out.handle).combined_x, 2 * X)


def test_a_fork_is_told_and_a_handle_is_not_copied():
    run_ranks(2, work_in_a_fork, fresh=True)


def use_the_fake_backend(_: int) -> str:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    with pytest.raises(EPArgumentError) as caught:
        Buffer(None, CONFIG)
    return str(caught.value)


def test_the_fake_backend_is_refused():
    (message,) = run_ranks(1, use_the_fake_backend, fresh=True)
    assert message == 'the group has torch\'s backend "fake", which moves no data'


def use_as_a_context(rank: int) -> None:
    config = EPConfig(num_experts=4, hidden=8, max_tokens_per_rank=8, num_topk=2, timeout_s=10)
    with Buffer(None, config) as buffer:
        assert repr(buffer) == (
            f"Buffer(rank {rank} of 2, reference over gloo, 4 experts, at most 8 tokens of 8 "
            "bfloat16 a rank)"
        )
    assert not buffer.is_usable and "unusable: it was destroyed" in repr(buffer)
    with pytest.raises(KeyError), Buffer(None, config) as buffer:
        with mock.patch.object(buffer._session.backend, "give_up") as give_up:
            buffer.__exit__(KeyError, KeyError(), None)
            give_up.assert_called_once()
        raise KeyError
    assert not buffer.is_usable


def test_a_buffer_as_a_context():
    run_ranks(2, use_as_a_context)
