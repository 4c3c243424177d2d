"""A buffer is not alone on its process group: other buffers, and the user's own messages."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from virtual_ranks import run_virtual_ranks

from ep_comm import Buffer, EPConfig, EPError, EPMismatchError, EPTimeoutError
from ep_comm.backends.reference import backend as reference
from ep_comm.backends.reference.messages import Operation

SIZES = dict(num_experts=4, hidden=8, max_tokens_per_rank=8, num_topk=2, dtype=torch.float32)
TOPK = torch.tensor([[0, 2], [1, 3], [2, 1], [3, 0]])


def make_buffer(timeout_s: float = 5, group=None, **changes) -> Buffer:
    return Buffer(group, EPConfig(**{**SIZES, **changes}, timeout_s=timeout_s))


def works(buffer: Buffer, value: float = 3.0, device: str = "cpu") -> bool:
    x = torch.full((4, 8), value, device=device)
    out = buffer.dispatch(x, TOPK.to(device))
    rows = out.recv_x[out.recv_x.abs().sum(1) > 0]
    combined = buffer.combine(out.recv_x, out.handle).combined_x
    return bool((rows == value).all()) and torch.equal(combined, 2 * x)


def use_in_another_order(rank: int, device: str) -> str:
    first, second = make_buffer(), make_buffer()
    start = time.monotonic()
    with pytest.raises(EPMismatchError) as caught:
        for buffer in (second, first) if rank else (first, second):
            works(buffer, device=device)
    assert time.monotonic() - start < 10
    return str(caught.value)


def test_two_buffers_used_in_another_order():
    for rank, message in enumerate(run_ranks(2, use_in_another_order, "cpu", fresh=True)):
        assert f"rank {rank} has buffer={rank + 1}" in message
        assert f"rank {1 - rank} has buffer={2 - rank}" in message


@pytest.mark.multi_gpu
def test_two_reference_buffers_used_in_another_order_over_nccl():
    messages = run_ranks(2, use_in_another_order_on_reference, fresh=True, backend="nccl")
    for rank, message in enumerate(messages):
        assert f"rank {rank} has buffer={rank + 1}" in message


def use_in_another_order_on_reference(rank: int) -> str:
    first, second = (make_buffer(backend="reference") for _ in range(2))
    with pytest.raises(EPMismatchError) as caught:
        for buffer in (second, first) if rank else (first, second):
            works(buffer, device="cuda")
    return str(caught.value)


@pytest.mark.multi_gpu
def test_two_nvlink_buffers_used_in_another_order():
    run_ranks(2, use_nvlink_in_another_order, fresh=True, backend="nccl")


def use_nvlink_in_another_order(rank: int) -> None:
    """Each has memory of its own: nobody comes, and that is said in time."""
    first, second = (make_buffer(2, backend="nvlink") for _ in range(2))
    with pytest.raises(EPTimeoutError, match=f"for rank {1 - rank}"):
        for buffer in (second, first) if rank else (first, second):
            assert works(buffer, device="cuda")


def two_buffers_in_turn(rank: int, buffer: Buffer) -> None:
    for value in (1.0, 1000.0, 2.0):
        assert works(buffer, value, "cuda")


@pytest.mark.gpu
def test_rows_of_virtual_ranks_are_their_own():
    run_virtual_ranks(2, two_buffers_in_turn, EPConfig(**SIZES))


def own_messages(rank: int, what: str) -> None:
    """What the user sends arrives where the user receives it, and so does what a buffer sends."""
    buffer = make_buffer()
    kind = torch.int64 if what == "like a header" else torch.float32
    sent = torch.arange(16 if what == "like a header" else 1000).to(kind) + 5
    got = torch.zeros_like(sent)
    if what == "sent before":
        pending = dist.isend(sent, 1) if rank == 0 else None
        assert works(buffer)
        if rank == 1:
            dist.recv(got, 0)
    else:
        pending = dist.irecv(got, 0) if rank == 1 else None
        assert works(buffer)
        if rank == 0:
            dist.send(sent, 1)
    if pending is not None:
        pending.wait()
    assert rank == 0 or torch.equal(got, sent)
    assert works(buffer)


@pytest.mark.parametrize("what", ["sent before", "received before", "like a header"])
def test_messages_of_the_user_in_flight(what):
    run_ranks(2, own_messages, what, fresh=True)


def foreign_header(rank: int) -> str | None:
    """Whatever comes instead of a header ends in an error that says so."""
    buffer = make_buffer()
    if rank == 1:
        tag = Operation("plan", 1, 1).tag("header")
        receiving = dist.irecv(torch.empty(1, 16, dtype=torch.int64), 0, tag=tag)
        sending = dist.isend(torch.full((1, 16), 77), 0, tag=tag)
        receiving.wait()
        sending.wait()
        return None
    with pytest.raises(EPMismatchError) as caught:
        works(buffer)
    return str(caught.value)


def test_other_data_instead_of_a_header():
    message, _ = run_ranks(2, foreign_header, fresh=True)
    assert "expected the header of a plan from rank 1, and got other data" in message
    assert "0x4d" in message


def wrong_numbers(rank: int, what: str) -> str:
    """What a peer says is checked before it is used as a length or an index."""
    buffer = make_buffer(2)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1 and what == "rows":
            exchange = buffer._session.backend._exchange_headers
            patch.setattr(
                buffer._session.backend,
                "_exchange_headers",
                lambda record, rows, **fields: exchange(record, [-3] * len(rows), **fields),
            )
        elif rank == 1:
            layout_of = reference.layout_of

            def shifted(*args):
                layout = layout_of(*args)
                return layout._replace(topk_idx=layout.topk_idx + 2)  # as of another rank count

            patch.setattr(reference, "layout_of", shifted)
            patch.setattr(buffer._session.backend, "_owner", lambda idx: (idx - 2) // 2)
            patch.setattr(buffer._session.backend, "num_local_experts", 100)
        with pytest.raises(EPError) as caught:
            works(buffer)
    return str(caught.value)


def test_wrong_numbers_of_a_peer_are_refused():
    message = run_ranks(2, wrong_numbers, "rows", fresh=True)[0]
    assert "rank 1 announces -3 rows" in message
    message = run_ranks(2, wrong_numbers, "experts", fresh=True)[0]
    assert "rank 0 received tokens for local expert" in message and "has 2" in message


class Wrapped(dist.ProcessGroup):
    """A group that some frameworks destroy between phases and make anew, behind the same object."""

    def __init__(self, inner: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(inner), dist.get_world_size(inner))
        self.inner = inner


# What such frameworks replace in torch.distributed, to put the inner group in.
UNWRAPPED = """get_rank get_world_size get_backend get_process_group_ranks all_to_all_single isend
irecv""".split()


def reload_the_group(rank: int) -> None:
    def unwrapping(function):
        def call(*args, **kwargs):
            unwrap = lambda value: value.inner if isinstance(value, Wrapped) else value  # noqa: E731
            return function(*map(unwrap, args), **{k: unwrap(v) for k, v in kwargs.items()})

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in UNWRAPPED:
            patch.setattr(dist, name, unwrapping(getattr(dist, name)))
        group = Wrapped(dist.new_group([0, 1]))
        buffer = make_buffer(group=group)
        assert works(buffer)
        dist.destroy_process_group(group.inner)
        group.inner = dist.new_group([0, 1])
        assert works(buffer)
        assert works(make_buffer(group=group))


def test_a_wrapped_group_that_is_made_anew():
    run_ranks(2, reload_the_group, fresh=True)


def reload_the_group_of_gpus(rank: int) -> None:
    """Over NVLink the group is needed to make the buffer, and not afterwards."""
    group = dist.new_group([0, 1])
    buffer = make_buffer(group=group, backend="nvlink")
    assert works(buffer, device="cuda")
    dist.destroy_process_group(group)
    assert works(buffer, device="cuda")
    buffer.destroy()


@pytest.mark.multi_gpu
def test_a_group_of_gpus_that_is_gone():
    run_ranks(2, reload_the_group_of_gpus, fresh=True, backend="nccl")


def test_tags_do_not_meet():
    """Of headers all have one, the rest by buffer, operation and phase; none is a user's 0."""
    one = Operation("plan", 1, 1)
    assert one.tag("header") == one._replace(buffer=2, epoch=7).tag("header") > 2**29
    tags = {
        operation.tag(phase)
        for operation in (one, one._replace(buffer=2), one._replace(epoch=2))
        for phase in ("header", "routing", "rows", "weights")
    }
    assert len(tags) == 10 and max(tags) < 2**31
