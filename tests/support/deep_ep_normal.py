"""`ep_comm.deep_ep.Buffer` in every way, on a rank, against a loop over tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases import Case, assert_same, to_numpy, to_torch
from oracle import combine, local_experts, rank_rows, sum_rows
from own_name import patience

from ep_comm import fp8
from ep_comm.deep_ep import Buffer, Config, EventHandle, EventOverlap

patience()
CASES = [
    Case(tokens=(7, 5), layout="rank"),
    Case(tokens=(0, 9), layout="rank", drop=0.3),
    Case(tokens=(6, 0, 11), layout="rank", num_topk=5, experts_per_rank=3, idx_dtype="int32"),
    Case(tokens=(9, 8, 7, 6), layout="rank", routing="zipf", num_topk=6, experts_per_rank=2),
    Case(tokens=(4, 3), layout="rank", dtype="fp32"),
    Case(tokens=(6, 5), layout="rank", dtype="fp16"),
]


def layout_of_case(case: Case, rank: int) -> dict[str, np.ndarray]:
    """What `get_dispatch_layout` has to count, as a loop."""
    topk = case.topk_idx(rank)
    in_rank = np.array(
        [
            [bool(local_experts(row, r, case.experts_per_rank)) for r in range(case.num_ranks)]
            for row in topk
        ],
        bool,
    ).reshape(len(topk), case.num_ranks)
    counts = [np.count_nonzero(topk == expert) for expert in range(case.num_experts)]
    return dict(
        num_tokens_per_rank=in_rank.sum(0).astype(np.int32),
        num_tokens_per_expert=np.array(counts, np.int32),
        is_token_in_rank=in_rank,
    )


class Rank:
    """One rank of a case: its inputs, and what it should get."""

    def __init__(self, rank: int, case: Case) -> None:
        self.rank, self.case, self.device = rank, case, case.device
        self.topk = [case.topk_idx(r) for r in range(case.num_ranks)]
        self.rows = rank_rows(self.topk, rank, case.experts_per_rank)
        self.x = to_torch(case.rows(rank, case.tokens[rank], salt=2), self.device)
        self.topk_idx = to_torch(self.topk[rank], self.device).to(getattr(torch, case.idx_dtype))
        self.weights = self.values((case.tokens[rank], case.num_topk), salt=3)
        self.y = to_torch(case.rows(rank, len(self.rows), salt=4), self.device)
        self.foreign = self.values((len(self.rows), case.num_topk), salt=8)

    def values(self, shape: tuple[int, int], salt: int) -> torch.Tensor:
        return to_torch(self.case.probabilities(self.rank, shape, salt), self.device)

    def layout(self, buffer: Buffer, **how: Any) -> dict[str, torch.Tensor]:
        """The arguments that callers pass on to `dispatch`, checked."""
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            self.topk_idx, self.case.num_experts, **how
        )
        assert isinstance(event, EventOverlap) and per_node is None
        got = dict(
            num_tokens_per_rank=per_rank,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
        )
        for name, want in layout_of_case(self.case, self.rank).items():
            assert_same(to_numpy(got[name]), want, name)
        return got

    def counts(self, alignment: int = 1) -> list[int]:
        per_rank = self.case.experts_per_rank
        chosen = [e for row in self.rows for e in self.local(row)]
        counts = [chosen.count(expert) for expert in range(per_rank)]
        return [-(-count // alignment) * alignment for count in counts]

    def local(self, row: Any) -> list[int]:
        return local_experts(
            self.topk[row.source][row.token], self.rank, self.case.experts_per_rank
        )

    def check_rows(self, got: torch.Tensor, num_rows: int | None = None) -> None:
        case = self.case
        want = [
            case.rows(row.source, case.tokens[row.source], salt=2)[row.token] for row in self.rows
        ]
        wanted = np.array(want, case.np_dtype).reshape(-1, case.hidden)
        assert num_rows in (None, len(got))
        assert_same(to_numpy(got)[: len(self.rows)], wanted, "rows")

    def check_topk(self, recv_topk_idx: torch.Tensor, recv_weights: torch.Tensor) -> None:
        case, idx, got = self.case, to_numpy(recv_topk_idx), to_numpy(recv_weights)
        assert recv_topk_idx.dtype == self.topk_idx.dtype
        assert (idx[len(self.rows) :] == -1).all()
        for i, row in enumerate(self.rows):
            shape = (case.tokens[row.source], case.num_topk)
            sent = case.probabilities(row.source, shape, salt=3)[row.token]
            for k, expert in enumerate(self.topk[row.source][row.token]):
                is_here = expert >= 0 and expert // case.experts_per_rank == self.rank
                assert idx[i, k] == (expert % case.experts_per_rank if is_here else -1)
                assert got[i, k] == (sent[k] if is_here else 0)

    def sums(self, rows_of: Any, width: int, dtype: np.dtype) -> np.ndarray:
        """[T, width], the sum over ranks of what `rows_of` gives a rank for its received rows."""
        case = self.case
        of_token: dict[int, dict[int, dict[int, np.ndarray]]] = {}
        for r in range(case.num_ranks):
            received = rank_rows(self.topk, r, case.experts_per_rank)
            values = rows_of(r, len(received))
            for row, value in zip(received, values, strict=True):
                if row.source == self.rank:
                    of_token.setdefault(row.token, {})[r] = {0: value}
        want = [
            combine(row, of_token.get(t, {}), case.num_ranks, case.num_ranks, width, dtype)
            for t, row in enumerate(self.topk[self.rank])
        ]
        return np.array(want, dtype).reshape(-1, width)

    def want_combined(self) -> np.ndarray:
        case = self.case
        return self.sums(lambda r, n: case.rows(r, n, salt=4), case.hidden, case.np_dtype)

    def want_weights(self) -> np.ndarray:
        """Summed over ranks, what they have for experts of others too."""
        case = self.case
        shape = case.num_topk
        return self.sums(
            lambda r, n: case.probabilities(r, (n, shape), salt=8), shape, np.dtype(np.float32)
        )


def every_way(rank: int, case: Case) -> None:
    """Dispatch and combine with all that DeepEP's callers pass."""
    mine = Rank(rank, case)
    buffer = Buffer(dist.group.WORLD, int(1e6), explicitly_destroy=True)
    assert (buffer.rank, buffer.group_size, buffer.group) == (
        rank,
        case.num_ranks,
        dist.group.WORLD,
    )
    assert buffer.num_nvl_bytes == int(1e6) and not buffer.low_latency_mode
    previous = buffer.capture()
    layout = mine.layout(buffer, previous_event=previous, async_finish=True)
    given = dict(
        x=mine.x.requires_grad_(),  # there is no autograd, whatever asks for it
        topk_idx=mine.topk_idx,
        topk_weights=mine.weights.requires_grad_(),
        **layout,
    )

    # With top-k, as all callers do.
    recv_x, idx, weights, counts, handle, event = buffer.dispatch(
        **given, expert_alignment=8, config=Buffer.get_dispatch_config(case.num_ranks),
        previous_event=previous, async_finish=True, allocate_on_comm_stream=True,
    )  # fmt: skip
    event.current_stream_wait()
    assert not recv_x.requires_grad and not weights.requires_grad
    mine.check_rows(recv_x, len(mine.rows))
    mine.check_topk(idx, weights)
    assert counts == mine.counts(alignment=8)
    check_handle(mine, handle, layout["is_token_in_rank"])

    # Again by its handle; the two combines, with weights of any ranks and a bias.
    again = buffer.dispatch(mine.x, handle=handle, config=Config(24, 8, 256))
    assert again[1:5] == (None, None, None, None)
    mine.check_rows(again[0], len(mine.rows))
    combined, added, event = buffer.combine(
        mine.y, handle, topk_weights=mine.foreign, previous_event=EventOverlap(EventHandle())
    )
    assert_same(to_numpy(combined), mine.want_combined(), "combined")
    assert_same(to_numpy(added), mine.want_weights(), "weights")
    bias = [to_torch(case.rows(rank, len(mine.x), salt=salt), mine.device) for salt in (5, 6)]
    for given_bias, terms in ((bias[0], bias[:1]), (tuple(bias), bias)):
        got, none, event = buffer.combine(mine.y, handle, bias=given_bias, async_finish=True)
        event.current_stream_wait()
        assert none is None
        want = sum_rows([mine.want_combined(), *map(to_numpy, terms)])
        assert_same(to_numpy(got), want, "combined with a bias")

    # Without top-k: the counts are those of the routing all the same.
    del given["topk_idx"], given["topk_weights"]
    recv_x, idx, weights, counts, handle, _ = buffer.dispatch(**given)
    mine.check_rows(recv_x, len(mine.rows))
    assert idx is None and weights is None and counts == mine.counts()
    assert_same(to_numpy(buffer.combine(mine.y, handle)[0]), mine.want_combined(), "combined")

    # With a number of rows that is always enough.
    most = max(case.tokens) * case.num_ranks
    recv_x, idx, weights, counts, handle, _ = buffer.internode_dispatch(
        mine.x, topk_idx=mine.topk_idx, topk_weights=mine.weights, **layout, num_worst_tokens=most
    )
    assert counts == []
    mine.check_rows(recv_x, most)
    mine.check_topk(idx, weights)
    y = torch.cat([mine.y, mine.y.new_full((most - len(mine.y), case.hidden), torch.nan)])
    assert_same(to_numpy(buffer.internode_combine(y, handle)[0]), mine.want_combined(), "combined")
    check_handle(mine, handle, layout["is_token_in_rank"])
    buffer.destroy()


