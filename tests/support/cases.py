"""Test cases of dispatch and combine: sizes, routing, and the inputs that follow from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from oracle import fp32_to_bf16

from ep_comm import EPConfig


@dataclass(frozen=True, kw_only=True)
class Case:
    """One group, one routing. Every rank can compute the inputs of all ranks from it."""

    tokens: tuple[int, ...] = (7, 5)
    experts_per_rank: int = 4
    num_topk: int = 2
    hidden: int = 24
    dtype: str = "bf16"
    layout: str = "expert"
    alignment: int = 4
    ranks_per_node: int | None = None
    routing: str = "uniform"
    drop: float = 0.0
    idx_dtype: str = "int64"
    as_routing_map: bool = False
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"

    @property
    def num_ranks(self) -> int:
        return len(self.tokens)

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.experts_per_rank

    @property
    def node_size(self) -> int:
        return self.ranks_per_node or self.num_ranks

    @property
    def np_dtype(self) -> np.dtype:
        return np.dtype({"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}[self.dtype])

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.np_dtype.itemsize

    def config(self, **changes) -> EPConfig:
        sizes = dict(
            num_experts=self.num_experts,
            hidden=self.hidden,
            max_tokens_per_rank=max(*self.tokens, 1),
            num_topk=self.num_topk,
            dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.dtype, torch.float32),
            ranks_per_node=self.ranks_per_node,
            timeout_s=20.0,
            backend=self.backend,
        )
        return EPConfig(**{**sizes, **changes})

    def topk_idx(self, rank: int) -> np.ndarray:
        """[T, K], -1 where dropped."""
        rng = np.random.default_rng([self.seed, rank, 1])
        experts = np.arange(self.num_experts)
        if self.routing == "uniform":
            weights = np.ones(self.num_experts)
        elif self.routing == "zipf":
            weights = 1.0 / (1.0 + experts) ** 1.5
        elif self.routing == "last_rank":
            weights = np.where(experts >= self.num_experts - self.experts_per_rank, 1.0, 0.0)
        else:
            assert self.routing == "one_expert"
            weights = np.where(experts == self.num_experts // 2, 1.0, 0.0)
        possible = int(np.count_nonzero(weights))
        num_chosen = min(self.num_topk, possible)
        topk = np.full((self.tokens[rank], self.num_topk), -1)
        for token in range(self.tokens[rank]):
            chosen = rng.choice(experts, num_chosen, replace=False, p=weights / weights.sum())
            topk[token, :num_chosen] = chosen
            topk[token, rng.random(self.num_topk) < self.drop] = -1
        return np.sort(topk)[:, ::-1].copy() if self.seed % 2 else topk

    def rows(self, rank: int, num_rows: int, salt: int) -> np.ndarray:
        """[num_rows, hidden] with many magnitudes, and a few zeros of both signs, inf and NaN."""
        rng = np.random.default_rng([self.seed, rank, salt])
        values = rng.standard_normal((num_rows, self.hidden)) * 10.0 ** rng.integers(
            -4, 5, (num_rows, self.hidden)
        )
        kind = rng.random(values.shape)
        for low, special in ((0.0, 0.0), (0.02, -0.0), (0.04, np.inf), (0.05, -np.inf)):
            values[(kind >= low) & (kind < low + 0.01)] = special
        values[(kind >= 0.06) & (kind < 0.065)] = np.nan
        values = values.astype(np.float32)
        if self.dtype == "bf16":
            return fp32_to_bf16(values)
        with np.errstate(over="ignore"):
            return values.astype(self.np_dtype)

    def probabilities(self, rank: int, shape: tuple[int, ...], salt: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, rank, salt])
        return rng.random(shape).astype(np.float32) - 0.25


def before_host_waits() -> None:
    """Replaced by virtual_ranks.py, to have ranks meet."""


def wait_for_stream() -> None:
    before_host_waits()
    torch.cuda.current_stream().synchronize()


def to_torch(rows: np.ndarray, device: str = "cpu") -> torch.Tensor:
    if device == "cuda":
        wait_for_stream()  # as in `finished`
    if rows.dtype == np.uint16:
        return torch.from_numpy(rows.view(np.int16).copy()).to(device).view(torch.bfloat16)
    return torch.from_numpy(rows.copy()).to(device)


def finished(rows: torch.Tensor) -> torch.Tensor:
    """The tensor, complete. Not left to the copy: that would hold up the other virtual ranks."""
    if rows.is_cuda:
        wait_for_stream()
    return rows


def to_numpy(rows: torch.Tensor) -> np.ndarray:
    rows = finished(rows).detach().cpu()
    if rows.dtype == torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16)
    return rows.numpy()


def assert_same(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Bitwise equality, except that NaN equals NaN."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} instead of {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    unsigned = np.dtype(f"u{actual.dtype.itemsize}")
    same = actual.view(unsigned) == expected.view(unsigned)
    same |= is_nan(actual) & is_nan(expected)
    assert same.all(), f"{what}: {np.count_nonzero(~same)} of {same.size} elements differ"


def is_nan(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:
        return ((array & 0x7F80) == 0x7F80) & ((array & 0x7F) != 0)
    return np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)
