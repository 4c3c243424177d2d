"""Low-latency dispatch and combine on real processes, bit by bit against a loop over tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import to_numpy
from low_latency_cases import (
    Inputs,
    LowLatencyCase,
    as_numpy,
    check_results,
    combine,
    dispatch,
    every_value,
    run_case,
    run_combined_twice,
    run_two_at_once,
)
from low_latency_oracle import from_e4m3, quantize
from low_latency_suite import CASES, CHANGING, HARD, TWICE, TWO_AT_ONCE, Case, changing_operations
from ranks import run_ranks

from ep_comm import Buffer, EPConfig, fp8_low_latency
from ep_comm.backends.reference.low_latency import rows_to_send, weights_to_send
from ep_comm.fp8_low_latency import ScaleForm


def on_reference(rank: int, case: LowLatencyCase) -> dict[str, Any]:
    with Buffer(None, case.config()) as buffer:
        return run_case(rank, buffer, case, "cpu")


@pytest.mark.parametrize("case", CASES)
def test_named_cases(case):
    check_results(case, run_ranks(case.num_ranks, on_reference, case))


@pytest.mark.parametrize("case", HARD)
def test_every_value_and_every_kind_of_nan(case):
    rows = [every_value(r, 26, case.hidden) for r in range(case.num_ranks)]
    assert len(np.unique(rows)) == 2**16
    check_results(case, run_ranks(case.num_ranks, on_reference, case))


def twice_on_reference(rank: int, case: LowLatencyCase) -> dict[str, Any]:
    with Buffer(None, case.config()) as buffer:
        return run_combined_twice(rank, buffer, case, "cpu")


@pytest.mark.parametrize("case", TWICE)
def test_one_dispatch_is_combined_twice(case):
    check_results(case, run_ranks(case.num_ranks, twice_on_reference, case))


def with_other_defaults(rank: int, case: LowLatencyCase) -> dict[str, Any]:
    """A program may have set torch's default device and type: neither is any of ours."""
    inputs = Inputs.of_case(case, rank, "cpu")
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with Buffer(None, case.config()) as buffer:
            out = dispatch(buffer, case, inputs)
            combine(buffer, case, inputs, out.handle)
            sent = buffer.dispatch(inputs.x, inputs.topk_idx, inputs.weights)
            assert sent.handle.tokens_per_expert.device.type == "cpu"
            assert sent.handle.device_expert_offsets.device.type == "cpu"
            buffer.combine(sent.recv_x, sent.handle)
            buffer.stats()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    return as_numpy(case, inputs, out)


def test_defaults_of_torch_do_not_matter():
    case = Case(tokens=(7, 5), scales="fp32", hidden=128)
    check_results(case, run_ranks(2, with_other_defaults, case))


# ---- Phases ------------------------------------------------------------------------------------


def two_at_once_on_reference(rank: int) -> list[dict[str, Any]]:
    with Buffer(None, TWO_AT_ONCE[0].config()) as buffer:
        return run_two_at_once(rank, buffer, TWO_AT_ONCE, "cpu")


def test_two_results_are_out_at_once_beside_normal_operations():
    results = run_ranks(3, two_at_once_on_reference)
    for number, case in enumerate(TWO_AT_ONCE):
        of_case = [of_rank[number] for of_rank in results]
        check_results(case, of_case, times=2 - number)  # the first one is dispatched again


def changing_on_reference(rank: int) -> tuple[list[dict[str, Any]], list[str], int]:
    with Buffer(None, CHANGING[0].config()) as buffer:
        results = changing_operations(rank, buffer, "cpu")
        return results, [r.op for r in buffer.records], buffer.records.num_operations


def test_changing_operations_of_one_buffer():
    ranks = run_ranks(2, changing_on_reference)
    for number, case in enumerate(CHANGING):
        check_results(case, [results[number] for results, _, _ in ranks])
    _, ops, num_operations = ranks[0]
    assert ops == ["low_latency_dispatch", "low_latency_combine"] * len(CHANGING)
    assert num_operations == 2 * len(CHANGING)


