"""What a rank does in tests of low latency over NVLink: on a GPU, or in the emulator."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from cases import wait_for_stream
from low_latency_cases import Inputs, LowLatencyCase, as_numpy, combine, dispatch, run_case

from ep_comm import Buffer, EPTimeoutError
from ep_comm.errors import EPMismatchError, EPRoutingError


def with_a_third_dispatch(rank: int, buffer: Buffer, case: LowLatencyCase) -> list[dict[str, Any]]:
    """No kernel stands between a receive and the send that needs the credit for it."""
    inputs = [Inputs.of_case(case, rank, case.device) for _ in range(3)]
    outs = [dispatch(buffer, case, given) for given in inputs[:2]]
    outs[0].hook()
    outs.append(dispatch(buffer, case, inputs[2]))
    for out in outs[1:]:
        out.hook()
    for given, out in zip(inputs, outs, strict=True):
        combine(buffer, case, given, out.handle).hook()
    return [as_numpy(case, given, out) for given, out in zip(inputs, outs, strict=True)]


def after_four_thousand_million(rank: int, buffer: Buffer, case: LowLatencyCase) -> list:
    """As `run_case`, while the operations' numbers run out of 32 bits."""
    buffer._session.backend.low_latency.restart((), 2**32 - 4)
    wait_for_stream()
    return [run_case(rank, buffer, case, case.device) for _ in range(8)]


def with_foreign_experts(rank: int, buffer: Buffer, case: LowLatencyCase) -> dict[str, Any]:
    """What is to be dropped is not -1 but other numbers that are no experts."""
    given = Inputs.of_case(case, rank, case.device)
    dropped = given.topk_idx < 0
    given.topk_idx[dropped] = torch.tensor([-7, 1 << 40, case.num_experts], device=case.device)[
        torch.arange(int(dropped.sum()), device=case.device) % 3
    ]
    wait_for_stream()
    out = dispatch(buffer, case, given)
    combine(buffer, case, given, out.handle)
    results = {name: array.copy() for name, array in as_numpy(case, given, out).items()}
    message = r"token \d+, entry \d, no expert has number"
    with pytest.raises(EPRoutingError, match=message) as caught:
        dispatch(buffer, case, given)
    shown = {"-7", str(2**31 - 1), str(case.num_experts)}
    assert any(f"number {number}." in str(caught.value) for number in shown)
    combine(buffer, case, given, dispatch(buffer, case, given).handle)  # it was said once
    return results


def with_experts_twice(rank: int, buffer: Buffer, case: LowLatencyCase) -> list[int]:
    given = Inputs.of_case(case, rank, case.device)
    given.topk_idx[:, 1] = given.topk_idx[:, 0]
    wait_for_stream()
    out = dispatch(buffer, case, given)
    combine(buffer, case, given, out.handle)
    wait_for_stream()
    with pytest.raises(EPRoutingError, match=r"entry 1, a second time expert"):
        dispatch(buffer, case, given)
    return out.recv_count.tolist()


def with_other_handles(rank: int, buffer: Buffer, case: LowLatencyCase) -> str:
    """Ranks combine different dispatches: of the same sizes, so that only the epochs tell."""
    given = Inputs.of_case(case, rank, case.device)
    handles = [dispatch(buffer, case, given).handle for _ in range(2)]
    combine(buffer, case, given, handles[rank])
    with pytest.raises(EPMismatchError) as caught:
        buffer.synchronize()
    return str(caught.value)


def with_other_formats(rank: int, buffer: Buffer, case: LowLatencyCase) -> str:
    """Rank 1 alone dispatches in FP8. A rank whose first block finds out has still to tell."""
    case = dataclasses.replace(case, scales=(None, "fp32")[rank])
    out = dispatch(buffer, case, Inputs.of_case(case, rank, case.device))
    with pytest.raises(EPMismatchError) as caught:
        buffer.synchronize()
    assert not out.recv_count.any()
    return str(caught.value)


def with_weights_on_one_side(rank: int, buffer: Buffer, case: LowLatencyCase) -> str:
    """Rank 0 has them with its handle. Rank 1 brings them, and would wait for those of rank 0."""
    given = Inputs.of_case(case, rank, case.device)
    cases = [dataclasses.replace(case, weights_with=each) for each in ("dispatch", "combine")]
    handles = [dispatch(buffer, each, given).handle for each in cases]
    combine(buffer, cases[rank], given, handles[rank])
    with pytest.raises(EPMismatchError) as caught:
        buffer.synchronize()
    return str(caught.value)


def rank_one_stays_away(rank: int, buffer: Buffer, case: LowLatencyCase) -> str | None:
    given = Inputs.of_case(case, rank, case.device)
    if rank == 1:
        time.sleep(3)
        return None
    out = dispatch(buffer, case, given)
    combine(buffer, case, given, out.handle)  # after the fault it touches nobody's memory
    with pytest.raises(EPTimeoutError) as caught:
        buffer.synchronize()
    assert not buffer.is_usable and caught.value.late_ranks == (1,)
    assert not out.recv_count.any()
    return str(caught.value)
