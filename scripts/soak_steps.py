"""The steps of a soak: a few operations each, drawn at random and checked (`soak_checks`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from soak_checks import Checker, Inputs, Rows
from torch import Tensor

from ep_comm import Buffer, EPConfig, EventOverlap

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_REPLAYS = 6


class Step:
    """What steps need.

    Args:
        buffer: Under test.
        other: The reference.
        config: Of both.
        checker: Knows what has to come.
        rng: The same on all ranks.
        own: This rank's: what may differ between ranks.
    """

    def __init__(
        self,
        buffer: Buffer,
        other: Buffer,
        config: EPConfig,
        checker: Checker,
        rng: np.random.Generator,
        own: np.random.Generator,
    ) -> None:
        self.buffer, self.other, self.config = buffer, other, config
        self.checker, self.rng, self.own = checker, rng, own
        self.device = checker.place.device
        self.on_gpu = self.device.type == "cuda"
        self._side = torch.cuda.Stream() if self.on_gpu else None

    @contextmanager
    def on_a_stream(self) -> Iterator[None]:
        """Run a step on the current stream or another one, on any number of SMs."""
        if self.on_gpu:
            available = torch.cuda.get_device_properties(self.device).multi_processor_count
            self.buffer.set_num_sms(min(int(self.own.choice([0, 4, 8, 24, 48])), available) or None)
        if self._side is None or self.chance(0.5):
            yield
            return
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            yield
        current.wait_stream(self._side)

    def chance(self, share: float) -> bool:
        """The same on all ranks."""
        return bool(self.rng.random() < share)

    # --- normal ----------------------------------------------------------------------------------

    def normal(self) -> None:
        """A new dispatch in either layout, perhaps a cached one, and a combine or a backward."""
        check, rng = self.checker, self.rng
        inputs = self._draw(self.config.max_tokens_per_rank, _DTYPES[rng.integers(3)])
        hits = check.hits(inputs)
        by_rank = self.chance(0.3)
        alignment = 1 if by_rank else int(rng.choice([1, 4, 16, 128]))
        rows = self._rank_rows(hits) if by_rank else check.rows_by_expert(hits, alignment)
        total = rows.total
        options: dict[str, Any] = dict(layout="rank" if by_rank else "expert")
        if not by_rank:
            options["expert_alignment"] = alignment
        if self.chance(0.3):
            total = options["num_worst_tokens"] = self._room(by_rank, alignment)
        has_weights = self.chance(0.5)
        weights = check.own(inputs.weights, inputs) if has_weights else None
        x, topk = check.own(inputs.x, inputs), check.own(inputs.topk, inputs)
        x.requires_grad_(by_backward := self.chance(0.3))
        out = self._dispatch(x, topk, weights, **options)
        self._check_rows("dispatch", out, inputs, rows, total, weights, by_rank)
        if self.chance(0.4):
            out = self._dispatch(x, None, weights, handle=out.handle)
            self._check_rows("cached dispatch", out, inputs, rows, total, weights, by_rank)
        y = check.placed(total, rows.row, self._outputs(inputs, hits, rows, by_rank))
        want = check.combined(inputs)
        if by_backward:
            out.recv_x.backward(y)
            result, label = x.grad, "combine of backward"
        else:
            how = self._how()
            found = self.buffer.combine(y, out.handle, **how)
            found.event.current_stream_wait()
            result, label = found.combined_x, "combine"
        self._check_sums(label, result, want)

    def _check_rows(
        self,
        label: str,
        out: Any,
        inputs: Inputs,
        rows: Rows,
        total: int,
        weights: Tensor | None,
        by_rank: bool,
    ) -> None:
        check, recv = self.checker, out.recv_x.detach()
        check.begin(label)
        check.plant_in(recv, rows.row)
        check.compare(check.sums(recv), check.placed(total, rows.row, check.sums(inputs.x[rows.n])))
        if weights is not None and not by_rank:
            want = check.weights_by_expert(inputs)[rows.n, rows.e]
            check.compare(out.recv_topk_weights, check.placed(total, rows.row, want))

    def _outputs(self, inputs: Inputs, hits: Tensor, rows: Rows, by_rank: bool) -> Tensor:
        """What experts make of a row: it, times the factor of one, or of all on this rank."""
        if by_rank:
            every = self.checker.factors(torch.arange(hits.shape[1], device=self.device))
            factor = (hits[rows.n] * every).sum(1)
        else:
            factor = self.checker.factors(rows.e)
        return inputs.z[rows.n] * factor[:, None].to(inputs.z.dtype)

    def _check_sums(self, label: str, result: Tensor, want: Tensor) -> None:
        self.checker.begin(label)
        self.checker.plant_in(result, torch.arange(len(result)))
        self.checker.compare(result, want)

    def _rank_rows(self, hits: Tensor) -> Rows:
        n = self.checker.rows_by_rank(hits)
        return Rows(n, n, torch.arange(len(n), device=self.device), len(n))

    def _room(self, by_rank: bool, alignment: int) -> int:
        """Rows that are enough whatever the routing."""
        all_tokens = self.checker.place.num_ranks * self.config.max_tokens_per_rank
        if by_rank:
            return all_tokens
        local = self.checker.per_rank
        return all_tokens * min(self.config.num_topk, local) + local * (alignment - 1)

    def _dispatch(self, *args: Any, **options: Any) -> Any:
        out = self.buffer.dispatch(*args, **options, **self._how())
        out.event.current_stream_wait()
        return out

    def _how(self) -> dict[str, Any]:
        if not self.chance(0.4):
            return {}
        return dict(async_finish=True, previous_event=EventOverlap.record(self.device))

    def _draw(
        self, most: int, dtype: torch.dtype, tokens: list[int] | None = None, num_topk: int = 0
    ) -> Inputs:
        rng = self.rng
        if tokens is None:
            tokens = rng.integers(most + 1, size=self.checker.place.num_ranks).tolist()
        num_topk = num_topk or int(rng.integers(1, self.config.num_topk + 1))
        skew, drop = float(rng.choice([0.0, 0.5, 2.0])), float(rng.choice([0.0, 0.0, 0.2, 1.0]))
        return self.checker.draw(tokens, dtype, num_topk, skew, drop)

    # --- low latency -----------------------------------------------------------------------------

    def low_latency(self) -> None:
        """A dispatch in BF16 and its combine, fused or in two parts, with or without weights."""
        room = int(self.rng.integers(1, self.config.low_latency_tokens + 1))
        inputs = self._draw(room, torch.bfloat16)
        x, topk = (self.checker.own(each, inputs) for each in (inputs.x, inputs.topk))
        split = self.chance(0.5)
        out = self.buffer.low_latency_dispatch(
            x, topk, room, self.config.num_experts, use_fp8=False, return_recv_hook=split
        )
        if split:
            out.hook()
        y, weights = self._check_low_latency(out, inputs, room)
        found = self.buffer.low_latency_combine(
            y, topk, weights, out.handle, return_recv_hook=split
        )
        if split:
            found.hook()
        want = self.checker.combined(inputs, weights)
        self._check_sums("low-latency combine", found.combined_x, want)

    def _check_low_latency(self, out: Any, inputs: Inputs, room: int) -> tuple[Tensor, Tensor]:
        """Check a dispatch; return what to combine, and with which weights."""
        check, hits = self.checker, self.checker.hits(inputs)
        rows = check.slots_by_expert(hits, len(inputs.tokens) * room)
        recv = out.recv_x.view(rows.total, -1)
        check.begin("low-latency dispatch")
        check.plant_in(recv, rows.row)
        check.compare(out.recv_count, hits.sum(0).int())
        check.compare(check.sums(recv[rows.row]), check.sums(inputs.x[rows.n]))
        y = check.placed(rows.total, rows.row, self._outputs(inputs, hits, rows, by_rank=False))
        weights = 1.0 + (check.own(inputs.weights, inputs) < 0.5)
        return y.view(out.recv_x.shape), weights

    # --- graphs ----------------------------------------------------------------------------------

    def graph(self) -> None:
        """Capture a dispatch and a combine, and replay them with changing inputs and routing."""
        low_latency = self.chance(0.5)
        room = self.config.max_tokens_per_rank
        inputs = self._draw(room, torch.bfloat16)
        num_topk = inputs.topk.shape[2]
        x, topk = (self.checker.own(each, inputs) for each in (inputs.x, inputs.topk))
        weights = torch.ones(topk.shape, device=self.device)
        local, slots = self.checker.per_rank, len(inputs.tokens) * room
        shape = (local, slots) if low_latency else (self._room(False, 16),)
        y = torch.zeros(*shape, self.config.hidden, dtype=x.dtype, device=self.device)

        def both() -> tuple[Any, Tensor]:
            if low_latency:
                out = self.buffer.low_latency_dispatch(
                    x, topk, room, self.config.num_experts, use_fp8=False
                )
                back = self.buffer.low_latency_combine(y, topk, weights, out.handle)
            else:
                out = self.buffer.dispatch(x, topk, num_worst_tokens=len(y))
                back = self.buffer.combine(y, out.handle)
            return out, back.combined_x

        both()  # loads kernels, and makes what cannot be made in a graph
        # A graph has a stream of its own: the default one cannot be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
                out, combined = both()
            for _ in range(_REPLAYS):
                inputs = self._draw(room, x.dtype, inputs.tokens, num_topk)
                x.copy_(self.checker.own(inputs.x, inputs))
                topk.copy_(self.checker.own(inputs.topk, inputs))
                self._replay(graph, out, combined, inputs, y, weights, low_latency, room)
            stream.synchronize()
        self.buffer.synchronize()

    def _replay(
        self,
        graph: torch.cuda.CUDAGraph,
        out: Any,
        combined: Tensor,
        inputs: Inputs,
        y: Tensor,
        weights: Tensor,
        low_latency: bool,
        room: int,
    ) -> None:
        check, hits = self.checker, self.checker.hits(inputs)
        if low_latency:
            rows = check.slots_by_expert(hits, len(inputs.tokens) * room)
        else:
            rows = check.rows_by_expert(hits, 16)
        # What is combined must be there before the graph runs: it holds both operations.
        outputs = self._outputs(inputs, hits, rows, by_rank=False)
        flat = y.view(-1, y.shape[-1])
        flat.copy_(check.placed(len(flat), rows.row, outputs))
        graph.replay()
        if low_latency:
            _, drawn = self._check_low_latency(out, inputs, room)
            weights_used: Tensor | None = torch.ones_like(drawn)
        else:
            self._check_rows("dispatch in a graph", out, inputs, rows, len(y), None, by_rank=False)
            weights_used = None
        self._check_sums("combine in a graph", combined, check.combined(inputs, weights_used))

    # --- in full ---------------------------------------------------------------------------------

    def in_full(self) -> None:
        """The same calls on both buffers, with rows of any size: all bits are compared."""
        check, rng = self.checker, self.rng
        inputs = self._draw(self.config.max_tokens_per_rank, _DTYPES[rng.integers(3)])
        fp8 = self.chance(0.5) and inputs.x.dtype != torch.float16
        x = torch.randn(
            len(inputs.x), self.config.hidden, generator=check.generator, device=self.device
        )
        inputs = inputs._replace(x=x.to(inputs.x.dtype))
        rows, topk = (check.own(each, inputs) for each in (inputs.x, inputs.topk))
        weights = check.own(inputs.weights, inputs)
        wire = torch.float8_e4m3fn if fp8 else None
        results = []
        for buffer in (self.buffer, self.other):
            out = buffer.dispatch(rows, topk, weights, wire_dtype=wire)
            back = buffer.combine(out.recv_x * 1.5, out.handle, out.recv_topk_weights)
            with torch.no_grad():
                sent = buffer.low_latency_dispatch(
                    rows.bfloat16(), topk, self.config.low_latency_tokens, self.config.num_experts,
                    use_fp8=False,
                )  # fmt: skip
                low = buffer.low_latency_combine(sent.recv_x, topk, weights, sent.handle)
            buffer.synchronize()
            results.append(
                {
                    "dispatch in full": (out.recv_x, out.recv_topk_weights),
                    "combine in full": (back.combined_x, back.combined_topk_weights),
                    "low-latency dispatch in full": (sent.recv_count,),
                    "low-latency combine in full": (low.combined_x,),
                }
            )
        for label, ours in results[0].items():
            check.begin(label)
            if ours[0].dim() == 2:
                check.plant_in(ours[0], torch.arange(len(ours[0])))
            for mine, theirs in zip(ours, results[1][label], strict=True):
                check.compare(as_bits(mine), as_bits(theirs))


def as_bits(rows: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32}
    return rows if rows.dtype == torch.int32 else rows.view(kinds[rows.dtype.itemsize])


# Each with whether it needs a GPU.
STEPS: dict[str, tuple[Callable[[Step], None], bool]] = {
    "normal": (Step.normal, False),
    "low latency": (Step.low_latency, False),
    "graph": (Step.graph, True),
}
