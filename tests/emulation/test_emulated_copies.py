"""Copy engines as the wire, with kernels and copies run on the CPU: no GPU is needed."""

from __future__ import annotations

import dataclasses
import threading
import time
from threading import Barrier

import emulated_nodes
import pytest
import torch
from buffer_cases import check_results
from cases import Case, to_torch
from copy_engine_cases import capacity_on_buffer, check_dense_bytes, fp8_on_buffer, run_on_buffer
from emulated_ranks import run_emulated_ranks
from fp8_cases import CASE as FP8_CASE
from fp8_cases import check_fp8_results

from ep_comm import Buffer, EPArgumentError, EPMismatchError, EPStateError, EPTimeoutError, fp8
from ep_comm._native import header

BY_COPY = dict(wire="copy-engine", timeout_s=60)
# More than 32 tokens, so that there are several chunks; a rank without any.
CASES = [
    Case(tokens=(77, 5)),
    Case(tokens=(150, 0, 41), num_topk=5, layout="rank", dtype="fp32"),
    Case(tokens=(70, 33, 131, 0), num_topk=6, experts_per_rank=2, drop=0.2, as_routing_map=True),
    Case(tokens=(64, 40), num_topk=3, ranks_per_node=1, dtype="fp16", alignment=16),
]


@pytest.mark.parametrize("delay_us", [0, 300])
@pytest.mark.parametrize("case", CASES)
def test_operations(library, case, delay_us):
    results = run_emulated_ranks(
        library, case.num_ranks, run_on_buffer, case.config(**BY_COPY), case, delay_us=delay_us
    )
    check_results(case, results, check_dense_bytes)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_fp8(library, layout):
    case = dataclasses.replace(FP8_CASE, layout=layout, tokens=(70, 41), hidden=512)
    results = run_emulated_ranks(library, 2, fp8_on_buffer, case.config(**BY_COPY), case)
    check_fp8_results(case, results)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_outputs_of_a_given_size(library, layout):
    case = Case(tokens=(70, 9), num_topk=3, hidden=128, layout=layout)
    run_emulated_ranks(library, 2, capacity_on_buffer, case.config(**BY_COPY), case)


def begins_ahead(rank: int, buffer: Buffer, case: Case, begins: tuple[bool, ...]) -> None:
    """New and cached dispatches whose rows were on their way, and FP8, as those without."""
    topk = to_torch(case.topk_idx(rank))
    probs = to_torch(case.probabilities(rank, tuple(topk.shape), salt=3))
    for salt, wire_dtype in ((2, None), (4, None), (6, fp8.FP8_DTYPE)):
        x = to_torch(case.rows(rank, case.tokens[rank], salt=salt)).nan_to_num(0, 1, -1)
        plain = buffer.dispatch(x, topk, probs, wire_dtype=wire_dtype)
        summed = buffer.combine(plain.recv_x, plain.handle).combined_x
        for how in (dict(topk_idx=topk), dict(handle=plain.handle)):
            if begins[rank]:
                buffer.begin_dispatch(x, wire_dtype=wire_dtype)
                # Of the other kind, so it may come between.
                again = buffer.combine(plain.recv_x, plain.handle).combined_x
                assert torch.equal(again, summed)
            else:
                buffer.combine(plain.recv_x, plain.handle)
            out = buffer.dispatch(x, **how, topk_weights=probs, wire_dtype=wire_dtype)
            assert torch.equal(out.recv_x, plain.recv_x)
            assert torch.equal(out.recv_topk_weights, plain.recv_topk_weights)
            record = list(buffer.records)[-2 if begins[rank] else -1]
            assert record.op == "dispatch" and sum(record.wire_bytes_to_rank) > 0


@pytest.mark.parametrize("begins", [(True, True), (False, True)], ids=["all", "one"])
def test_rows_ahead_of_their_routing(library, begins):
    """Some ranks may begin ahead, and others not."""
    case = Case(tokens=(150, 70), num_topk=3, hidden=512, drop=0.1)
    config = case.config(**BY_COPY)
    run_emulated_ranks(library, 2, begins_ahead, config, case, begins, delay_us=100)