def check_handle(mine: Rank, handle: tuple, is_token_in_rank: torch.Tensor) -> None:
    """It can be passed on, indexed and unpacked, as DeepEP's."""
    assert isinstance(handle, tuple) and len(handle) == 6
    matrix, _, _, _, in_rank, _ = handle
    assert handle[0] is matrix and handle[4] is in_rank is is_token_in_rank
    assert matrix.dtype == torch.int32 and matrix.device == mine.x.device
    from_rank = [sum(row.source == r for row in mine.rows) for r in range(mine.case.num_ranks)]
    assert matrix[:, mine.rank].tolist() == np.cumsum(from_rank).tolist()
    assert handle == handle and handle != handle[:]


def fp8_rows(rank: int, case: Case) -> None:
    """FP8 rows with scales of any value, row- or column-major, arrive as they were sent."""
    mine = Rank(rank, case)
    buffer = Buffer(dist.group.WORLD)
    data, scales = fp8.quantize(torch.nan_to_num(mine.x))
    scales = scales * 1.1
    scales = scales.T.contiguous().T  # as DeepGEMM wants them
    layout = mine.layout(buffer)
    got, *_, handle, _ = buffer.dispatch(
        (data, scales), topk_idx=mine.topk_idx, topk_weights=mine.weights, **layout
    )
    again, *_ = buffer.dispatch((data, scales), handle=handle)
    every = [None] * case.num_ranks
    dist.all_gather_object(every, (data.view(torch.uint8).cpu(), scales.cpu()))
    for values, of_scales in (got, again):
        assert values.dtype == fp8.FP8_DTYPE and of_scales.dtype == torch.float32
        for i, row in enumerate(mine.rows):
            sent, sent_scales = every[row.source]
            assert torch.equal(values[i].view(torch.uint8).cpu(), sent[row.token])
            assert torch.equal(of_scales[i].cpu(), sent_scales[row.token])
    buffer.destroy()


