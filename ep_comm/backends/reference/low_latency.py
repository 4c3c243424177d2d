"""Low-latency dispatch and combine in plain torch, over the messages of the reference backend.

This is where the numerics of low latency are written down (`ep_comm.low_latency` has them in
words). Fast backends need no flags beside their data: a receiver waits until no 16-byte word of it
is all ones. So such a word is changed before it is sent, here too, and on the own rank too: what
arrives depends on nothing but what was sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_comm import fp8_low_latency
from ep_comm.backends.reference.operations import Operations
from ep_comm.backends.reference.rows import sum_in_order, to_bytes, tokens_to_ranks
from ep_comm.backends.requests import (
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    Pending,
)
from ep_comm.fp8_low_latency import ScaleForm
from ep_comm.routing.layout import layout_of

_ALL_ONES = -1  # the waiting pattern, as a signed integer
_BF16_IN_A_WORD = 8
_BF16_NAN = 0x7FFF
_FP32_NAN = 0x7FFFFFFF


def rows_to_send(x_TH: Tensor) -> Tensor:
    """Copy BF16 rows, without the waiting pattern.

    Of 8 elements, from a multiple of 8 on, that all have the bits 0xFFFF, the first becomes 0x7FFF:
    another NaN.
    """
    rows = x_TH.clone()
    num_words = rows.shape[1] // _BF16_IN_A_WORD
    words = rows.view(torch.int16).view(len(rows), num_words, _BF16_IN_A_WORD)
    words[..., 0][(words == _ALL_ONES).all(dim=-1)] = _BF16_NAN
    return rows


def weights_to_send(weights: Tensor) -> Tensor:
    """FP32 weights, with 0x7FFFFFFF, another NaN, for one with the bits 0xFFFFFFFF."""
    bits = weights.view(torch.int32)
    return torch.where(bits == _ALL_ONES, _FP32_NAN, bits).view(torch.float32)


@dataclass(kw_only=True)
class LowLatencyRouting:
    """Where the rows of one dispatch went; N rows came, of E experts here.

    Attributes:
        epoch: Number of the dispatch.
        topk_idx: [T, K] int32 of this rank's tokens.
        sent_tokens: For each rank r, the tokens [n_r] int64 that went there, ascending.
        recv_rows: Rows that came from each rank.
        recv_topk_idx: [N, K] local experts of each row that came, -1 elsewhere.
        place_NE: [N, E] int64, where in an expert's rows that row stands; -1 where nowhere.
        weights_NK: FP32 [N, K] that came with the rows, or None.
    """

    epoch: int
    topk_idx: Tensor
    sent_tokens: tuple[Tensor, ...]
    recv_rows: tuple[int, ...]
    recv_topk_idx: Tensor
    place_NE: Tensor
    weights_NK: Tensor | None


class ReferenceLowLatency(Operations):
    """See `ep_comm.backends.base.LowLatencyBackend`, whose methods these are."""

    def num_kept_ints(self, max_tokens: int, num_topk: int) -> int:
        """Return 0: what a dispatch leaves has tensors of its own."""
        return 0

    def dispatch(self, request: LowLatencyDispatchRequest) -> Pending[LowLatencyRouting]:
        """Exchange headers, and send experts, rows and weights."""
        x, form, weights = request.x, request.sizes.scale_form, request.topk_weights
        num_topk = request.topk_idx.shape[1]
        num_ranks = self.transport.num_ranks
        sent = layout_of(request.topk_idx, num_topk, self.config.num_experts, num_ranks)
        topk_idx, is_token_in_rank = sent.topk_idx, sent.is_token_in_rank
        is_token_in_rank[:, list(self.transport.masked)] = False
        sent_tokens = tokens_to_ranks(is_token_in_rank)
        record = self.recorder.start("low_latency_dispatch", x.device)
        recv_rows = self._exchange_headers(
            record,
            tuple(len(tokens) for tokens in sent_tokens),
            max_rows=request.sizes.max_tokens,
            max_tokens=request.sizes.max_tokens,
            num_topk=num_topk,
            has_weights=weights is not None,
            scale_form=form,
        )
        num_received = sum(recv_rows)

        if form is None:
            rows = to_bytes(rows_to_send(x))
        else:
            data, scales = fp8_low_latency.quantize(x, form)
            rows = torch.cat([to_bytes(data), to_bytes(scales)], dim=1)
        send = [rows[tokens] for tokens in sent_tokens]
        self._record_payload(record, send)
        recv = rows.new_empty(num_received, rows.shape[1])

        # For each row its token, and its experts on the rank that it goes to.
        local_TK = topk_idx % self.num_local_experts  # of dropped entries: never selected
        experts = self._for_owners(local_TK, topk_idx, sent_tokens, -1)
        send_meta = [
            torch.cat([tokens.int().unsqueeze(1), of_rank], dim=1)
            for tokens, of_rank in zip(sent_tokens, experts, strict=True)
        ]
        recv_meta = topk_idx.new_empty(num_received, 1 + num_topk)
        exchanges = [
            self._send_rows(record, send_meta, recv_meta, recv_rows, "routing"),
            self._send_rows(record, send, recv, recv_rows, "rows"),
        ]
        recv_weights = None
        if weights is not None:
            recv_weights = weights.new_empty(num_received, num_topk)
            send_weights = self._for_owners(weights_to_send(weights), topk_idx, sent_tokens, 0.0)
            exchanges.append(
                self._send_rows(record, send_weights, recv_weights, recv_rows, "weights")
            )

        def finish() -> LowLatencyRouting:
            waits = [record.wait_s_by_rank, *(exchange.wait() for exchange in exchanges)]
            recv_topk_idx = recv_meta[:, 1:]
            self._check_received(recv_topk_idx)
            place_NE = self._write_received(request, recv, recv_meta, recv_rows)
            _add_waits(request.wait_stats, waits)
            self.recorder.finish(record)
            return LowLatencyRouting(
                epoch=record.epoch,
                topk_idx=topk_idx,
                sent_tokens=sent_tokens,
                recv_rows=recv_rows,
                recv_topk_idx=recv_topk_idx,
                place_NE=place_NE,
                weights_NK=recv_weights,
            )

        return Pending(finish=finish)

    def combine(
        self, routing: LowLatencyRouting, request: LowLatencyCombineRequest
    ) -> Pending[None]:
        """Exchange headers, bring weights, and send one partial row a token and rank."""
        x, weights = request.x, request.topk_weights
        sent_rows = [len(tokens) for tokens in routing.sent_tokens]  # and as many come back
        record = self.recorder.start("low_latency_combine", x.device)
        self._exchange_headers(
            record,
            routing.recv_rows,
            expected_rows=sent_rows,
            routing_epoch=routing.epoch,
            has_weights=weights is not None,
        )
        waits = [record.wait_s_by_rank]
        weights_NK = routing.weights_NK
        if weights is not None:
            weights_NK = weights.new_empty(sum(routing.recv_rows), weights.shape[1])
            send_weights = self._for_owners(
                weights_to_send(weights), routing.topk_idx, routing.sent_tokens, 0.0
            )
            waits.append(
                self._send_rows(
                    record, send_weights, weights_NK, routing.recv_rows, "weights"
                ).wait()
            )
        assert weights_NK is not None  # the caller has seen to it
        partials = _sum_weighted(x, routing, weights_NK).bfloat16()
        send = to_bytes(partials).split(routing.recv_rows)
        self._record_payload(record, send)
        recv = x.new_empty(sum(sent_rows), x.shape[2])
        exchange = self._send_rows(record, send, to_bytes(recv), sent_rows, "rows")

        def finish() -> None:
            waits.append(exchange.wait())
            by_rank = zip(routing.sent_tokens, recv.split(sent_rows), strict=True)
            request.out.copy_(sum_in_order(len(request.out), by_rank)[0])  # rounds to BF16
            _add_waits(request.wait_stats, waits)
            self.recorder.finish(record)

        return Pending(finish=finish)

    def _write_received(
        self,
        request: LowLatencyDispatchRequest,
        recv: Tensor,
        recv_meta: Tensor,
        recv_rows: Sequence[int],
    ) -> Tensor:
        """Write rows to their experts, by source rank and then by token; return ``place_NE``."""
        device = recv.device
        hits_NE = torch.zeros(
            len(recv), self.num_local_experts, dtype=torch.bool, device=device
        )  # rows come in the order in which they are to stand
        for experts in recv_meta[:, 1:].unbind(1):
            rows = (experts >= 0).nonzero(as_tuple=True)[0]
            hits_NE[rows, experts[rows].long()] = True
        place_NE = torch.where(hits_NE, hits_NE.cumsum(0) - 1, -1)
        rows, experts = hits_NE.nonzero(as_tuple=True)
        places = place_NE[rows, experts]

        hidden, form = request.x.shape[1], request.sizes.scale_form
        row_bytes = hidden * request.recv_x.element_size()
        request.recv_x.view(torch.uint8)[experts, places] = recv[rows, :row_bytes]
        if request.recv_scales is not None:
            assert isinstance(form, ScaleForm)
            scales = recv[:, row_bytes:].contiguous().view(form.dtype)
            request.recv_scales[experts, places] = scales[rows]
        ranks = torch.arange(len(recv_rows), dtype=torch.int32, device="cpu").repeat_interleave(
            torch.tensor(recv_rows, device="cpu")
        )
        src_info = ranks.to(device) * request.sizes.max_tokens + recv_meta[:, 0]
        recv_src_info = request.recv_src_info.view(self.num_local_experts, -1)
        recv_src_info[experts, places] = src_info[rows]
        request.recv_count.copy_(hits_NE.sum(0))
        if request.recv_stats is not None:
            request.recv_stats.add_(request.recv_count)
        return place_NE


def _sum_weighted(x_EMH: Tensor, routing: LowLatencyRouting, weights_NK: Tensor) -> Tensor:
    """Sum each token's rows here: FP32 [N, H], by ascending expert, from the first.

    Each product is rounded to FP32 before it is added.
    """
    contributions = []
    for expert in range(len(x_EMH)):
        rows, k = (routing.recv_topk_idx == expert).nonzero(as_tuple=True)
        values = x_EMH[expert, routing.place_NE[rows, expert]].float()
        contributions.append((rows, weights_NK[rows, k].unsqueeze(1) * values))
    return sum_in_order(len(weights_NK), contributions)[0]


def _add_waits(stats: Tensor | None, waits: Sequence[Sequence[float]]) -> None:
    """Add the seconds waited for each rank to `stats`, in nanoseconds."""
    if stats is None:
        return
    for seconds in filter(None, waits):  # empty where the transport does not block the host
        stats += torch.tensor([round(1e9 * s) for s in seconds], device=stats.device)