def is_recorded(rank: int, buffer: Buffer, case: Case) -> None:
    backend = buffer._session.backend
    topk = to_torch(case.topk_idx(rank))
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2))
    handle = buffer.dispatch(x, topk).handle
    for how in (dict(topk_idx=topk), dict(handle=handle)):
        buffer.begin_dispatch(x)
        backend.native.synchronize(backend._copies.dispatch.stream)
        time.sleep(0.05)
        buffer.dispatch(x, **how)
        record = list(buffer.records)[-1]
        assert record.seconds > 0.05, how


def test_a_record_begins_where_the_rows_do(library):
    case = Case(tokens=(20, 7), num_topk=2)
    run_emulated_ranks(library, 2, is_recorded, case.config(**BY_COPY), case)


def begins_wrongly(rank: int, buffer: Buffer, case: Case) -> None:
    topk = to_torch(case.topk_idx(rank))
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2))
    other = x.clone()
    handle = buffer.dispatch(x, topk).handle
    buffer.begin_dispatch(x)
    with pytest.raises(EPArgumentError, match="was called before"):
        buffer.begin_dispatch(x)
    with pytest.raises(EPArgumentError, match=r"dispatch them .* \(x is another tensor"):
        buffer.dispatch(other, topk)
    with pytest.raises(EPArgumentError, match="x is another tensor"):
        buffer.dispatch(x[:-1], topk[:-1])
    summed = buffer.combine(other.new_zeros(handle.num_rows, case.hidden).requires_grad_(), handle)
    with pytest.raises(EPArgumentError, match="x is another tensor"):  # not a buffer that failed
        summed.combined_x.sum().backward()
    with pytest.raises(EPArgumentError, match="wire_dtype is"):
        buffer.dispatch(x, topk, wire_dtype=fp8.FP8_DTYPE)
    buffer.dispatch(x, topk)
    rows, scales = fp8.quantize(x.nan_to_num(0, 1, -1))
    buffer.begin_dispatch((rows, scales))
    with pytest.raises(EPArgumentError, match="the scales of x are another tensor"):
        buffer.dispatch((rows, scales.clone()), topk)
    buffer.dispatch((rows, scales), topk)
    buffer.begin_dispatch((rows, scales))
    scales *= 2
    with pytest.raises(EPArgumentError, match="the scales of x were written to since then"):
        buffer.dispatch((rows, scales), topk)


def writes_to_rows_that_are_on_their_way(rank: int, buffer: Buffer, case: Case) -> None:
    topk = to_torch(case.topk_idx(rank))
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2))
    buffer.begin_dispatch(x)
    x[0, 0] = 3
    with pytest.raises(EPArgumentError, match="x was written to since then"):
        buffer.dispatch(x, topk)


def test_rows_ahead_that_are_not_those_dispatched_are_named(library):
    case = Case(tokens=(20, 7), num_topk=2, hidden=512)
    run_emulated_ranks(library, 2, begins_wrongly, case.config(**BY_COPY), case)
    run_emulated_ranks(
        library, 2, writes_to_rows_that_are_on_their_way, case.config(**BY_COPY), case
    )


def replays_between(rank: int, buffer: Buffer, case: Case, capturing, between: bool) -> str:
    """A graph with a cached dispatch, replayed behind `begin_dispatch`, or before it."""
    backend = buffer._session.backend
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2)).nan_to_num(0, 1, -1)
    out = buffer.dispatch(x, to_torch(case.topk_idx(rank)))
    in_graph = torch.empty_like(out.recv_x)

    def replay() -> None:
        """As a graph: kernels and copies of a dispatch, of which Python knows nothing."""
        args = header.DispatchArgs.from_buffer_copy(backend._args.dispatch)
        args.recv_x, args.is_planned = in_graph.data_ptr(), False
        wire = backend._copies.dispatch
        kept = wire.native_wire.number, wire.native_wire.flag_offset, wire._push.flag_offset
        capturing.now = True
        backend._copies.repeat(
            args, out.handle.routing.num_tokens, 4, backend._streams.current, False
        )
        capturing.now = False
        wire.native_wire.number, wire.native_wire.flag_offset, wire._push.flag_offset = kept
        wire._push.number = kept[0]
        backend._streams.synchronize()

    if not between:
        replay()
    buffer.begin_dispatch(x)
    if between:
        replay()
    error = ""
    try:
        again = buffer.dispatch(x, handle=out.handle).recv_x
        assert torch.equal(again, out.recv_x) and torch.equal(in_graph, out.recv_x)
    except EPStateError as raised:
        error = str(raised)
    return error


