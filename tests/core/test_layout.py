"""Routing layout: the torch reference against plain loops, the kernels against the reference."""

from __future__ import annotations

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_comm import _native
from ep_comm.errors import EPRoutingError
from ep_comm.routing.layout import RoutingLayout, layout_of

INT_TYPES = (torch.int32, torch.int64)


def routing_layout(
    topk_idx=None, *, routing_map=None, num_topk=None, num_experts, num_ranks
) -> RoutingLayout:
    source = topk_idx if routing_map is None else routing_map
    return layout_of(source, num_topk or source.shape[1], num_experts, num_ranks)


# ---- Independent oracle: plain Python, a token at a time -----------------------------------------


def loop_layout(rows: list[list[int]], num_experts: int, num_ranks: int) -> dict[str, list]:
    """The layout of `rows` (top-k lists, -1 = dropped), as nested lists by field name."""
    per_rank, per_expert = [0] * num_ranks, [0] * num_experts
    in_rank = []
    for row in rows:
        ranks = {expert * num_ranks // num_experts for expert in row if expert != -1}
        in_rank.append([r in ranks for r in range(num_ranks)])
        for r in ranks:
            per_rank[r] += 1
        for expert in row:
            if expert != -1:
                per_expert[expert] += 1
    return {
        "topk_idx": rows,
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_expert": per_expert,
        "is_token_in_rank": in_rank,
    }


def loop_first_error(rows: list[list[int]], num_experts: int) -> str | None:
    """How the message about the first bad entry of `rows` must begin; None if all are fine."""
    for token, row in enumerate(rows):
        for k, expert in enumerate(row):
            if not -1 <= expert < num_experts:
                return f"topk_idx: token {token}, k {k} is {expert}, expected an expert in 0.."
            if expert != -1 and expert in row[:k]:
                return f"topk_idx: token {token}, k {k} is {expert}, an expert that this token"
    return None


def as_topk(rows: list[list[int]], num_topk: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(-1, num_topk)


def as_map(rows: list[list[int]], num_experts: int) -> torch.Tensor:
    routing_map = torch.zeros(len(rows), num_experts, dtype=torch.bool)
    for token, row in enumerate(rows):
        routing_map[token, [expert for expert in row if expert != -1]] = True
    return routing_map


def ascending(rows: list[list[int]]) -> list[list[int]]:
    return [sorted(row, key=lambda expert: (expert == -1, expert)) for row in rows]


@st.composite
def routings(draw: st.DrawFn) -> tuple[list[list[int]], int, int, int]:
    """(rows, num_topk, num_experts, num_ranks), with dropped entries, possibly without tokens."""
    num_ranks = draw(st.integers(1, 9))
    num_experts = num_ranks * draw(st.integers(1, 7))
    num_topk = draw(st.integers(1, 32))
    rng = draw(st.randoms(use_true_random=False))
    rows = []
    for _ in range(draw(st.integers(0, 70))):
        chosen = rng.sample(range(num_experts), rng.randint(0, min(num_topk, num_experts)))
        row = chosen + [-1] * (num_topk - len(chosen))
        rng.shuffle(row)
        rows.append(row)
    return rows, num_topk, num_experts, num_ranks


def assert_is(layout: RoutingLayout, expected: dict[str, list], num_topk: int) -> None:
    num_tokens, num_ranks = len(expected["topk_idx"]), len(expected["num_tokens_per_rank"])
    shapes = {
        "topk_idx": (num_tokens, num_topk),
        "num_tokens_per_rank": (num_ranks,),
        "num_tokens_per_expert": (len(expected["num_tokens_per_expert"]),),
        "is_token_in_rank": (num_tokens, num_ranks),
    }
    for name, tensor in layout._asdict().items():
        assert tensor.shape == shapes[name], name
        assert tensor.dtype == (torch.bool if name == "is_token_in_rank" else torch.int32), name
        assert tensor.is_contiguous(), name
        assert tensor.tolist() == expected[name], name


# ---- Reference -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(routing=routings(), dtype=st.sampled_from(INT_TYPES))
def test_reference_from_topk(routing, dtype):
    rows, num_topk, num_experts, num_ranks = routing
    layout = routing_layout(
        as_topk(rows, num_topk, dtype), num_experts=num_experts, num_ranks=num_ranks
    )
    assert_is(layout, loop_layout(rows, num_experts, num_ranks), num_topk)


@pytest.mark.slow
@settings(deadline=None)
@given(routing=routings())
def test_reference_from_map(routing):
    rows, num_topk, num_experts, num_ranks = routing
    layout = routing_layout(
        routing_map=as_map(rows, num_experts),
        num_topk=num_topk,
        num_experts=num_experts,
        num_ranks=num_ranks,
    )
    assert_is(layout, loop_layout(ascending(rows), num_experts, num_ranks), num_topk)


@pytest.mark.slow
@settings(deadline=None)
@given(routing=routings(), dtype=st.sampled_from(INT_TYPES), data=st.data())
def test_reference_names_first_bad_entry(routing, dtype, data):
    rows, num_topk, num_experts, num_ranks = routing
    if not rows:
        rows = [[-1] * num_topk]
    values = st.integers(-3, num_experts + 1) | st.sampled_from([-(2**31), 2**31 - 1])
    if dtype == torch.int64:
        values |= st.sampled_from([-(2**63), 2**32, 2**63 - 1])  # 2**32 is 0 once it is cut off
    for _ in range(data.draw(st.integers(1, 3))):
        token = data.draw(st.integers(0, len(rows) - 1))
        rows[token][data.draw(st.integers(0, num_topk - 1))] = data.draw(values)
    expected = loop_first_error(rows, num_experts)
    topk_idx = as_topk(rows, num_topk, dtype)
    if expected is None:
        routing_layout(topk_idx, num_experts=num_experts, num_ranks=num_ranks)
        return
    with pytest.raises(EPRoutingError, match="^" + re.escape(expected)):
        routing_layout(topk_idx, num_experts=num_experts, num_ranks=num_ranks)


def test_map_row_with_too_many():
    routing_map = torch.zeros(5, 8, dtype=torch.bool)
    routing_map[1, [0, 7]] = True
    routing_map[3, [1, 4, 5, 6]] = True
    routing_map[4] = True
    with pytest.raises(
        EPRoutingError,
        match=r"^routing_map: token 3 has 4 true entries, expected at most num_topk = 2; the first "
        r"beyond that is expert 5$",
    ):
        routing_layout(routing_map=routing_map, num_topk=2, num_experts=8, num_ranks=2)


def test_input_is_neither_changed_nor_returned():
    topk_idx = torch.tensor([[3, -1], [0, 2]], dtype=torch.int32)
    layout = routing_layout(topk_idx, num_experts=4, num_ranks=2)
    layout.topk_idx.fill_(7)
    assert topk_idx.tolist() == [[3, -1], [0, 2]]


# ---- CUDA kernels --------------------------------------------------------------------------------


# (T, K, E, R): no tokens; fewer and more than a chunk of 32; one chunk a block and several; the
# limits of K, E and R; sizes that divide nothing.
SHAPES = [
    (0, 1, 1, 1),
    (0, 8, 256, 4),
    (1, 1, 1, 1),
    (1, 32, 4096, 64),
    (31, 2, 6, 3),
    (32, 8, 16, 2),
    (33, 32, 64, 64),
    (100, 5, 4096, 1024),
    (257, 32, 4096, 1),
    (777, 7, 320, 40),
    (4096, 8, 256, 4),
    (8192, 8, 128, 8),
    (16384, 6, 160, 16),
    (16385, 8, 256, 32),
    (50001, 3, 30, 6),
    (300007, 4, 64, 64),
]


def random_topk(shape: tuple[int, int, int, int], drop: float, seed: int) -> torch.Tensor:
    """int64 [T, K] without duplicates, a fraction `drop` of it (or all beyond E) dropped."""
    num_tokens, num_topk, num_experts, _ = shape
    generator = torch.Generator().manual_seed(seed)
    topk_idx = torch.full((num_tokens, num_topk), -1)
    # A random base and stride per token: distinct experts without a [T, E] matrix of scores.
    width = min(num_topk, num_experts)
    base = torch.randint(num_experts, (num_tokens, 1), generator=generator)
    most = max(1, num_experts // width)
    stride = torch.randint(1, most + 1, (num_tokens, 1), generator=generator)
    topk_idx[:, :width] = (base + stride * torch.arange(width)) % num_experts
    topk_idx[torch.rand(topk_idx.shape, generator=generator) < drop] = -1
    return topk_idx


def map_of(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    routing_map = torch.zeros(topk_idx.shape[0], num_experts + 1, dtype=torch.bool)
    routing_map.scatter_(1, torch.where(topk_idx < 0, num_experts, topk_idx), True)
    return routing_map[:, :num_experts].contiguous()


@pytest.fixture
def poisoned_kernels(monkeypatch):
    """The CUDA library is there, and fresh device memory holds garbage."""
    assert _native.load() is not None, _native.status()
    empty = torch.empty

    def poisoned_empty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.numel() > 0:
            tensor.view(torch.uint8).fill_(0xEE)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned_empty)


def assert_same_on_gpu(inputs: dict[str, torch.Tensor], **sizes: int) -> None:
    """Kernels and reference agree: bitwise the same layout, or the same error."""
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    try:
        expected = routing_layout(**inputs, **sizes)
    except EPRoutingError as error:
        with pytest.raises(EPRoutingError, match="^" + re.escape(str(error)) + "$"):
            routing_layout(**on_gpu, **sizes)
        return
    layout = routing_layout(**on_gpu, **sizes)
    for name, tensor in layout._asdict().items():
        want = getattr(expected, name)
        assert tensor.is_cuda and tensor.is_contiguous(), name
        assert tensor.dtype == want.dtype and tensor.shape == want.shape, name
        assert torch.equal(tensor.cpu(), want), name


class TestKernels:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
    def test_equal_reference(self, shape, drop, poisoned_kernels):
        _, num_topk, num_experts, num_ranks = shape
        topk_idx = random_topk(shape, drop, seed=len(str(shape)))
        sizes = {"num_experts": num_experts, "num_ranks": num_ranks}
        for dtype in INT_TYPES:
            assert_same_on_gpu({"topk_idx": topk_idx.to(dtype)}, **sizes)
        routing_map = map_of(topk_idx, num_experts)
        assert_same_on_gpu({"routing_map": routing_map}, num_topk=num_topk, **sizes)

    @pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 0])
    def test_report_first_bad_entry_of_topk(self, shape, poisoned_kernels):
        num_tokens, num_topk, num_experts, num_ranks = shape
        rng = random.Random(num_tokens)
        for dtype in INT_TYPES:
            values = [-2, num_experts, -(2**31), 2**31 - 1]
            if dtype == torch.int64:
                values += [-(2**63), 2**32, 2**63 - 1]
            for _ in range(8):
                topk_idx = random_topk(shape, 0.2, seed=rng.randrange(1000)).to(dtype)
                for _ in range(rng.randint(1, 5)):
                    token, k = rng.randrange(num_tokens), rng.randrange(num_topk)
                    duplicate = topk_idx[token, (k + 1) % num_topk].item()
                    topk_idx[token, k] = rng.choice([rng.choice(values), duplicate])
                assert_same_on_gpu(
                    {"topk_idx": topk_idx}, num_experts=num_experts, num_ranks=num_ranks
                )

    @pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 0 and s[2] > s[1]])
    def test_report_first_bad_row_of_map(self, shape, poisoned_kernels):
        num_tokens, num_topk, num_experts, num_ranks = shape
        rng = random.Random(num_tokens)
        good = map_of(random_topk(shape, 0.2, seed=1), num_experts)
        for num_chosen in (num_topk + 1, num_experts):
            routing_map = good.clone()
            for _ in range(3):
                row = torch.zeros(num_experts, dtype=torch.bool)
                row[rng.sample(range(num_experts), num_chosen)] = True
                routing_map[rng.randrange(num_tokens)] = row
            assert_same_on_gpu(
                {"routing_map": routing_map},
                num_topk=num_topk,
                num_experts=num_experts,
                num_ranks=num_ranks,
            )

    def test_run_on_the_current_stream(self, poisoned_kernels):
        topk_idx = random_topk((4096, 8, 256, 4), 0.1, seed=0)
        expected = routing_layout(topk_idx, num_experts=256, num_ranks=4)
        late = torch.full_like(topk_idx, 0).cuda()
        source = topk_idx.cuda()
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # a launch on any other stream would read the zeros
            late.copy_(source)
            layout = routing_layout(late, num_experts=256, num_ranks=4)
        stream.synchronize()
        assert torch.equal(layout.is_token_in_rank.cpu(), expected.is_token_in_rank)