def dispatch(buffer: Buffer, mine: Rank, **how: Any) -> tuple:
    how = {**mine.layout(buffer), **how}
    return buffer.dispatch(mine.x, topk_idx=mine.topk_idx, topk_weights=mine.weights, **how)


def sizes_that_change(rank: int, device: str) -> None:
    """Buffers follow the calls; handles of those that became too small go on working."""

    def of(*tokens: int, **sizes: int) -> Rank:
        return Rank(rank, Case(tokens=tokens, layout="rank", device=device, **sizes))

    buffer = Buffer(dist.group.WORLD)
    assert buffer._buffers.newest is None
    small = of(3, 9)
    recv_x, *_, first, _ = dispatch(buffer, small)
    small.check_rows(recv_x)
    assert room(buffer) == [64]

    large = of(2, 300)  # rank 0 does not know of it
    recv_x, *_, handle, _ = dispatch(buffer, large)
    large.check_rows(recv_x)
    assert room(buffer) == [64, 320]
    for mine, kept in ((small, first), (large, handle), (small, first)):
        combined, _, _ = buffer.combine(mine.y, kept)
        assert_same(to_numpy(combined), mine.want_combined(), "combined")
        mine.check_rows(buffer.dispatch(mine.x, handle=kept)[0])

    dispatch(buffer, small)
    dispatch(buffer, of(321, 0))
    assert room(buffer) == [64, 320, 640]  # at least twice as much
    other = of(3, 9, hidden=40)
    other.check_rows(dispatch(buffer, other)[0])
    worst = dispatch(buffer, small, num_worst_tokens=1400)
    small.check_rows(worst[0], 1400)
    assert room(buffer) == [64, 320, 640, 64, 1280]
    buffer.destroy()


def room(buffer: Buffer) -> list[int]:
    return [each.native.config.max_tokens_per_rank for each in buffer._buffers._all]
