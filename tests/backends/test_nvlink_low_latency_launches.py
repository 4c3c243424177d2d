"""What low-latency operations over NVLink launch, and what they leave; no GPU is needed."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
import torch.distributed as dist
from nvlink_launches import CONFIG, CURRENT, TOPK, X, make_backend

from ep_comm._native import header
from ep_comm.backends.nvlink import streams as nvlink_streams
from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.requests import (
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencySizes,
)
from ep_comm.errors import EPUnsupportedError
from ep_comm.fp8_low_latency import ScaleForm


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
    ops = [each.op for each in backend.recorder._started(0)]
    assert ops == ["low_latency_dispatch"] * 2 + ["low_latency_combine"]


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


@pytest.fixture
def kept(monkeypatch) -> set[int]:
    """Addresses of what torch's allocator was told to keep for another stream."""
    addresses: set[int] = set()
    another = object()

    def record_stream(tensor: torch.Tensor, stream: object) -> None:
        assert stream is another
        addresses.add(tensor.data_ptr())

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: another)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    return addresses


def addresses_of(*tensors: torch.Tensor) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize("backend", [DECODING], indirect=True)
def test_what_a_dispatch_leaves_is_kept_for_the_streams_that_use_it(backend, monkeypatch, kept):
    sent, request = low_latency_dispatch(backend)
    sent.wait()
    low_latency_combine(backend, sent.result)[0].wait()
    assert not kept
    monkeypatch.setattr(nvlink_streams, "raw_stream", lambda _: 9)
    back, _ = low_latency_combine(backend, sent.result)
    left = addresses_of(request.recv_src_info, request.topk_idx)
    assert kept == left
    kept.clear()
    back.wait()
    assert kept == left


@pytest.mark.parametrize("backend", [DECODING], indirect=True)
def test_what_a_hook_writes_to_is_kept_for_the_stream_that_it_is_called_on(
    backend, monkeypatch, kept
):
    """The caller may drop it there, and made it where the operation was called."""
    sent, request = low_latency_dispatch(
        backend, recv_scales=torch.empty(4, 4, 8).transpose(1, 2),
        recv_stats=torch.zeros(4, dtype=torch.int32), wait_stats=torch.zeros(2),
    )  # fmt: skip
    monkeypatch.setattr(nvlink_streams, "raw_stream", lambda _: 9)
    sent.wait()
    assert kept >= addresses_of(
        request.recv_x, request.recv_scales, request.recv_src_info, request.recv_count,
        request.recv_stats, request.wait_stats,
    )  # fmt: skip
    combining, request = low_latency_combine(backend, sent.result, wait_stats=torch.zeros(2))
    kept.clear()
    monkeypatch.setattr(nvlink_streams, "raw_stream", lambda _: CURRENT)  # that of the dispatch
    combining.wait()
    assert kept >= addresses_of(request.out, request.wait_stats)


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


@pytest.mark.parametrize("backend", [DECODING], indirect=True)
def test_a_hook_keeps_what_it_writes_to(backend):
    """Its caller may have kept nothing else."""
    sent, request = low_latency_dispatch(backend)
    written = [weakref.ref(tensor) for tensor in (request.recv_x, request.recv_count)]
    del request
    assert all(tensor() is not None for tensor in written)
    routing = sent.result  # launches; from here on the stream's order counts
    combining, request = low_latency_combine(backend, routing)
    out = weakref.ref(request.out)
    del request
    assert out() is not None and not any(tensor() is not None for tensor in written)
    combining.wait()
    assert out() is None
