"""FP8 on the wire in all ways, for any backend: run on a rank, then checked against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cases import Case, assert_same, finished, to_numpy, to_torch
from oracle import expert_rows, fp32_to_bf16, rank_rows

from ep_comm import Buffer, DispatchHandle, fp8
from ep_comm.telemetry.records import OpRecord

# The value of each byte: sign, 4 bits of exponent, 3 of mantissa.
E4M3 = np.array(
    [
        (-1.0 if byte & 0x80 else 1.0)
        * (
            np.nan
            if byte & 0x7F == 0x7F
            else (byte & 7) * 2.0**-9
            if not byte & 0x78
            else (8 + (byte & 7)) * 2.0 ** ((byte >> 3 & 15) - 10)
        )
        for byte in range(256)
    ],
    np.float32,
)
CASE = Case(tokens=(6, 0, 9), hidden=256, num_topk=5, experts_per_rank=3, alignment=16)


def dispatch_all_ways(rank: int, case: Case, buffer: Buffer | None = None) -> dict[str, np.ndarray]:
    buffer = buffer or Buffer(None, case.config())
    topk = to_torch(case.topk_idx(rank), case.device)
    x = to_torch(case.rows(rank, case.tokens[rank], salt=2), case.device).requires_grad_()
    on_the_way = buffer.dispatch(
        x, topk, layout=case.layout, expert_alignment=case.alignment, wire_dtype=fp8.FP8_DTYPE
    )
    record = list(buffer.records)[-1]
    given = fp8.quantize(x.detach())
    handle = on_the_way.handle
    as_fp8, as_fp8_scales = buffer.dispatch(given, handle=handle).recv_x
    dequantised = buffer.dispatch(given, handle=handle, recv_dtype=torch.bfloat16).recv_x
    quantised, quantised_scales = buffer.dispatch(
        x.detach(), handle=handle, wire_dtype=fp8.FP8_DTYPE, recv_dtype=fp8.FP8_DTYPE
    ).recv_x
    if case.layout == "expert":
        as_fp8_scales = scales_a_row(as_fp8_scales, handle, case)
        quantised_scales = scales_a_row(quantised_scales, handle, case)
    grad = to_torch(case.rows(rank, handle.num_rows, salt=5), case.device)
    on_the_way.recv_x.backward(grad)
    bf16_grad = buffer.combine(grad, handle).combined_x
    check_edge(buffer, handle, x.detach(), grad, bf16_grad)
    grad_grads, grad_record = combine_backward(buffer, handle, x.detach(), fp8.FP8_DTYPE)
    bf16_grad_grads, _ = combine_backward(buffer, handle, x.detach(), None)
    taken: list[torch.Tensor] = []
    take = dict(take_grad=lambda *rows: taken.extend(rows))
    taken_grads, _ = combine_backward(buffer, handle, x.detach(), fp8.FP8_DTYPE, **take)
    taken_data, taken_scales, instead = taken
    assert instead is taken_grads[0] and instead.is_contiguous()
    if case.layout == "expert":
        taken_scales = scales_a_row(taken_scales, handle, case)
    return dict(
        grad_grad=to_numpy(grad_grads[0]),
        taken_data=to_numpy(taken_data.view(torch.uint8)),
        taken_scales=to_numpy(taken_scales),
        taken_grad_weights=to_numpy(taken_grads[1]),
        grad_weights=to_numpy(grad_grads[1]),
        bf16_grad_weights=to_numpy(bf16_grad_grads[1]),
        bf16_grad_grad=to_numpy(bf16_grad_grads[0]),
        bf16_rows=to_numpy(buffer.dispatch(x.detach(), handle=handle).recv_x),
        grad_wire_bytes=grad_record.wire_bytes_to_rank,
        on_the_way=to_numpy(on_the_way.recv_x),
        dequantised=to_numpy(dequantised),
        data=to_numpy(as_fp8.view(torch.uint8)),
        scales=to_numpy(as_fp8_scales),
        quantised=to_numpy(quantised.view(torch.uint8)),
        quantised_scales=to_numpy(quantised_scales),
        grad=to_numpy(x.grad),
        bf16_grad=to_numpy(bf16_grad),
        wire_bytes=record.wire_bytes_to_rank,
        rows_to_rank=record.rows_to_rank,
    )


def combine_backward(
    buffer: Buffer,
    handle: DispatchHandle,
    grad: torch.Tensor,
    wire_dtype: torch.dtype | None,
    **options: Any,
) -> tuple[tuple[torch.Tensor, ...], OpRecord]:
    """Gradients of the rows and the weights of a combine whose result has that gradient."""
    in_experts = handle.layout == "expert"
    rows = grad.new_zeros(handle.num_rows, grad.shape[1]).requires_grad_()
    shape = (handle.num_rows,) if in_experts else (handle.num_rows, handle.num_topk)
    weights = torch.zeros(shape, device=grad.device).requires_grad_()
    out = buffer.combine(rows, handle, weights, grad_wire_dtype=wire_dtype, **options)
    grad_weights = torch.arange(handle.topk_idx.numel(), device=grad.device) / 3
    grad_weights = grad_weights.view(handle.topk_idx.shape)
    grads = torch.autograd.grad(out[:2], (rows, weights), (grad, grad_weights))
    return grads, list(buffer.records)[-1]


def check_edge(
    buffer: Buffer,
    handle: DispatchHandle,
    x: torch.Tensor,
    grad: torch.Tensor,
    wanted: torch.Tensor,
) -> None:
    """Gradients of FP8 rows go in beside them, in BF16, with those of probabilities."""
    fp8_rows = dict(handle=handle, wire_dtype=fp8.FP8_DTYPE, recv_dtype=fp8.FP8_DTYPE)
    x = x.clone().requires_grad_()
    probs = torch.rand(handle.topk_idx.shape, device=x.device).requires_grad_()
    out = buffer.dispatch(x, topk_weights=probs, **fp8_rows)
    rows, scales = out.recv_x
    edge = out.recv_edge
    assert edge.shape == rows.shape and edge.dtype == torch.bfloat16 and edge._base is None
    assert edge.untyped_storage().nbytes() == 2 and edge.isnan().all()
    assert edge.requires_grad and not rows.requires_grad and not scales.requires_grad
    probs_grad = torch.rand(out.recv_topk_weights.shape, device=x.device)
    got, of_probs = torch.autograd.grad(
        (edge, out.recv_topk_weights), (x, probs), (grad, probs_grad)
    )
    assert got.dtype == torch.bfloat16
    assert_same(to_numpy(got), to_numpy(wanted), "gradient of FP8 rows")
    combined = buffer.combine(grad, handle, probs_grad).combined_topk_weights
    assert torch.equal(of_probs, combined)
    plain = buffer.dispatch(x.detach(), **fp8_rows)
    assert not plain.recv_edge.requires_grad and plain.recv_edge.shape == rows.shape
    assert buffer.dispatch(x, handle=handle, wire_dtype=fp8.FP8_DTYPE).recv_edge is None


def scales_a_row(scales: torch.Tensor, handle: DispatchHandle, case: Case) -> torch.Tensor:
    """[M, B] from each expert's block as Transformer Engine takes it."""
    offsets = finished(handle.device_expert_offsets).tolist()
    experts = fp8.split_scales(scales, offsets, case.hidden)
    assert [tuple(block.shape) for block in experts] == [
        (case.hidden // fp8.BLOCK, rows) for rows in handle.padded_tokens_per_expert.tolist()
    ]
    return torch.cat([block.t() for block in experts])


def check_fp8_results(case: Case, results: list[dict]) -> None:
    topk_idx = [case.topk_idx(r) for r in range(case.num_ranks)]
    quantised = [
        fp8.quantize(to_torch(case.rows(r, case.tokens[r], salt=2))) for r in range(case.num_ranks)
    ]
    for rank, got in enumerate(results):
        for a, b in (("dequantised", "on_the_way"), ("quantised", "data"),
                     ("quantised_scales", "scales"), ("grad", "bf16_grad"),
                     # The gradient of a combine is the dispatch of its result's gradient.
                     ("grad_grad", "dequantised"), ("bf16_grad_grad", "bf16_rows"),
                     ("taken_data", "data"), ("taken_scales", "scales"),
                     ("grad_weights", "bf16_grad_weights"),
                     ("taken_grad_weights", "bf16_grad_weights")):  # fmt: skip
            assert_same(got[a], got[b], f"{a} against {b} on rank {rank}")
        for peer, rows in enumerate(got["rows_to_rank"]):
            row_bytes = case.hidden + 4 * case.hidden // fp8.BLOCK
            num_bytes = 0 if peer == rank else rows * row_bytes
            assert got["wire_bytes"][peer] == got["grad_wire_bytes"][peer] == num_bytes
        if case.layout == "rank":
            rows = rank_rows(topk_idx, rank, case.experts_per_rank)
        else:
            rows, _ = expert_rows(topk_idx, rank, case.experts_per_rank, case.alignment)
            assert any(row is None for row in rows), "the case lost its padding"
        assert len(got["data"]) == len(rows)
        for i, row in enumerate(rows):
            if row is None:  # padding: byte 0, scale 1, so that any GEMM reads zeros
                assert not got["data"][i].any() and (got["scales"][i] == 1).all()
                assert not got["on_the_way"][i].any()
                continue
            data, scales = quantised[row.source]
            assert_same(got["data"][i], data.view(torch.uint8)[row.token].numpy(), "FP8 bytes")
            assert_same(got["scales"][i], scales[row.token].numpy(), "scales")
            values = E4M3[got["data"][i]] * np.repeat(got["scales"][i], fp8.BLOCK)
            assert_same(got["dequantised"][i], fp32_to_bf16(values), "dequantised row")