def wire_bytes(rank: int) -> list[tuple[int, ...]]:
    """Every token goes to both experts of the other rank: one copy, and one partial sum back."""
    config = EPConfig(
        num_experts=4, hidden=512, max_tokens_per_rank=4, num_topk=2, low_latency_tokens=4
    )
    x = torch.ones(3, 512).bfloat16()
    topk_idx = torch.tensor([[0, 1] if rank else [2, 3]] * 3)
    with Buffer(None, config) as buffer:
        for how in (dict(use_fp8=False), dict(), dict(round_scale=True, use_ue8m0=True)):
            out = buffer.low_latency_dispatch(x, topk_idx, 4, 4, torch.ones(3, 2), **how)
        buffer.low_latency_combine(torch.ones(2, 8, 512).bfloat16(), topk_idx, None, out.handle)
        return [record.wire_bytes_to_rank for record in buffer.records]


def test_one_copy_travels_to_a_rank():
    for rank, by_operation in enumerate(run_ranks(2, wire_bytes)):
        sizes = [sizes[1 - rank] for sizes in by_operation]
        assert sizes == [3 * 1024, 3 * (512 + 16), 3 * (512 + 4), 3 * 1024]
        assert all(sizes[rank] == 0 for sizes in by_operation)


# ---- Formats -----------------------------------------------------------------------------------


def special_rows() -> np.ndarray:
    """BF16 rows of one block each: nothing but zeros, NaN, an Inf, and so on."""
    rows = np.full((8, 128), 0x3F80, np.uint16)
    rows[0] = np.where(np.arange(128) % 2, 0x8000, 0)
    rows[1] = 0xFFC1  # NaN alone
    rows[2, 5] = 0x7FC0  # one NaN among ones
    rows[3, [6, 7]] = 0x7F80, 0xFF80  # an Inf of each sign
    rows[4] = 0x0001  # subnormal
    rows[5, 3] = 0x7F7F  # the largest finite one
    rows[6] = 0x43E0  # 448: scale 1
    rows[7] = 0x43E1  # the next one: scale 2
    return rows


@pytest.mark.parametrize("form", ScaleForm)
def test_blocks_of_zeros_nan_and_inf(form):
    rows = special_rows()
    rows = np.tile(rows, 4)  # UE8M0 takes four blocks
    data, scales = fp8_low_latency.quantize(
        torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16), form
    )
    data, scales = data.view(torch.uint8).numpy(), scales.numpy()
    for row, got_data, got_scales in zip(rows, data, scales, strict=True):
        want_data, want_scales = quantize(row, form.value)
        np.testing.assert_array_equal(got_data, want_data)
        np.testing.assert_array_equal(got_scales.view(np.uint32), want_scales.view(np.uint32))
    # What the docstring says of them.
    if form is ScaleForm.UE8M0:
        scales = np.exp2(scales.view(np.uint8).astype(np.float64) - 127)
    with np.errstate(invalid="ignore"):  # 0 times Inf
        values = np.vectorize(from_e4m3)(data) * np.repeat(scales, 128, axis=1)
    assert (data[0, :2] == [0x00, 0x80]).all() and (data[1] == 0x7F).all() and data[2, 5] == 0x7F
    assert scales[0, 0] == scales[4, 0] >= 1e-4 / 448 * (1 - 1e-7)
    if form is ScaleForm.FP32:
        assert np.isnan(values[3]).all() and (data[3, [6, 7]] == 0x7F).all()
        assert scales[3, 0] == np.inf and data[3, 0] == 0
    else:
        assert (data[3, [6, 7]] == [0x7E, 0xFE]).all() and scales[3, 0] == 2.0**126
        assert (values[3, [6, 7]] / 2.0**134 == [1.75, -1.75]).all()  # beyond FP32
        assert (scales[6, 0], scales[7, 0]) == (1, 2)
    assert not (data == 0xFF).any()


