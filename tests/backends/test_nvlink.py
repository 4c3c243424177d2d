"""What only the NVLink backend has: operations at once, SM budgets, records written by kernels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ep_comm import Buffer, EPArgumentError, EPConfig, EPUnsupportedError
from ep_comm.backends.nvlink import support as nvlink_support
from ep_comm.backends.nvlink.streams import InFlight
from ep_comm.backends.nvlink.support import check_fp8_hidden
from ep_comm.backends.nvlink.tuning import split_dispatch
from ep_comm.topology import Spot

SIZES = dict(num_experts=16, hidden=1024, max_tokens_per_rank=512, num_topk=4, backend="nvlink")


def test_operations_are_ordered_where_they_would_not_fit():
    in_flight = InFlight(100)
    assert in_flight.start("dispatch", 1, 60) == []
    assert in_flight.start("combine", 2, 40) == []  # beside the dispatch
    assert in_flight.start("combine", 3, 40) == [2]  # the same memory
    assert in_flight.start("dispatch", 3, 60) == [1]
    assert in_flight.start("other", 4, 40) == []  # of two on one stream one runs at a time
    assert in_flight.start("large", 5, 100) == [3, 4]
    in_flight = InFlight(100)
    in_flight.start("a", 1, 50)
    in_flight.start("b", 2, 30)
    assert in_flight.start("c", 3, 40) == [1]  # beside the newer one only
    in_flight.forget("b")
    assert in_flight.start("d", 4, 100) == [1, 3]


def test_the_same_operation_again_waits_for_what_came_between():
    in_flight = InFlight(100)
    for _ in range(3):
        assert in_flight.start("dispatch", 1, 60) == []
    assert in_flight.start("combine", 2, 60) == [1]
    assert in_flight.start("dispatch", 1, 60) == [2]
    in_flight.forget("combine")
    assert in_flight.start("dispatch", 1, 60) == []
    assert in_flight.start("combine", 2, 60) == [1]


def test_a_larger_operation_before_the_last_one_counts():
    in_flight = InFlight(100)
    in_flight.start("dispatch", 1, 100)
    assert in_flight.start("dispatch", 2, 8) == [1]
    assert in_flight.start("combine", 3, 90) == [2]
    in_flight.forget("dispatch")
    in_flight.start("dispatch", 2, 8)
    assert in_flight.start("combine", 3, 90) == []


def test_a_buffer_may_be_collected_while_another_starts():
    in_flight = InFlight(100)

    class Collecting(int):
        """A stream at whose sight the garbage collector runs."""

        def __eq__(self, other: object) -> bool:
            in_flight.forget("collected")
            return int(self) == other

        __hash__ = int.__hash__

    in_flight.start("running", Collecting(2), 100)
    in_flight.start("collected", 1, 100)
    assert in_flight.start("new", 3, 100) == [1, 2]
    assert in_flight.start("newer", 4, 100) == [2, 3]


def test_fp8_rows_for_which_there_is_no_room_are_refused():
    check_fp8_hidden(30_208, torch.float32)
    check_fp8_hidden(45_568, torch.bfloat16)
    with pytest.raises(EPArgumentError, match="to FP32 needs hidden to be at most 30208, got 307"):
        check_fp8_hidden(30_720, torch.float32)
    with pytest.raises(EPArgumentError, match="multiple of 512, got 640"):
        check_fp8_hidden(640)


def reason_of_two(patch, gpus: tuple[str, ...], strangers: tuple[int, int]) -> str | None:
    """What two ranks find out that see these GPUs; the first of `strangers` cannot reach the
    other."""
    patch.setattr(dist, "get_backend", lambda group: "cpu:gloo,cuda:nccl")
    patch.setattr(dist, "get_world_size", lambda group: 2)
    patch.setattr(nvlink_support, "gpu_id", lambda i: gpus[i])
    patch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    patch.setattr(torch.cuda, "can_device_access_peer", lambda *pair: pair != strangers)
    facts = []
    for rank in range(2):
        patch.setattr(torch.cuda, "current_device", lambda: rank % len(gpus))  # noqa: B023
        facts.append(nvlink_support.facts_of(None, EPConfig(**SIZES), lambda *_: None))
    return nvlink_support.unavailable_reason(facts, [Spot("a", ())] * 2, 2)


def test_low_latency_rows_that_no_sm_can_place(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nvlink_support._native, "unusable_reason", lambda gpu: None)
    sizes = dict(num_experts=4096, hidden=64, max_tokens_per_rank=8, num_topk=2)
    reasons = [
        nvlink_support.reason_here(4, EPConfig(**sizes, low_latency_tokens=tokens))
        for tokens in (None, 292, 293)
    ]
    assert reasons[:2] == [None, None] and reasons[2] == (
        "1024 experts a rank x 1172 low-latency tokens of all ranks, at most 1200000"
    )


def test_gpus_without_peer_access_leave_the_reference_backend(monkeypatch):
    assert reason_of_two(monkeypatch, ("GPU-a", "GPU-b"), (0, 0)) is None
    reason = reason_of_two(monkeypatch, ("GPU-a", "GPU-b"), (1, 0))
    assert reason == "rank 1: its GPU has no peer access to that of rank 0"


def test_ranks_that_share_a_gpu_are_named(monkeypatch):
    with pytest.raises(EPArgumentError, match="ranks 0 and 1 have the same GPU: every process"):
        reason_of_two(monkeypatch, ("GPU-a",), (0, 0))


@pytest.mark.parametrize("num_sms", [2, 3, 8, 16, 24, 63, 64, 132])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_all_sms_are_counted(num_sms, layout):
    for num_ranks in (1, 2, 8):
        for num_topk in (1, 8, 32):
            push, expand = split_dispatch(num_sms, num_ranks, layout, num_topk)
            assert push + expand == num_sms and expand >= 1 and (push >= 1) == (num_ranks > 1)


def test_few_sms_are_divided_as_their_work_is():
    """As the sweeps of docs/kernel-notes.md have it, top-8."""
    found = {
        (num_ranks, layout): [split_dispatch(n, num_ranks, layout, 8)[0] for n in (16, 24, 32)]
        for num_ranks in (2, 4)
        for layout in ("rank", "expert")
    }
    assert found == {
        (2, "rank"): [6, 9, 9], (2, "expert"): [3, 4, 5],
        (4, "rank"): [8, 9, 9], (4, "expert"): [5, 8, 9],
    }  # fmt: skip
    assert split_dispatch(132, 4, "rank", 8) == (24, 108)


def one_waits_for_the_other(rank: int, num_sms: int) -> None:
    """Rank 0 has a combine under way that rank 1 joins only after a dispatch of both."""
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=10))
    buffer.set_num_sms(num_sms)
    topk = torch.stack([torch.randperm(16)[:4] for _ in range(512)]).cuda()
    x = torch.randn(512, 1024, device="cuda").bfloat16()
    first = buffer.dispatch(x, topk)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 0:
        combined = buffer.combine(first.recv_x, first.handle, async_finish=True)
        second = buffer.dispatch(x, handle=first.handle)
    else:
        second = buffer.dispatch(x, handle=first.handle)
        torch.cuda.synchronize()
        combined = buffer.combine(first.recv_x, first.handle, async_finish=True)
    combined.event.current_stream_wait()
    torch.cuda.synchronize()
    assert torch.equal(second.recv_x, first.recv_x)
    alone = buffer.combine(first.recv_x, first.handle)
    assert torch.equal(alone.combined_x, combined.combined_x)


@pytest.mark.multi_gpu
def test_a_dispatch_and_a_combine_run_at_once():
    run_ranks(2, one_waits_for_the_other, 48, backend="nccl", fresh=True)


def late_rank_is_recorded(rank: int) -> None:
    buffer = Buffer(None, EPConfig(**SIZES, timeout_s=20))
    topk = torch.stack([torch.randperm(16)[:4] for _ in range(512)]).cuda()
    x = torch.randn(512, 1024, device="cuda").bfloat16()
    out = buffer.dispatch(x, topk)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 1:
        torch.cuda._sleep(40_000_000)  # about 20 ms
    buffer.dispatch(x, handle=out.handle)
    buffer.combine(out.recv_x, out.handle)
    fresh, cached, combine = buffer.records
    assert [(r.op, r.epoch, r.place) for r in buffer.records] == [
        ("dispatch", 1, 1),
        ("dispatch", 2, 2),
        ("combine", 1, 3),
    ]
    assert fresh.rows_to_rank == cached.rows_to_rank and sum(fresh.rows_to_rank) > 512
    received = tuple(out.handle.num_recv_tokens_per_rank)
    assert combine.rows_to_rank == received
    for record in (cached, combine):
        peer = 1 - rank
        assert record.wire_bytes_to_rank[peer] == 2048 * record.rows_to_rank[peer]
        assert record.wire_bytes_to_rank[rank] == 0 and record.wait_s_by_rank[rank] == 0
    if rank == 0:
        assert cached.slowest_rank == 1 and 0.01 < cached.wait_s_by_rank[1] < 1
        assert cached.wait_s_by_rank[1] <= cached.seconds < 1
    else:
        assert cached.wait_s_by_rank[0] < 0.01
    assert buffer.records.wire_bytes == sum(r.wire_bytes for r in buffer.records)


@pytest.mark.multi_gpu
def test_a_late_rank_is_in_the_record():
    run_ranks(2, late_rank_is_recorded, backend="nccl", fresh=True)


def capture_without_room(rank: int) -> None:
    buffer = Buffer(None, EPConfig(**SIZES))
    topk = torch.stack([torch.randperm(16)[:4] for _ in range(8)]).cuda()
    x = torch.randn(8, 1024, device="cuda").bfloat16()
    buffer.dispatch(x, topk)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(EPUnsupportedError, match="pass num_worst_tokens"),
        torch.cuda.graph(graph),
    ):
        buffer.dispatch(x, topk)
    assert torch.equal(buffer.combine(*repeat(buffer, x, topk)).combined_x, 4 * x)


def repeat(buffer: Buffer, x: torch.Tensor, topk: torch.Tensor) -> tuple:
    out = buffer.dispatch(x, topk)
    return out.recv_x, out.handle


@pytest.mark.gpu
def test_capture_of_a_host_wait_is_refused():
    run_ranks(1, capture_without_room, backend="nccl", fresh=True)
