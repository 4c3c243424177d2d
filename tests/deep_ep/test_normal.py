"""`ep_comm.deep_ep.Buffer`: dispatch and combine, on real processes, against a loop over tokens."""

from __future__ import annotations

import dataclasses
import functools
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import Case, assert_same, to_numpy
from deep_ep_normal import CASES, Rank, dispatch, every_way, fp8_rows, room, sizes_that_change
from own_name import patience
from ranks import run_ranks

from ep_comm import EPArgumentError, EPRoutingError, EPStateError
from ep_comm.deep_ep import Buffer, topk_idx_t
from ep_comm.deep_ep.hints import MAX_TOKENS_VARIABLE, TIMEOUT_VARIABLE
from ep_comm.deep_ep.sized import SizedBuffers

patience()


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_call(case):
    run_ranks(case.num_ranks, every_way, case)


def test_fp8_rows():
    run_ranks(2, fp8_rows, Case(tokens=(7, 5), layout="rank", hidden=512))


# ---- Sizes -------------------------------------------------------------------------------------


def test_sizes_follow_the_calls():
    run_ranks(2, sizes_that_change, "cpu")


def sizes_by_hint(rank: int) -> None:
    os.environ[MAX_TOKENS_VARIABLE], os.environ[TIMEOUT_VARIABLE] = "100", "7.5"
    try:
        buffer = Buffer(dist.group.WORLD)
    finally:
        del os.environ[MAX_TOKENS_VARIABLE], os.environ[TIMEOUT_VARIABLE]
    dispatch(buffer, Rank(rank, Case(tokens=(3, 9), layout="rank")))
    assert room(buffer) == [128]
    assert buffer._buffers.newest.native.config.timeout_s == 7.5
    dispatch(buffer, Rank(rank, Case(tokens=(3, 190), layout="rank")))
    assert room(buffer) == [128, 256]
    buffer.destroy()


def test_sizes_may_be_hinted():
    run_ranks(2, sizes_by_hint)


def test_one_that_cannot_be_destroyed_does_not_keep_the_others():
    done: list[str] = []

    def destroy(name: str) -> None:
        done.append(name)
        if name == "larger":
            raise EPStateError(name)

    buffer = object.__new__(SizedBuffers)
    buffer._all = [
        mock.Mock(native=mock.Mock(destroy=functools.partial(destroy, name)))
        for name in ("first", "larger", "last")
    ]
    with pytest.raises(EPStateError, match="larger"):
        buffer.destroy()
    assert done == ["last", "larger", "first"]


def bad_routing(rank: int) -> str:
    """It is raised where it is wrong, and the buffer goes on."""
    buffer = Buffer(dist.group.WORLD)
    mine = Rank(rank, Case(tokens=(3, 9), layout="rank"))
    layout = mine.layout(buffer)
    dispatch(buffer, mine)
    wrong = torch.full((1, 2), mine.case.num_experts, dtype=topk_idx_t)
    with pytest.raises(EPRoutingError):
        buffer.dispatch(mine.x[:1], topk_idx=wrong, **layout)
    dist.barrier()
    handle = dispatch(buffer, mine)[4]
    with pytest.raises(EPArgumentError, match="bias must be one or two tensors"):
        buffer.combine(mine.y, handle, bias=mine.y[:1])
    with pytest.raises(EPArgumentError, match="handle must be what dispatch returned, got tuple"):
        buffer.combine(mine.y, handle[:])
    with pytest.raises(EPArgumentError, match="a handle, or topk_idx"):
        buffer.dispatch(mine.x, handle, topk_idx=mine.topk_idx)
    with pytest.raises(EPArgumentError, match="num_tokens_per_expert"):
        buffer.dispatch(mine.x, topk_idx=mine.topk_idx)
    with pytest.raises(EPArgumentError, match="is_token_in_rank"):
        buffer.dispatch(mine.x, num_tokens_per_expert=layout["num_tokens_per_expert"])
    with pytest.raises(EPArgumentError, match="topk_idx must be"):
        buffer.get_dispatch_layout(mine.x, 8)
    with pytest.raises(EPArgumentError, match="num_experts 7 is not divisible"):
        buffer.get_dispatch_layout(mine.topk_idx, 7)
    combined = buffer.combine(mine.y, handle)[0]
    assert_same(to_numpy(combined), mine.want_combined(), "combined")
    buffer.destroy()


def test_bad_calls_leave_the_buffer_as_it_was():
    run_ranks(2, bad_routing)


def test_a_case_is_not_trivial():
    """Ranks have rows from others, of tokens with several experts."""
    mine = Rank(0, dataclasses.replace(CASES[3]))
    assert {row.source for row in mine.rows} == {0, 1, 2, 3}
    assert any(len(mine.local(row)) > 1 for row in mine.rows)
