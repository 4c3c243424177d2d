"""What runs beside the operations: a dense GEMM, or the grouped GEMM of a model's experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ep_comm.backends.nvlink.prices import gemm_tiles
from ep_comm.bench.overlap.settings import ExpertShape, GemmShape
from ep_comm.job.exits import needs_extra


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """A GEMM, or a group of them in one call.

    Attributes:
        name: In the tables.
        tiles: Of its output, see `gemm_tiles`.
        call: Launches it on the current stream.
    """

    name: str
    tiles: int
    call: Callable[[], object]


def dense(shape: GemmShape, device: torch.device) -> Gemm:
    """Return a BF16 GEMM of random numbers: zeros would spare the GPU power."""
    a_MK = torch.randn(shape.m, shape.k, device=device).bfloat16()
    b_KN = torch.randn(shape.n, shape.k, device=device).bfloat16().T
    out_MN = a_MK.new_empty(shape.m, shape.n)

    def call() -> None:
        torch.mm(a_MK, b_KN, out=out_MN)

    return Gemm(name=str(shape), tiles=gemm_tiles(shape.m, shape.n), call=call)


def grouped(shape: ExpertShape, rows_of_experts: Sequence[int], device: torch.device) -> Gemm:
    """Return the first layer of a model's experts, forward, as Transformer Engine computes it.

    Args:
        shape: The model's.
        rows_of_experts: Rows of each expert of this rank.
        device: Of the GPU.

    Raises:
        UserError: Transformer Engine is not installed.
    """
    rows = [int(count) for count in rows_of_experts]
    with needs_extra("te"):
        from transformer_engine.pytorch import GroupedLinear
    layer = GroupedLinear(
        len(rows),
        shape.hidden,
        2 * shape.ffn,
        bias=False,
        params_dtype=torch.bfloat16,
        device=str(device),
    )
    x_MH = torch.randn(sum(rows), shape.hidden, device=device).bfloat16()

    @torch.no_grad()
    def call() -> None:
        layer(x_MH, rows)

    tiles = sum(gemm_tiles(count, 2 * shape.ffn) for count in rows)
    return Gemm(name=f"experts of {shape.name}", tiles=tiles, call=call)