@pytest.mark.parametrize("form", ScaleForm)
def test_scales_of_every_amax(form):
    """One block for each positive BF16: FP8's own rounding in all binades."""
    bits = np.arange(0x7F81, dtype=np.uint16)  # to Inf
    bits = np.concatenate([bits, np.zeros(-len(bits) % 4, np.uint16)])
    rows = np.zeros((len(bits), 128), np.uint16)
    rows[:, 0], rows[:, 1] = bits, bits | 0x8000
    x = torch.from_numpy(rows.reshape(-1, 512).view(np.int16)).view(torch.bfloat16)
    data, scales = fp8_low_latency.quantize(x, form)
    data = data.view(torch.uint8).numpy().reshape(-1, 128)
    scales = scales.numpy().reshape(-1) if form is not ScaleForm.UE8M0 else scales.numpy()
    for first in range(0, len(rows), 124):  # of four a row
        row = rows[first : first + 4].reshape(-1)
        want_data, want_scales = quantize(row, form.value)
        np.testing.assert_array_equal(data[first : first + 4].reshape(-1), want_data)
        got = scales[first // 4] if form is ScaleForm.UE8M0 else scales[first : first + 4]
        np.testing.assert_array_equal(got.view(np.uint32), want_scales.view(np.uint32))


def test_no_word_that_is_sent_is_all_ones():
    rows = every_value(0, 110, 1024)
    assert rows.max() == 0xFFFF and len(np.unique(rows)) == 2**16
    sent = rows_to_send(torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16))
    got = to_numpy(sent)
    assert not (got.reshape(-1, 8) == 0xFFFF).all(1).any()
    changed = got != rows
    assert (rows[changed] == 0xFFFF).all() and (got[changed] == 0x7FFF).all()
    where = np.flatnonzero(changed)
    assert (where % 8 == 0).all() and len(where) >= 22 * 128

    bits = torch.tensor([-1, -2, 0x7FFFFFFF, 0x3F800000], dtype=torch.int32)
    sent = weights_to_send(bits.view(torch.float32)).view(torch.int32)
    assert sent.tolist() == [0x7FFFFFFF, -2, 0x7FFFFFFF, 0x3F800000]
    for form in ScaleForm:
        data, scales = fp8_low_latency.quantize(
            torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16), form
        )
        assert not (data.view(torch.uint8) == 0xFF).any()
        assert not (scales.contiguous().view(torch.uint8) == 0xFF).any() or form is ScaleForm.FP32
        assert not (scales.view(torch.int32) == -1).any()


# ---- DeepEP's meaning --------------------------------------------------------------------------


def as_with_deepep(rank: int) -> None:
    """The calls of a decode step as DeepEP's documentation has them, with what they promise."""
    num_experts, num_tokens, hidden, num_topk = 6, 5, 256, 2
    config = EPConfig(
        num_experts=num_experts,
        hidden=hidden,
        max_tokens_per_rank=num_tokens,
        num_topk=num_topk,
        low_latency_tokens=num_tokens,
    )
    assert Buffer.get_low_latency_size_hint(num_tokens, hidden, 2, num_experts) > 0
    buffer = Buffer(None, config)
    buffer.clean_low_latency_buffer(num_tokens, hidden, num_experts)
    x = torch.full((num_tokens, hidden), float(1 + rank), dtype=torch.bfloat16)
    topk_idx = torch.tensor([[0, 3], [1, 4], [2, 5], [0, -1], [5, 1]])
    topk_weights = torch.tensor([[0.25, 0.5]] * num_tokens)
    out = buffer.low_latency_dispatch(
        x, topk_idx, num_tokens, num_experts, use_fp8=True, return_recv_hook=True
    )
    (recv_x, scales), recv_count, handle, event, hook = out
    hook()
    event.current_stream_wait()
    assert recv_x.shape == (3, 10, hidden) and recv_x.dtype == torch.float8_e4m3fn
    assert scales.shape == (3, 10, hidden // 128) and scales.dtype == torch.float32
    assert scales.transpose(1, 2).is_contiguous() or scales.stride(1) == 1
    assert recv_count.tolist() == ([4, 4, 2] if rank == 0 else [2, 2, 4])
    rows = recv_x.float() * scales.repeat_interleave(128, dim=2)
    y = torch.full((3, 10, hidden), torch.nan, dtype=torch.bfloat16)
    for expert, count in enumerate(recv_count.tolist()):
        # Half of the rows came from each rank, the first half from rank 0.
        assert (rows[expert, : count // 2] == 1).all()
        assert (rows[expert, count // 2 : count] == 2).all()
        y[expert, :count] = rows[expert, :count].bfloat16()

    # The rows' place is the handle's; x itself is then not read.
    buffer.get_next_low_latency_combine_buffer(handle).copy_(y)
    back, event, hook = buffer.low_latency_combine(
        torch.zeros_like(y), topk_idx, topk_weights, handle, zero_copy=True, return_recv_hook=True
    )
    hook()
    assert torch.equal(back[:, 0], (1 + rank) * torch.tensor([0.75, 0.75, 0.75, 0.25, 0.75]))
    buffer.destroy()


def test_calls_as_in_deepeps_documentation():
    run_ranks(2, as_with_deepep)
