"""Measure a step's MoE time and the balance of its tokens, for any of Megatron's dispatchers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from ep_comm.buffer import Buffer
from ep_comm.megatron.balance import LayerBalance
from ep_comm.megatron.dispatcher import EPCommTokenDispatcher
from ep_comm.megatron.graphs import is_for_a_graph
from ep_comm.megatron.layer import required_moe_layers
from ep_comm.megatron.overflow import take_all
from ep_comm.telemetry.records import OpRecord, TimedSpan, timed
from ep_comm.telemetry.spans import exposed
from ep_comm.telemetry.stats import Quantiles, longest_wait

_PHASES = {
    "dispatch": ("dispatch_preprocess", "token_dispatch", "dispatch_postprocess"),
    "combine": ("combine_preprocess", "token_combine", "combine_postprocess"),
}


# What only our dispatcher can say.
_OURS = (
    "ep/wire-mib",
    "ep/dispatch-ms-p99",
    "ep/combine-ms-p99",
    "ep/wait-share",
    "ep/exposed-ms",
)
_SLOWEST = "ep/slowest-rank"
# What only our dispatcher with a capacity factor can say.
_DROPPED, _NEEDED = "ep/dropped-share", "ep/capacity-needed"


class MoEMeter:
    """A measurement of the forward of every MoE layer of a model. Make it on all ranks.

    Times are those of the dispatcher's six methods and of the experts, recomputation included, so
    dispatchers compare like with like: permutation and padding count as dispatch or combine,
    wherever a dispatcher does them. On a GPU they are taken by events on the current stream.

    A pipeline stage may have no MoE layer, a whole model must.

    Attributes:
        balance: The tokens of each MoE layer that had any between the last two calls of `step`, of
            all pipeline stages; the same on all ranks.

    Raises:
        EPStateError: The model has no MoE layer.
    """

    def __init__(self, model_chunks: Iterable[nn.Module]) -> None:
        model_chunks = list(model_chunks)
        self._layers = [layer for _, layer in required_moe_layers(model_chunks)]
        self._device = next(model_chunks[0].parameters()).device
        self.balance: tuple[LayerBalance, ...] = ()
        self._spans: dict[str, list[TimedSpan]] = {"dispatch": [], "combine": [], "expert": []}
        self._beside: list[TimedSpan] = []  # work that we run beside an operation
        self._tokens: dict[MoELayer, Tensor] = {}
        self._counts_shape: tuple[int, int] | None = None  # layers and experts of the whole model
        self._wire_bytes = 0
        self._num_seen: WeakKeyDictionary[Buffer, int] = WeakKeyDictionary()
        for layer in self._layers:
            self._attach(layer)

    def step(self) -> dict[str, float]:
        """Return what was measured since the last call.

        Collective over the ranks that hold one model: the expert-parallel ranks of all pipeline
        stages. All get the same values.

        Returns:
            ``ep/dispatch-ms``, ``ep/combine-ms``, ``ep/expert-ms``: forward time summed over a
            rank's layers and micro-batches, on the rank where it was longest.
            ``ep/imbalance-rank``, ``ep/imbalance-expert``: tokens of the fullest rank (expert)
            over the mean, in the layer where that is worst; 1 is perfectly even. Left out where
            nothing was dispatched outside of CUDA graphs.
            With our dispatcher only: ``ep/wire-mib``: payload that left a rank, forward and
            backward, in MiB, on the rank where it was most. ``ep/dispatch-ms-p99``,
            ``ep/combine-ms-p99``: 99th percentile of one operation, forward and backward, waits
            included, on the rank where it is highest; more than a step has the longest is that.
            ``ep/wait-share``: part of these operations' time that they waited for other ranks, on
            the rank where it is largest. ``ep/exposed-ms``: time in which at least one of them ran
            and no weight gradient beside it (`overlap_wgrad`), on the rank where it is most; what
            else runs beside them, as shared experts may, is not seen. Left out on the reference
            backend over NCCL. ``ep/slowest-rank``: the global rank that was waited for longest,
            over all ranks; -1 where nobody waited.
            With its `capacity_factor` only: ``ep/dropped-share``: tokens that experts had no rows
            for, of all that came to experts. ``ep/capacity-needed``: the factor that would have had
            room for all. Both of recomputed and of evaluated layers too.
        """
        mine = {
            f"ep/{phase}-ms": 1e3 * sum(span.seconds for span in spans)
            for phase, spans in self._spans.items()
        }
        records = self._new_records(self._buffers())
        mine |= self._of_records(records)
        num_dropped, mine[_NEEDED] = self._overflow()
        group = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
        values = torch.tensor(list(mine.values()), dtype=torch.float64, device=self._device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
        metrics = dict(zip(mine, values.tolist(), strict=True))
        waits_s, num_dropped, self.balance = self._summed_up(records, num_dropped, group)
        for spans in (*self._spans.values(), self._beside):
            spans.clear()
        self._tokens.clear()
        if self.balance:  # else all that was dispatched was so in graphs
            for what in ("rank", "expert"):
                ratios = [getattr(layer, f"{what}_imbalance") for layer in self.balance]
                metrics[f"ep/imbalance-{what}"] = max(ratios)
        if metrics[_NEEDED] >= 0:
            num_kept = sum(sum(layer.tokens) for layer in self.balance)
            metrics[_DROPPED] = num_dropped / max(num_dropped + num_kept, 1)
        for name in (*_OURS, _NEEDED):
            if metrics[name] < 0:  # no rank has our dispatcher, or none knows it
                del metrics[name]
        if _OURS[0] in metrics:
            late = int(waits_s.argmax())
            ranks = dist.get_process_group_ranks(group)
            metrics[_SLOWEST] = ranks[late] if float(waits_s[late]) > 0 else -1
        return metrics

    def _overflow(self) -> tuple[int, float]:
        """Return the tokens that this rank's experts dropped, and the factor that keeps all.

        The factor is -1 where no layer has one.
        """
        found = (getattr(layer.token_dispatcher, "overflow", None) for layer in self._layers)
        taken = take_all([each for each in found if each is not None and each.mean_rows])
        return sum(dropped for dropped, _ in taken), max(
            (share for _, share in taken), default=-1.0
        )

    def _summed_up(
        self, records: dict[Buffer, list[OpRecord]], num_dropped: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, int, tuple[LayerBalance, ...]]:
        """Add up over a model's ranks: waits for each, drops, and tokens of all layers' experts."""
        num_layers, num_experts = self._shape_of_counts(group)
        ranks = dist.get_process_group_ranks(group)
        waits_s = torch.zeros(len(ranks), dtype=torch.float64)
        for buffer, found in records.items():
            members = map(ranks.index, dist.get_process_group_ranks(buffer.group))
            waits = [record.wait_s_by_rank for record in found if record.wait_s_by_rank]
            if waits:
                waits_s[list(members)] += torch.tensor(waits, dtype=torch.float64).sum(0)
        counts_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64, device=self._device)
        for i, layer in enumerate(self._layers):
            if layer in self._tokens:
                experts = layer.local_expert_indices
                of_layer = counts_LE[_number(layer, i) - 1, experts[0] : experts[-1] + 1]
                of_layer += self._tokens[layer].to(self._device)
        others = torch.cat([waits_s, torch.tensor([num_dropped], dtype=torch.float64)])
        summed = torch.cat([others.to(self._device), counts_LE.flatten()])
        dist.all_reduce(summed, group=group)
        waits_s, dropped, counts = summed.cpu().split([len(ranks), 1, counts_LE.numel()])
        # The shards of an expert each receive all of its tokens.
        num_shards = parallel_state.get_expert_tensor_parallel_world_size()
        counts_LE = counts.view_as(counts_LE) / num_shards
        num_ranks = parallel_state.get_expert_model_parallel_world_size()
        return (
            waits_s,
            round(float(dropped) / num_shards),
            tuple(
                LayerBalance(number, num_ranks, tuple(map(round, of_layer.tolist())))
                for number, of_layer in enumerate(counts_LE, 1)
                if of_layer.any()
            ),
        )

    def _shape_of_counts(self, group: dist.ProcessGroup) -> tuple[int, int]:
        """Return the largest number of an MoE layer, and the experts; collective the first time."""
        if self._counts_shape is None:
            numbers = [_number(layer, i) for i, layer in enumerate(self._layers)]
            experts = [layer.config.num_moe_experts for layer in self._layers]
            mine = torch.tensor([max(each, default=0) for each in (numbers, experts)])
            mine = mine.to(self._device)
            dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=group)
            num_layers, num_experts = mine.tolist()
            self._counts_shape = num_layers, num_experts
        return self._counts_shape

    def _buffers(self) -> list[Buffer]:
        """Return the buffers of the layers that have our dispatcher."""
        found: dict[Buffer, None] = {}
        for layer in self._layers:
            if isinstance(layer.token_dispatcher, EPCommTokenDispatcher):
                found.update(dict.fromkeys(layer.token_dispatcher.buffers))
        return list(found)

    def _new_records(self, buffers: Iterable[Buffer]) -> dict[Buffer, list[OpRecord]]:
        """Return the operations since the last call."""
        found = {}
        for buffer in buffers:
            records = buffer.records
            found[buffer] = records.since(self._num_seen.get(buffer, 0))
            self._num_seen[buffer] = records.num_operations
        return found

    def _of_records(self, of_buffers: dict[Buffer, list[OpRecord]]) -> dict[str, float]:
        """Return what our dispatcher's operations say; -1 of each without one."""
        if not of_buffers:
            return dict.fromkeys(_OURS, -1.0)
        before, self._wire_bytes = self._wire_bytes, sum(b.records.wire_bytes for b in of_buffers)
        records = [record for found in of_buffers.values() for record in found]
        total_s = sum(record.seconds for record in records)
        waited_s = sum(map(longest_wait, records))
        return {
            "ep/wire-mib": (self._wire_bytes - before) / 2**20,
            **{f"ep/{op}-ms-p99": 1e3 * _p99_s(records, op) for op in ("dispatch", "combine")},
            "ep/wait-share": min(1.0, waited_s / total_s) if total_s else 0.0,
            "ep/exposed-ms": self._exposed_ms(of_buffers),
        }

    def _exposed_ms(self, of_buffers: dict[Buffer, list[OpRecord]]) -> float:
        """Return the time of operations that no weight gradient hid; -1 where nobody knows it."""
        records = [record for found in of_buffers.values() for record in found]
        spans = [(record.began_s, record.began_s + record.seconds) for record in records]
        if any(map(math.isnan, chain.from_iterable(spans))):
            return -1.0
        beside = []
        if self._beside and records:
            origin = next(iter(of_buffers)).records.origin()
            beside = [span.on_axis(origin) for span in self._beside]
        return 1e3 * exposed(spans, beside)

    def _attach(self, layer: MoELayer) -> None:
        dispatcher = layer.token_dispatcher
        for phase, methods in _PHASES.items():
            for method in methods:
                timed_method = self._timed(self._spans[phase], getattr(dispatcher, method))
                setattr(dispatcher, method, timed_method)
        layer.experts.forward = self._timed(self._spans["expert"], layer.experts.forward)
        if getattr(dispatcher, "during_backward", None) is not None:
            dispatcher.during_backward = self._timed(self._beside, dispatcher.during_backward)
        dispatcher.dispatch_postprocess = self._counting(layer, dispatcher.dispatch_postprocess)

    def _timed(self, spans: list[TimedSpan], method: Any) -> Any:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            if is_for_a_graph():  # what a graph does at a replay nobody here can see
                return method(*args, **kwargs)
            with timed(self._device) as span:
                result = method(*args, **kwargs)
            spans.append(span)
            return result

        return run

    def _counting(self, layer: MoELayer, postprocess: Any) -> Any:
        @functools.wraps(postprocess)
        def run(*args: Any, **kwargs: Any) -> Any:
            result = postprocess(*args, **kwargs)
            if is_for_a_graph():
                return result
            dispatcher = layer.token_dispatcher
            tokens = result[1]
            if isinstance(dispatcher, EPCommTokenDispatcher):  # padding is counted there
                tokens = dispatcher.tokens_per_expert
            tokens = tokens.detach().long()
            self._tokens[layer] = self._tokens.get(layer, 0) + tokens
            return result

        return run


def _p99_s(records: Iterable[OpRecord], op: str) -> float:
    """Return the 99th percentile of the seconds of one operation of that kind; 0 without any."""
    seconds = [record.seconds for record in records if record.op == op]
    return Quantiles.of(seconds).p99 if seconds else 0.0


def _number(layer: MoELayer, place: int) -> int:
    """Return a layer's number in the model, from 1; of one that has none its place."""
    return layer.layer_number or place + 1
