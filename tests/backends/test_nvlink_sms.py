"""How many SMs operations over NVLink take, and what they cost beside GEMMs; no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from nvlink_launches import COMM, CONFIG, CURRENT, SIDE, TOPK, X, dispatch, plan
from virtual_ranks import VirtualBuffer

from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.nvlink.prices import Chooser, Price, PriceTable
from ep_comm.backends.requests import CombineRequest
from ep_comm.errors import EPArgumentError


def test_with_few_sms_the_halves_are_two_launches(backend):
    dispatch(backend, plan(backend, capacity=40, num_sms=24))
    planned, push, expand, joined = backend.native.take()
    assert planned[2:] == (CURRENT, SIDE)
    assert (push[2], expand[2], joined) == (CURRENT, SIDE, ("wait", CURRENT, SIDE))
    assert not push[1].is_behind_plan and not expand[1].is_behind_plan


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


@pytest.mark.parametrize("num_sms", [1, 133])
def test_sms_that_there_are_not(backend, num_sms):
    with pytest.raises(EPArgumentError, match="num_sms must be 2 to 132"):
        plan(backend, num_sms=num_sms)
    assert backend.recorder.num_operations == 0


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
    backend._sms.chooser = Chooser(table, backend.num_ranks)


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
    assert backend._sms.chooser.tiles == 64
    buffer.set_gemm_tiles(None)
    assert backend._sms.chooser.tiles is None
    with pytest.raises(EPArgumentError, match="tiles must be a positive integer, got 0"):
        buffer.set_gemm_tiles(0)