@pytest.mark.parametrize("between", [False, True])
def test_a_graph_that_is_replayed_behind_rows_that_are_on_their_way(library, monkeypatch, between):
    """Its rows would come over them."""
    case = Case(tokens=(70, 40), num_topk=2)
    capturing = threading.local()
    monkeypatch.setattr(emulated_nodes, "is_capturing", lambda: getattr(capturing, "now", False))
    errors = run_emulated_ranks(
        library, 2, replays_between, case.config(**BY_COPY), case, capturing, between
    )
    assert [bool(error) for error in errors] == [between] * 2
    for rank, error in enumerate(errors):
        assert not error or error.startswith(
            f"dispatch #2 came twice on rank {rank}: a CUDA graph with a dispatch was replayed"
        ), error


def marks_of(buffer: Buffer) -> torch.Tensor:
    """What each rank has marked for its dispatches in this one's memory."""
    backend = buffer._session.backend
    begin = backend.offsets.copy_marks
    return backend.memory.tensor[begin : begin + 4 * buffer.num_ranks].view(torch.int32)


def gives_up_with_copies_behind(rank: int, buffer: Buffer, case: Case, met: Barrier) -> int:
    """Rank 1 stays away. A third dispatch of rank 0 is launched before the second has given up."""
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2))
    handle = buffer.dispatch(x, to_torch(case.topk_idx(rank))).handle
    met.wait()
    if rank == 0:
        buffer._session.backend.unwaited = True
        for _ in range(2):
            buffer.dispatch(x, handle=handle)
        with pytest.raises(EPTimeoutError, match="waited 1 s for rank 1"):
            buffer.synchronize()
    met.wait()
    return int(marks_of(buffer)[0])


def test_a_rank_that_gave_up_marks_what_its_copies_may_run_over(library):
    case = Case(tokens=(40, 7), num_topk=3)
    config = case.config(**{**BY_COPY, "timeout_s": 1})
    marks = run_emulated_ranks(library, 2, gives_up_with_copies_behind, config, case, Barrier(2))
    assert marks[1] == 3  # the second has not ended, so nobody reads for a third


def gives_up_behind_its_gate(rank: int, buffer: Buffer, case: Case) -> str:
    """Rank 0 hears of a fault when the gate of its combine has passed, and nothing is added up."""
    backend = buffer._session.backend
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2))
    out = buffer.dispatch(x, to_torch(case.topk_idx(rank)))
    if rank == 0:
        launch = backend.native.launch

        def launch_late(name: str, *args: object) -> None:
            if name == "ep_partial_sums":
                while int(backend._copies.combine._epoch) == 0:  # the gate has not ended
                    time.sleep(0.01)
                backend.memory.abort.fill_(1)
            launch(name, *args)

        backend.native.launch = launch_late
        buffer.combine(out.recv_x, out.handle)
        return ""
    with pytest.raises(EPStateError) as error:
        buffer.combine(out.recv_x, out.handle)
        buffer.synchronize()
    return str(error.value)


def test_rows_that_nobody_has_added_up_are_no_result(library):
    case = Case(tokens=(40, 20), num_topk=3)
    results = run_emulated_ranks(library, 2, gives_up_behind_its_gate, case.config(**BY_COPY), case)
    assert "combine #1: rank 0 gave up, and what its copy engines sent" in results[1]


