"""`ep_comm.deep_ep.ElasticBuffer` in every way, on a rank, against a loop over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases import Case, assert_same, to_numpy, to_torch
from deep_ep_normal import Rank
from oracle import Row, combine, expert_rows, rank_rows, sum_rows

from ep_comm import fp8
from ep_comm.deep_ep import ElasticBuffer, EPHandle, EventOverlap


class Layout:
    """What the ranks of a case get, by expert or by source rank, and what of it comes back."""

    def __init__(self, mine: Rank, do_expand: bool, alignment: int) -> None:
        self.mine, self.case, self.alignment = mine, mine.case, alignment
        self.do_expand = do_expand
        self.of_rank = [self._rows(rank)[0] for rank in range(mine.case.num_ranks)]
        self.rows, self.counts = self._rows(mine.rank)

    def _rows(self, rank: int) -> tuple[list[Row | None], list[int]]:
        per_rank = self.case.experts_per_rank
        if self.do_expand:
            return expert_rows(self.mine.topk, rank, per_rank, self.alignment)
        rows = rank_rows(self.mine.topk, rank, per_rank)
        chosen = self.mine.topk
        experts = [e - rank * per_rank for row in rows for e in chosen[row.source][row.token]]
        return list(rows), [experts.count(expert) for expert in range(per_rank)]

    def check_rows(self, got: torch.Tensor, num_rows: int | None = None) -> None:
        case = self.case
        zero = np.zeros(case.hidden, case.np_dtype)
        want = [
            zero
            if row is None
            else case.rows(row.source, case.tokens[row.source], salt=2)[row.token]
            for row in self.rows
        ]
        assert len(got) == (len(want) if num_rows is None else num_rows)
        wanted = np.array(want, case.np_dtype).reshape(-1, case.hidden)
        assert_same(to_numpy(got)[: len(want)], wanted, "rows")

    def owners(self, rank: int) -> Iterator[tuple[int, tuple[int, ...], int, int]]:
        """(row, place of a weight in it, source, token, k) of all entries that `rank` owns."""
        per_rank, k_of = self.case.experts_per_rank, range(self.case.num_topk)
        for place, row in enumerate(self.of_rank[rank]):
            if row is None:
                continue
            for k in k_of:
                expert = int(self.mine.topk[row.source][row.token][k])
                if expert < 0 or expert // per_rank != rank:
                    continue
                if row.expert is None:
                    yield row.source, (place, k), row.token, k
                elif row.expert == expert % per_rank:
                    yield row.source, (place,), row.token, k

    def weights_shape(self, rank: int) -> tuple[int, ...]:
        rows = len(self.of_rank[rank])
        return (rows,) if self.do_expand else (rows, self.case.num_topk)

    def check_weights(self, got: torch.Tensor) -> None:
        """Each is where its expert's row is; all others are 0."""
        want = np.zeros(self.weights_shape(self.mine.rank), np.float32)
        for source, place, token, k in self.owners(self.mine.rank):
            shape = (self.case.tokens[source], self.case.num_topk)
            want[place] = self.case.probabilities(source, shape, salt=3)[token, k]
        assert_same(to_numpy(got)[: len(want)], want, "weights")

    def made_weights(self, rank: int) -> np.ndarray:
        return self.case.probabilities(rank, self.weights_shape(rank), salt=8)

    def want_weights(self) -> np.ndarray:
        want = np.zeros((self.case.tokens[self.mine.rank], self.case.num_topk), np.float32)
        for rank in range(self.case.num_ranks):
            made = self.made_weights(rank)
            for source, place, token, k in self.owners(rank):
                if source == self.mine.rank:
                    want[token, k] = made[place]
        return want

    def made_rows(self, rank: int) -> np.ndarray:
        return self.case.rows(rank, len(self.of_rank[rank]), salt=4)

    def want_combined(self) -> np.ndarray:
        case, mine = self.case, self.mine
        of_token: dict[int, dict[int, dict[int, np.ndarray]]] = {}
        for rank in range(case.num_ranks):
            for row, made in zip(self.of_rank[rank], self.made_rows(rank), strict=True):
                if row is not None and row.source == mine.rank:
                    outputs = of_token.setdefault(row.token, {}).setdefault(rank, {})
                    outputs[row.expert or 0] = made
        want = [
            combine(topk, of_token.get(t, {}), case.num_ranks, case.num_ranks, case.hidden,
                    case.np_dtype)
            for t, topk in enumerate(mine.topk[mine.rank])
        ]  # fmt: skip
        return np.array(want, case.np_dtype).reshape(-1, case.hidden)

    def check_handle(self, handle: EPHandle, is_counted: bool) -> None:
        """All that callers read of it."""
        case, device = self.case, self.mine.x.device
        aligned = [-(-count // self.alignment) * self.alignment for count in self.counts]
        assert handle.num_recv_tokens_per_expert_list == (aligned if is_counted else [])
        ends = np.cumsum(aligned)
        if self.do_expand:
            ends = ends - aligned + self.counts
            unpadded = handle.num_unaligned_recv_tokens_per_expert
            assert unpadded.dtype == torch.int32 and unpadded.tolist() == self.counts
        else:
            assert handle.num_unaligned_recv_tokens_per_expert is None
        from_rank = [sum(row.source == r for row in self.mine.rows) for r in range(case.num_ranks)]
        for name, want in (
            ("psum_num_recv_tokens_per_expert", ends),
            ("psum_num_recv_tokens_per_scaleup_rank", np.cumsum(from_rank)),
        ):
            got = getattr(handle, name)
            assert got.dtype == torch.int32 and got.device == device
            assert got.tolist() == want.tolist(), name
            assert getattr(handle, name) is got
        assert handle.num_recv_tokens == len(self.mine.rows)
        assert (handle.do_expand, handle.num_experts) == (self.do_expand, case.num_experts)
        assert handle.expert_alignment == self.alignment


def buffer_of(case: Case, **how: Any) -> ElasticBuffer:
    sizes = dict(
        num_max_tokens_per_rank=max(*case.tokens, 1),
        hidden=case.hidden,
        num_topk=case.num_topk,
        explicitly_destroy=True,
    )
    return ElasticBuffer(dist.group.WORLD, **{**sizes, **how})


def most_rows(case: Case, do_expand: bool, alignment: int) -> int:
    rows = max(*case.tokens, 1) * case.num_ranks
    if not do_expand:
        return rows
    rows *= min(case.num_topk, case.experts_per_rank)
    return -(-(rows + case.experts_per_rank * (alignment - 1)) // alignment) * alignment


LAYOUTS = [(False, 1), (False, 8), (True, 1), (True, 8)]  # by expert or not, alignment


def every_way(rank: int, case: Case) -> None:
    """Dispatch and combine of one buffer in both layouts."""
    mine = Rank(rank, case)
    mine.x.requires_grad_()  # there is no autograd, whatever asks for it
    buffer = buffer_of(case)
    for do_expand, alignment in LAYOUTS:
        in_layout(mine, buffer, do_expand, alignment)
    buffer.destroy()


def in_layout(mine: Rank, buffer: ElasticBuffer, do_expand: bool, alignment: int) -> None:
    """Waiting for counts and not, with all that callers pass."""
    case, want = mine.case, Layout(mine, do_expand, alignment)
    for is_counted in (True, False):
        num_rows = None if is_counted else most_rows(case, do_expand, alignment)
        stats = torch.full((case.experts_per_rank,), 5, dtype=torch.int32, device=mine.device)
        recv_x, idx, weights, handle, event = buffer.dispatch(
            mine.x,
            topk_idx=mine.topk_idx,
            topk_weights=mine.weights,
            cumulative_local_expert_recv_stats=stats,
            num_experts=case.num_experts,
            expert_alignment=None if alignment == 1 else alignment,
            do_expand=do_expand,
            do_cpu_sync=None if is_counted else 0,
            previous_event=buffer.capture(),
            async_with_compute_stream=True,
            allocate_on_comm_stream=is_counted,
        )
        event.current_stream_wait()
        assert not recv_x.requires_grad
        want.check_rows(recv_x, num_rows)
        want.check_weights(weights)
        assert (idx is None) == do_expand
        if idx is not None:
            mine.check_topk(idx, weights)
        want.check_handle(handle, is_counted)
        assert (stats - 5).tolist() == want.counts
        assert torch.equal(handle.topk_idx, mine.topk_idx)
        assert handle.topk_idx.dtype == mine.topk_idx.dtype

        again, idx, weights, same, event = buffer.dispatch(
            mine.x, topk_weights=mine.weights, handle=handle, do_expand=do_expand,
            cumulative_local_expert_recv_stats=stats, num_sms=4,
        )  # fmt: skip
        assert event.event is None and same is handle and (idx is None) == do_expand
        want.check_rows(again, num_rows)
        want.check_weights(weights)
        assert (stats - 5).tolist() == [2 * count for count in want.counts]
        assert buffer.dispatch(mine.x, handle=handle)[2] is None

        check_combine(mine, want, buffer, handle, len(recv_x))


def check_combine(
    mine: Rank, want: Layout, buffer: ElasticBuffer, handle: EPHandle, num_rows: int
) -> None:
    """Rows that nobody dispatched are not read."""
    case = mine.case

    def filled(values: np.ndarray) -> torch.Tensor:
        rows = to_torch(values, mine.device)
        is_padding = torch.tensor([row is None for row in want.rows], dtype=torch.bool)
        rows[is_padding.to(mine.device)] = torch.nan
        return torch.cat([rows, rows.new_full((num_rows - len(rows), *rows.shape[1:]), torch.nan)])

    y, weights = filled(want.made_rows(mine.rank)), filled(want.made_weights(mine.rank))
    combined, back, event = buffer.combine(y, handle, topk_weights=weights)
    assert event.event is None
    assert_same(to_numpy(combined), want.want_combined(), "combined")
    assert_same(to_numpy(back), want.want_weights(), "weights")
    bias = [case.rows(mine.rank, len(mine.x), salt=salt) for salt in (5, 6)]
    given = tuple(to_torch(each, mine.device) for each in bias)
    for given_bias, terms in ((given[0], bias[:1]), (given, bias)):
        combined, back, event = buffer.combine(
            y, handle, bias=given_bias, async_with_compute_stream=True,
            allocate_on_comm_stream=True,
            previous_event_before_epilogue=EventOverlap(buffer.capture()),
        )  # fmt: skip
        event.current_stream_wait()
        wanted = sum_rows([want.want_combined(), *terms])
        assert back is None
        assert_same(to_numpy(combined), wanted, "with bias")


def fp8_rows(rank: int, case: Case) -> None:
    """Scales of any value arrive with their rows, a row each, or column by column."""
    mine = Rank(rank, case)
    buffer = buffer_of(case, use_fp8_dispatch=True)
    data, scales = fp8.quantize(torch.nan_to_num(mine.x))
    scales = (scales * 1.1).T.contiguous().T
    every: list = [None] * case.num_ranks
    dist.all_gather_object(every, (data.view(torch.uint8).cpu(), scales.cpu()))
    for do_expand, asked, is_counted, column_major, is_async in (
        (False, None, True, False, False),
        (False, 128, True, True, True),
        (False, None, False, True, False),
        (True, None, True, False, True),  # groups of 4, where 1 is asked for
        (True, 6, True, True, False),
        (True, 128, False, False, True),
        (True, None, False, True, False),
    ):
        alignment = asked or 1
        if do_expand:
            alignment = -(-alignment // 4) * 4
        want = Layout(mine, do_expand, alignment)
        how = dict(
            do_expand=do_expand,
            use_tma_aligned_col_major_sf=column_major,
            async_with_compute_stream=is_async,
        )
        (got, of_scales), _, _, handle, event = buffer.dispatch(
            (data, scales), mine.topk_idx, mine.weights, num_experts=case.num_experts,
            expert_alignment=asked, do_cpu_sync=is_counted, **how,
        )  # fmt: skip
        event.current_stream_wait()
        (again, again_scales), *_, event = buffer.dispatch((data, scales), handle=handle, **how)
        event.current_stream_wait()
        want.check_handle(handle, is_counted)
        assert got.dtype == fp8.FP8_DTYPE and of_scales.dtype == torch.float32
        assert len(got) == len(of_scales)
        strides = (1, -(-len(got) // 4) * 4) if column_major else (case.hidden // 128, 1)
        assert of_scales.stride() == strides
        rows = [(place, row) for place, row in enumerate(want.rows) if row is not None]
        for values, values_scales in ((got, of_scales), (again, again_scales)):
            values, values_scales = values.view(torch.uint8).cpu(), values_scales.cpu()
            for place, row in rows:
                sent, sent_scales = every[row.source]
                assert torch.equal(values[place], sent[row.token])
                assert torch.equal(values_scales[place], sent_scales[row.token])
    buffer.destroy()
