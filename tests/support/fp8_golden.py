"""Transformer Engine's bits of FP8 blocks, and what they were made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "te_block_fp8_golden.npz")


def golden_input() -> torch.Tensor:
    return torch.from_numpy(GOLDEN["x_bf16_bits"].copy()).view(torch.bfloat16)