def reads_what_may_be_overwritten(rank: int, buffer: Buffer, case: Case) -> str:
    """As if rank 0 had given up, and copies of its next dispatch ran, while rank 1 reads.

    Rank 0 has no tokens, so it is its mark alone that rank 1 sees of it.
    """
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2))
    handle = buffer.dispatch(x, to_torch(case.topk_idx(rank))).handle
    if rank == 0:
        return ""
    marks_of(buffer)[0] = 3
    with pytest.raises(EPStateError) as error:
        buffer.dispatch(x, handle=handle)
    return str(error.value)


def test_rows_that_may_have_been_overwritten_are_no_result(library):
    case = Case(tokens=(0, 40), num_topk=3)
    results = run_emulated_ranks(
        library, 2, reads_what_may_be_overwritten, case.config(**BY_COPY), case
    )
    assert "dispatch #2: rank 0 gave up, and what its copy engines sent" in results[1]


def makes_another_call(rank: int, buffer: Buffer, case: Case, what: str) -> str:
    topk = to_torch(case.topk_idx(rank))
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2))
    handles = [buffer.dispatch(x, topk).handle for _ in range(2)]
    with pytest.raises(EPMismatchError) as error:
        if what == "handles":
            buffer.dispatch(x, handle=handles[rank])
        elif what == "probabilities":
            weights = torch.ones(topk.shape) if rank == 0 else None
            buffer.dispatch(x, handle=handles[0], topk_weights=weights)
        else:
            rows = x.new_zeros(handles[0].num_rows, case.hidden)
            buffer.combine(rows.float() if rank == 0 else rows, handles[0])
    return str(error.value)


@pytest.mark.parametrize("what", ["handles", "probabilities", "types of sums"])
def test_ranks_that_make_different_calls_are_told_so(library, what):
    case = Case(tokens=(40, 30))
    config = case.config(**BY_COPY, dtype=torch.float32)
    messages = run_emulated_ranks(library, 2, makes_another_call, config, case, what)
    op = "combine" if what == "types of sums" else "dispatch"
    for rank, message in enumerate(messages):
        assert f"rank {rank} and rank {1 - rank} made different {op} calls" in message


def in_and_outside_of_graphs(rank: int, buffer: Buffer, case: Case, capturing) -> None:
    """What a graph holds counts by the epoch, and the rest by the host: both in turn."""
    topk = to_torch(case.topk_idx(rank))
    for number, capturing.now in enumerate((False, True, True, False, True, False)):
        x = to_torch(case.rows(rank, case.tokens[rank], salt=number)).nan_to_num(0, 1, -1)
        out = buffer.dispatch(x, topk, num_worst_tokens=400)
        back = buffer.combine(out.recv_x, out.handle).combined_x
        wanted = case.num_topk * x.float()
        assert torch.equal(back.float(), wanted.to(x.dtype).float()), number


def test_flags_of_graphs_and_others_in_turn(library, monkeypatch):
    case = Case(tokens=(70, 150), num_topk=2)
    capturing = threading.local()
    monkeypatch.setattr(emulated_nodes, "is_capturing", lambda: getattr(capturing, "now", False))
    run_emulated_ranks(
        library, 2, in_and_outside_of_graphs, case.config(**BY_COPY), case, capturing
    )


def pushes_alone(rank: int, buffer: Buffer, case: Case) -> None:
    """For figures: operations whose rows nobody expands, between those that have results."""
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2))
    out = buffer.dispatch(x, to_torch(case.topk_idx(rank)))
    backend = buffer._session.backend
    for _ in range(3):
        backend.push_alone(out.handle.routing, x)
        backend.synchronize()
    again = buffer.dispatch(x, handle=out.handle).recv_x
    assert torch.equal(again.view(torch.int16), out.recv_x.view(torch.int16))
    assert [record.epoch for record in buffer.records] == [1, 2, 3, 4, 5]


def test_copies_alone_are_operations_too(library):
    case = Case(tokens=(150, 7), num_topk=3)
    run_emulated_ranks(library, 2, pushes_alone, case.config(**BY_COPY), case, delay_us=200)
