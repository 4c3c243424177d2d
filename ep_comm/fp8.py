"""FP8 E4M3 in 1x128 blocks with power-of-two scales: the wire format of FP8 dispatch.

The bits are those of Transformer Engine's ``Float8BlockScaling`` (its default, and the only one
supported here: ``NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1`` is refused). Checked against golden
vectors made by Transformer Engine 2.20.2 on an H200: ``tests/data/te_block_fp8_golden.npz``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ep_comm import _native
from ep_comm._native import header
from ep_comm.errors import EPArgumentError, EPUnsupportedError
from ep_comm.numeric import ceil_div

BLOCK = 128
COLUMNWISE_ROWS = 16  # of an expert are a multiple of it, for column-wise copies
FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0

# Rows as callers pass them: BF16 or FP32, or FP8 with one scale per block.
Payload = Tensor | tuple[Tensor, Tensor]

# Types of rows that can travel as FP8.
DTYPES = (torch.bfloat16, torch.float32)

# Types of rows, as kernels know them.
NATIVE_DTYPES = {
    torch.bfloat16: header.EP_BF16,
    torch.float32: header.EP_FP32,
    torch.float16: header.EP_FP16,
}
_EXPONENT_BITS = 0x7F800000
_TWO_POW_127_BITS = 0x7F000000


def check_hidden(hidden: int) -> None:
    """Refuse rows of `hidden` elements that cannot travel as FP8.

    Raises:
        EPArgumentError: They are no whole number of blocks.
        EPUnsupportedError: As `check_scales`.
    """
    if hidden % BLOCK:
        raise EPArgumentError(
            f"FP8 dispatch scales blocks of {BLOCK} elements: hidden {hidden} is not a multiple"
        )
    check_scales()


def has_other_scales() -> bool:
    """Return whether Transformer Engine is asked for scales that are no powers of two."""
    return os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0") != "0"


def check_scales() -> None:
    """Raise `EPUnsupportedError` where Transformer Engine would take other scales than ours."""
    if has_other_scales():
        raise EPUnsupportedError(
            "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 asks Transformer Engine for scales that are no "
            "powers of two; FP8 dispatch is exact only with powers of two. Unset it."
        )


def quantize(x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows block by block.

    Args:
        x_TH: [T, H] BF16 or FP32; H a multiple of 128.

    Returns:
        Bytes [T, H] ``float8_e4m3fn`` and scales [T, H / 128] FP32; bytes times scale gives the
        values back. A scale is a power of two and may be subnormal.

    Raises:
        EPArgumentError: H is not a multiple of 128.
    """
    num_tokens, hidden = x_TH.shape
    check_hidden(hidden)
    native = _native.load_for(x_TH.device)
    if native is not None and x_TH.dtype in DTYPES:
        return _native_quantize(native, x_TH.contiguous())
    blocks = x_TH.float().view(num_tokens, hidden // BLOCK, BLOCK)
    scale = _power_of_two_scale(blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=-1))
    # Clamped before the cast, which turns overflow into NaN; NaN itself passes the clamp.
    scaled = (blocks * scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(FP8_DTYPE).view(num_tokens, hidden), scale.reciprocal()


def _native_quantize(native: _native.NativeLibrary, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, hidden = x_TH.shape
    data = torch.empty(num_tokens, hidden, dtype=FP8_DTYPE, device=x_TH.device)
    scales = torch.empty(num_tokens, hidden // BLOCK, dtype=torch.float32, device=x_TH.device)
    args = header.QuantizeArgs(
        x=x_TH.data_ptr(),
        data=data.data_ptr(),
        scales=scales.data_ptr(),
        num_blocks=scales.numel(),
        dtype=NATIVE_DTYPES[x_TH.dtype],
    )
    with torch.cuda.device(x_TH.device):
        native.launch("ep_quantize", args, torch.cuda.current_stream().cuda_stream)
    return data, scales


def dequantize(x_fp8_TH: Tensor, scale_TB: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of quantised rows: [T, H] in `dtype`, one FP32 product rounded once."""
    num_tokens, hidden = x_fp8_TH.shape
    blocks = x_fp8_TH.float().view(num_tokens, hidden // BLOCK, BLOCK)
    return (blocks * scale_TB.unsqueeze(-1)).view(num_tokens, hidden).to(dtype)


def split_scales(scales: Tensor, expert_offsets: list[int], hidden: int) -> list[Tensor]:
    """Return the scales of each expert, as Transformer Engine's block-scaled GEMMs take them.

    Args:
        scales: FP32 [M * B] as dispatch gives them in the expert layout, B = hidden / 128.
        expert_offsets: E_local + 1 rows: where each expert's group begins, and where the last ends
            (``handle.device_expert_offsets.tolist()``); groups are multiples of 4 rows.
        hidden: Elements of a row.

    Returns:
        For each expert a view [B, rows]: block-major, rows contiguous. Behind the last group stand
        the scales, all 1, of rows that `num_worst_tokens` has room for.
    """
    blocks = hidden // BLOCK
    return [
        scales[first * blocks : end * blocks].view(blocks, end - first)
        for first, end in itertools.pairwise(expert_offsets)
    ]


def join_scales(scales_MB: Tensor, expert_offsets: list[int]) -> Tensor:
    """Turn scales a row [M, B] into the form that `split_scales` takes: the kernels' reference."""
    joined = scales_MB.flatten().clone()
    blocks = scales_MB.shape[1]
    for first, end in itertools.pairwise(expert_offsets):
        joined[first * blocks : end * blocks] = scales_MB[first:end].t().flatten()
    return joined


def columnwise(
    rows_MH: Tensor, scales: Tensor, rows_per_expert: Sequence[int], expert_offsets: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Make the copies of received rows that weight gradients read: columns, quantised anew.

    They are Transformer Engine's bits for the rows' BF16 values, of all experts in one launch.

    Args:
        rows_MH: ``float8_e4m3fn`` [M, H], contiguous, as dispatch gives them in the expert layout.
        scales: FP32 [M * H / 128], the same: see `split_scales`.
        rows_per_expert: Rows of each group, padding included; multiples of 16.
        expert_offsets: E_local + 1 numbers, int32 on the device of the rows: where each group
            begins, and where the last ends (``handle.device_expert_offsets``).

    Returns:
        For each expert its bytes transposed, ``float8_e4m3fn`` [H, rows], and FP32 [ceil(rows /
        128), H]: a scale for each 128 rows of a column, from the group's first row on.

    Raises:
        EPArgumentError: A group is no multiple of 16 rows, or there are more rows than M.
    """
    num_rows, hidden = rows_MH.shape
    if any(rows % COLUMNWISE_ROWS for rows in rows_per_expert) or sum(rows_per_expert) > num_rows:
        raise EPArgumentError(
            f"column-wise copies need groups of a multiple of {COLUMNWISE_ROWS} rows, {num_rows} "
            f"in all; got {list(rows_per_expert)}"
        )
    tiles = [ceil_div(rows, BLOCK) for rows in rows_per_expert]
    data = torch.empty(sum(rows_per_expert) * hidden, dtype=FP8_DTYPE, device=rows_MH.device)
    scales_TH = torch.empty(sum(tiles), hidden, dtype=torch.float32, device=rows_MH.device)
    copies = [
        (of_expert.view(hidden, rows), of_blocks)
        for of_expert, of_blocks, rows in zip(
            data.split([rows * hidden for rows in rows_per_expert]),
            scales_TH.split(tiles),
            rows_per_expert,
            strict=True,
        )
    ]
    native = _native.load_for(rows_MH.device)
    if native is None:
        ends = list(itertools.accumulate(rows_per_expert, initial=0))
        for (first, end), blocks, copy in zip(
            itertools.pairwise(ends), split_scales(scales, ends, hidden), copies, strict=True
        ):
            _quantize_columns(dequantize(rows_MH[first:end], blocks.t(), torch.bfloat16), *copy)
        return copies
    args = header.ColumnwiseArgs(
        rows=rows_MH.data_ptr(),
        scales=scales.data_ptr(),
        expert_offsets=expert_offsets.data_ptr(),
        data=data.data_ptr(),
        column_scales=scales_TH.data_ptr(),
        num_experts=len(rows_per_expert),
        hidden=hidden,
        num_tiles=len(scales_TH),
    )
    with torch.cuda.device(rows_MH.device):
        native.launch("ep_columnwise", args, torch.cuda.current_stream().cuda_stream)
    return copies


def _quantize_columns(values_MH: Tensor, data_HM: Tensor, scale_TH: Tensor) -> None:
    """Write the columns of an expert's rows, in blocks of 128 rows and a smaller last one."""
    for tile, block in enumerate(values_MH.split(BLOCK) if len(values_MH) else ()):
        first, padding = tile * BLOCK, BLOCK - len(block)
        column_blocks = torch.nn.functional.pad(block.t(), (0, padding))  # zeros change no scale
        data, scale = quantize(column_blocks.contiguous())
        data_HM[:, first : first + len(block)] = data[:, : len(block)]
        scale_TH[tile] = scale[:, 0]


def _power_of_two_scale(amax: Tensor) -> Tensor:
    """Return min(2^floor(log2(448 / amax)), 2^127), exactly; 1 where amax is 0 or infinite."""
    fp8_max = torch.full_like(amax, FP8_MAX)  # a number would be multiplied by the inverse of amax
    exponent = (fp8_max / amax).view(torch.int32) & _EXPONENT_BITS  # drops the mantissa: a floor
    scale = exponent.clamp(max=_TWO_POW_127_BITS).view(torch.float32)
    return torch.where((amax == 0) | amax.isinf(), 1.0, scale)
