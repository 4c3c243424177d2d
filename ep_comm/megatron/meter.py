"""Measure a step's MoE time and the balance of its tokens, for any of Megatron's dispatchers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from ep_comm.buffer import Buffer
from ep_comm.megatron.dispatcher import EPCommTokenDispatcher
from ep_comm.megatron.layer import required_moe_layers
from ep_comm.telemetry.records import OpRecord, timed
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
    "ep/slowest-rank",
)


class MoEMeter:
    """A measurement of the forward of every MoE layer of a model. Make it on all ranks.

    Times are those of the dispatcher's six methods and of the experts, recomputation included, so
    dispatchers compare like with like: permutation and padding count as dispatch or combine,
    wherever a dispatcher does them. On a GPU they are taken by events on the current stream.

    A pipeline stage may have no MoE layer, a whole model must.

    Raises:
        EPStateError: The model has no MoE layer.
    """

    def __init__(self, model_chunks: Iterable[nn.Module]) -> None:
        model_chunks = list(model_chunks)
        self._layers = [layer for _, layer in required_moe_layers(model_chunks)]
        self._device = next(model_chunks[0].parameters()).device
        self._spans: dict[str, list] = {"dispatch": [], "combine": [], "expert": []}
        self._tokens: dict[MoELayer, Tensor] = {}
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
            over the mean, in the layer where that is worst; 1 is perfectly even.
            With our dispatcher only: ``ep/wire-mib``: payload that left a rank, forward and
            backward, in MiB, on the rank where it was most. ``ep/dispatch-ms-p99``,
            ``ep/combine-ms-p99``: 99th percentile of one operation, forward and backward, waits
            included, on the rank where it is highest; more than a step has the longest is that.
            ``ep/wait-share``: part of these operations' time that they waited for other ranks, on
            the rank where it is largest. ``ep/slowest-rank``: the global rank that was waited for
            longest, over all ranks; -1 where nobody waited.
        """
        mine = {
            f"ep/{phase}-ms": 1e3 * sum(span.seconds for span in spans)
            for phase, spans in self._spans.items()
        }
        mine.update(self._imbalance())
        buffers = self._buffers()
        records = self._new_records(buffers)
        mine |= self._of_records(records)
        values = torch.tensor(list(mine.values()), dtype=torch.float64, device=self._device)
        group = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
        slowest_rank = self._slowest_rank(records, group)
        for spans in self._spans.values():
            spans.clear()
        self._tokens.clear()
        metrics = dict(zip(mine, values.tolist(), strict=True))
        metrics["ep/slowest-rank"] = slowest_rank
        if metrics["ep/wire-mib"] < 0:  # no rank has our dispatcher
            for name in _OURS:
                del metrics[name]
        return metrics

    def _imbalance(self) -> dict[str, float]:
        if not self._layers:
            return {"ep/imbalance-rank": 1.0, "ep/imbalance-expert": 1.0}
        group = self._layers[0].ep_group
        zero = torch.zeros(self._layers[0].num_local_experts, dtype=torch.int64)
        mine = torch.stack([self._tokens.get(layer, zero) for layer in self._layers])
        mine = mine.to(self._device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        tokens_LRE = torch.stack(parts, dim=1).double().cpu()
        return {
            "ep/imbalance-rank": _worst_max_over_mean(tokens_LRE.sum(-1)),
            "ep/imbalance-expert": _worst_max_over_mean(tokens_LRE.flatten(1)),
        }

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
            return {name: -1.0 for name in _OURS if name != "ep/slowest-rank"}
        before, self._wire_bytes = self._wire_bytes, sum(b.records.wire_bytes for b in of_buffers)
        records = [record for found in of_buffers.values() for record in found]
        total_s = sum(record.seconds for record in records)
        waited_s = sum(map(longest_wait, records))
        return {
            "ep/wire-mib": (self._wire_bytes - before) / 2**20,
            **{f"ep/{op}-ms-p99": 1e3 * _p99_s(records, op) for op in ("dispatch", "combine")},
            "ep/wait-share": min(1.0, waited_s / total_s) if total_s else 0.0,
        }

    def _slowest_rank(
        self, of_buffers: dict[Buffer, list[OpRecord]], group: dist.ProcessGroup
    ) -> int:
        ranks = dist.get_process_group_ranks(group)
        waits_s = torch.zeros(len(ranks), dtype=torch.float64)
        for buffer, records in of_buffers.items():
            members = dist.get_process_group_ranks(buffer.group)
            for record in records:
                for member, wait_s in zip(members, record.wait_s_by_rank, strict=False):
                    waits_s[ranks.index(member)] += wait_s
        waits_s = waits_s.to(self._device)
        dist.all_reduce(waits_s, group=group)
        return ranks[int(waits_s.argmax())] if float(waits_s.max()) > 0 else -1

    def _attach(self, layer: MoELayer) -> None:
        dispatcher = layer.token_dispatcher
        for phase, methods in _PHASES.items():
            for method in methods:
                timed_method = self._timed(phase, getattr(dispatcher, method))
                setattr(dispatcher, method, timed_method)
        layer.experts.forward = self._timed("expert", layer.experts.forward)
        dispatcher.dispatch_postprocess = self._counting(layer, dispatcher.dispatch_postprocess)

    def _timed(self, phase: str, method: Any) -> Any:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            device = next(tensor for tensor in args if torch.is_tensor(tensor)).device
            with timed(device) as span:
                result = method(*args, **kwargs)
            self._spans[phase].append(span)
            return result

        return run

    def _counting(self, layer: MoELayer, postprocess: Any) -> Any:
        @functools.wraps(postprocess)
        def run(*args: Any, **kwargs: Any) -> Any:
            result = postprocess(*args, **kwargs)
            dispatcher = layer.token_dispatcher
            ours = isinstance(dispatcher, EPCommTokenDispatcher)  # result[1] counts padding there
            tokens = dispatcher.handle.tokens_per_expert if ours else result[1]
            tokens = tokens.detach().long().cpu()
            self._tokens[layer] = self._tokens.get(layer, 0) + tokens
            return result

        return run


def _p99_s(records: Iterable[OpRecord], op: str) -> float:
    """Return the 99th percentile of the seconds of one operation of that kind; 0 without any."""
    seconds = [record.seconds for record in records if record.op == op]
    return Quantiles.of(seconds).p99 if seconds else 0.0


def _worst_max_over_mean(tokens_LX: Tensor) -> float:
    """Return max / mean along the last axis, of the layer where it is largest; 1 without tokens."""
    mean = tokens_LX.mean(-1)
    ratio = torch.where(mean > 0, tokens_LX.amax(-1) / mean, 1.0)
    return float(ratio.max())
