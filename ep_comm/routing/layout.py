"""Routing layout: which token goes to which rank.

Everything that is sent follows from it, so it is the same on every backend, bit by bit: a torch
reference that runs anywhere, and CUDA kernels (csrc/routing/slots.cuh) where the library is built.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch

from ep_comm import _native
from ep_comm._native import header
from ep_comm.errors import EPRoutingError


class RoutingLayout(NamedTuple):
    """The result of `layout_of`. All tensors are contiguous, on the device of the input.

    T = tokens of this rank, K = top-k, E = experts, R = ranks.

    Attributes:
        topk_idx: int32 [T, K]. Expert of each copy, or -1. From ``topk_idx`` in its order, from a
            ``routing_map`` ascending and then filled up with -1.
        num_tokens_per_rank: int32 [R]. Tokens, not copies: a token that goes to two experts of one
            rank counts once, because it is sent once.
        num_tokens_per_expert: int32 [E]. Copies, one for each entry of ``topk_idx``.
        is_token_in_rank: bool [T, R]. Whether the token goes to the rank.
    """

    topk_idx: torch.Tensor
    num_tokens_per_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


def layout_of(
    source: torch.Tensor, num_topk: int, num_experts: int, num_ranks: int, *, wait: bool = True
) -> RoutingLayout:
    """Compute who is sent what.

    Expert e lives on rank ``e // (num_experts // num_ranks)``. The result depends on the input's
    values only, not on device, grid size or run.

    Args:
        source: Contiguous. A topk_idx, int32 or int64 [T, K], of which -1 drops an entry. Or a
            routing_map, bool [T, E], with at most K true entries a row.
        num_topk: K.
        num_experts: E, a multiple of `num_ranks`.
        num_ranks: R.
        wait: Whether the host waits for the CUDA kernels, to be able to raise on bad content. Where
            they do not run the content is checked in any case.

    Raises:
        EPRoutingError: An entry is neither -1 nor an expert, a token names an expert twice, or a
            row of a routing_map has too many. Names the first such entry in order of tokens.
    """
    native = _native.load_for(source.device)
    if native is not None:
        layout, error = _launch_layout(native, source, num_topk, num_experts, num_ranks)
        if wait:
            raise_if_bad(error.tolist(), source, num_topk, num_experts)
        return layout
    if source.dtype == torch.bool:
        source = _topk_of_map(source, num_topk)
    return _reference_layout(source, num_experts, num_ranks)


def index_dtype(source: torch.Tensor) -> torch.dtype:
    """Return the type of the local expert indices that go with a routing."""
    return torch.int64 if source.dtype == torch.int64 else torch.int32


# ---- Bad content ---------------------------------------------------------------------------------


def _raise_bad_expert(token: int, k: int, value: int, num_experts: int) -> NoReturn:
    raise EPRoutingError(
        f"topk_idx: token {token}, k {k} is {value}, expected an expert in 0..{num_experts - 1} or "
        "-1 (dropped)"
    )


def _raise_duplicate(token: int, k: int, value: int) -> NoReturn:
    raise EPRoutingError(
        f"topk_idx: token {token}, k {k} is {value}, an expert that this token names already at a "
        "smaller k; each expert may come once"
    )


def _raise_too_many(token: int, column: int, count: int, num_topk: int) -> NoReturn:
    raise EPRoutingError(
        f"routing_map: token {token} has {count} true entries, expected at most num_topk = "
        f"{num_topk}; the first beyond that is expert {column}"
    )


# ---- Torch reference -----------------------------------------------------------------------------


def _first_true(mask: torch.Tensor) -> tuple[int, int] | None:
    """Return row and column of the first true entry of a 2-D mask in row-major order."""
    if not mask.any():
        return None
    # nonzero is in row-major order; argmax promises no particular one of several true entries.
    row, column = mask.nonzero()[0].tolist()
    return row, column


def _topk_of_map(routing_map: torch.Tensor, num_topk: int) -> torch.Tensor:
    """Turn a bool [T, E] map into int32 [T, K]: each row's experts ascending, then -1."""
    place = routing_map.cumsum(dim=1, dtype=torch.int32) - 1
    excess = _first_true(routing_map & (place >= num_topk))
    if excess is not None:
        token, column = excess
        _raise_too_many(token, column, int(routing_map[token].sum()), num_topk)
    topk_idx = torch.full(
        (routing_map.shape[0], num_topk), -1, dtype=torch.int32, device=routing_map.device
    )
    tokens, experts = routing_map.nonzero(as_tuple=True)
    topk_idx[tokens, place[tokens, experts].long()] = experts.to(torch.int32)
    return topk_idx


