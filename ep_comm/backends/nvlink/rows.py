"""The rows of NVLink operations: what goes in, and where it comes out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ep_comm import fp8
from ep_comm._native import header
from ep_comm.backends.nvlink.routing import NVLinkRouting
from ep_comm.backends.nvlink.tuning import (
    COMBINE_CHUNK_BYTES,
    DISPATCH_CHUNK_BYTES,
    chunk_tokens,
)
from ep_comm.backends.requests import CombineRequest, Received
from ep_comm.blank import Make
from ep_comm.routing.layout import index_dtype

_RECV_KINDS = {torch.bfloat16: header.EP_RECV_BF16, torch.float32: header.EP_RECV_FP32}


def tag(*call: int) -> int:
    """Return 0 to 255, the same for the same call on every rank: chunks carry it."""
    return hash(call) & 0xFF  # a hash of integers is the same in every process


def tag_of_rows(args: header.DispatchArgs, x: Tensor) -> int:
    """Return the tag of rows that may travel before anything else of their call is known."""
    return tag(fp8.NATIVE_DTYPES.get(x.dtype, -1), args.row_bytes, args.scale_bytes)


def whole_weight_rows(weights: Tensor | None) -> Tensor | None:
    """Return probabilities as bulk copies take them: rows of 16 bytes, at such an address."""
    if weights is None:
        return None
    if weights.shape[1] % 4:
        return F.pad(weights, (0, -weights.shape[1] % 4))
    return weights.clone() if weights.data_ptr() % 16 else weights


def describe_payload(args: header.DispatchArgs, x: Tensor, scales: Tensor | None) -> None:
    """Set the rows that are sent, and their scales."""
    args.x = x.data_ptr()
    args.scales = None if scales is None else scales.data_ptr()
    args.row_bytes = x.shape[1] * x.element_size()
    args.scale_bytes = 0 if scales is None else scales.shape[1] * 4


def describe_rows(
    args: header.DispatchArgs,
    routing: NVLinkRouting,
    x: Tensor,
    scales: Tensor | None,
    weights: Tensor | None,
    recv_dtype: torch.dtype,
) -> None:
    """Set what is sent, and along which routing."""
    describe_payload(args, x, scales)
    args.weights = None if weights is None else weights.data_ptr()
    args.recv_topk_idx = None  # see allocate_experts
    args.routing = routing.native
    args.weight_bytes = 0 if weights is None else routing.native.num_topk4 * 4
    args.chunk_tokens = chunk_tokens(DISPATCH_CHUNK_BYTES, args.row_bytes)
    args.recv_kind = header.EP_RECV_BYTES
    if scales is not None and recv_dtype != fp8.FP8_DTYPE:
        args.recv_kind = _RECV_KINDS[recv_dtype]


def allocate_rows(
    args: header.DispatchArgs,
    routing: NVLinkRouting,
    hidden: int,
    recv_dtype: torch.dtype,
    make: Make,
) -> Received:
    """Allocate the outputs, whose number of rows is known, with what `blank.maker` gives."""
    num_rows, by_expert = routing.num_rows, routing.layout == "expert"
    x = make((num_rows, hidden), (hidden, 1), recv_dtype)
    scales = weights = None
    if recv_dtype == fp8.FP8_DTYPE:
        blocks = hidden // fp8.BLOCK
        if by_expert:
            scales = make((num_rows * blocks,), (1,), torch.float32)
        else:
            scales = make((num_rows, blocks), (blocks, 1), torch.float32)
    if args.weight_bytes:
        if by_expert:
            weights = make((num_rows,), (1,), torch.float32)
        else:
            weights = make((num_rows, routing.num_topk), (routing.num_topk, 1), torch.float32)
    args.num_rows = num_rows
    args.recv_x = x.data_ptr()
    args.recv_scales = None if scales is None else scales.data_ptr()
    args.recv_weights = None if weights is None else weights.data_ptr()
    return Received(x, scales, weights)


def allocate_experts(
    args: header.DispatchArgs, routing: NVLinkRouting, source: Tensor, make: Make
) -> Tensor:
    """Allocate the rows' local experts [N, K], which a first dispatch of the rank layout fills.

    Their type is that of the experts in `source`.
    """
    dtype, num_topk = index_dtype(source), routing.num_topk
    experts = make((routing.num_rows, num_topk), (num_topk, 1), dtype)
    args.recv_topk_idx = experts.data_ptr()
    args.recv_idx_bytes = dtype.itemsize
    return experts


def describe_sums(
    args: header.CombineArgs,
    routing: NVLinkRouting,
    request: CombineRequest,
    combined: Tensor,
    weights: Tensor | None,
) -> None:
    """Set what a combine adds up, and where the results go."""
    x, topk_weights, _, adds_weights = request
    args.x = x.data_ptr()
    args.weights = None if topk_weights is None else topk_weights.data_ptr()
    args.routing = routing.native
    args.combined_x = combined.data_ptr()
    args.combined_weights = None if weights is None else weights.data_ptr()
    args.row_bytes = row_bytes = x.shape[1] * x.element_size()
    args.adds_weights = adds_weights
    args.dtype = fp8.NATIVE_DTYPES[x.dtype]
    args.tag = tag(routing.ticket, args.dtype, row_bytes, weights is not None, adds_weights)
    args.chunk_rows = chunk_tokens(COMBINE_CHUNK_BYTES, row_bytes)
