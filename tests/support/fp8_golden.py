"""Transformer Engine's bits of FP8 blocks, and what they were made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "te_block_fp8_golden.npz")


def golden_input() -> torch.Tensor:
    return torch.from_numpy(GOLDEN["x_bf16_bits"].copy()).view(torch.bfloat16)


def assert_same_bits(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Bitwise equality, except that any NaN equals any NaN."""
    unsigned = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    want = torch.from_numpy(np.ascontiguousarray(expected)).view(unsigned)
    same = actual.contiguous().view(unsigned) == want
    both_nan = actual.float().isnan() & want.view(actual.dtype).float().isnan()
    assert bool((same | both_nan).all()), f"{int((~(same | both_nan)).sum())} elements differ"