def _reference_layout(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> RoutingLayout:
    num_tokens, num_topk = topk_idx.shape
    sent = (topk_idx >= 0) & (topk_idx < num_experts)
    bad = ~sent & (topk_idx != -1)
    for k in range(1, num_topk):
        bad[:, k] |= sent[:, k] & (topk_idx[:, :k] == topk_idx[:, k : k + 1]).any(dim=1)
    first_bad = _first_true(bad)
    if first_bad is not None:
        token, k = first_bad
        value = int(topk_idx[token, k])
        if sent[token, k]:
            _raise_duplicate(token, k, value)
        _raise_bad_expert(token, k, value, num_experts)

    # Dropped entries mark one column too many, which is then cut off.
    rank = torch.where(sent, topk_idx // (num_experts // num_ranks), num_ranks).long()
    marked = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.bool, device=topk_idx.device)
    is_token_in_rank = marked.scatter_(1, rank, True)[:, :num_ranks].contiguous()
    return RoutingLayout(
        topk_idx=topk_idx.to(torch.int32, copy=True),
        num_tokens_per_rank=is_token_in_rank.sum(dim=0, dtype=torch.int32),
        num_tokens_per_expert=torch.bincount(topk_idx[sent], minlength=num_experts).to(torch.int32),
        is_token_in_rank=is_token_in_rank,
    )


# ---- CUDA kernels --------------------------------------------------------------------------------

INPUT_KINDS = {
    torch.int32: header.EP_INPUT_TOPK_INT32,
    torch.int64: header.EP_INPUT_TOPK_INT64,
    torch.bool: header.EP_INPUT_ROUTING_MAP,
}


def _launch_layout(
    native: _native.NativeLibrary,
    source: torch.Tensor,
    num_topk: int,
    num_experts: int,
    num_ranks: int,
) -> tuple[RoutingLayout, torch.Tensor]:
    """Start the kernels on the current stream, without waiting for them.

    Args:
        native: The CUDA library.
        source: As in `layout_of`, on a GPU.
        num_topk: K.
        num_experts: E.
        num_ranks: R.

    Returns:
        The layout, and what it found wrong with the content: int32 [4], for `raise_if_bad`.
    """
    num_tokens = source.shape[0]
    workspace_bytes = native.layout_workspace_bytes(num_tokens, num_experts, num_ranks)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=source.device)

    layout = RoutingLayout(
        topk_idx=empty(num_tokens, num_topk),
        num_tokens_per_rank=empty(num_ranks),
        num_tokens_per_expert=empty(num_experts),
        is_token_in_rank=empty(num_tokens, num_ranks, dtype=torch.bool),
    )
    error = empty(4)
    workspace = empty(workspace_bytes, dtype=torch.uint8)
    args = header.LayoutArgs(
        input=source.data_ptr(),
        topk_idx_out=layout.topk_idx.data_ptr(),
        num_tokens_per_rank=layout.num_tokens_per_rank.data_ptr(),
        num_tokens_per_expert=layout.num_tokens_per_expert.data_ptr(),
        is_token_in_rank=layout.is_token_in_rank.data_ptr(),
        error=error.data_ptr(),
        workspace=workspace.data_ptr(),
        workspace_bytes=workspace_bytes,
        num_tokens=num_tokens,
        num_topk=num_topk,
        num_experts=num_experts,
        num_ranks=num_ranks,
        input_kind=INPUT_KINDS[source.dtype],
    )
    with torch.cuda.device(source.device):
        native.launch("ep_layout", args, torch.cuda.current_stream().cuda_stream)
    return layout, error


def raise_if_bad(error: list[int], source: torch.Tensor, num_topk: int, num_experts: int) -> None:
    """Raise `EPRoutingError` for what the kernels found, if anything."""
    code, token, k, value = error
    if code == header.EP_ROUTING_OUT_OF_RANGE:
        # The kernel clamps the value to int32; the message should have what the caller passed.
        _raise_bad_expert(token, k, int(source[token, k]), num_experts)
    if code == header.EP_ROUTING_DUPLICATE:
        _raise_duplicate(token, k, value)
    if code == header.EP_ROUTING_TOO_MANY:
        _raise_too_many(token, k, value, num_topk)
