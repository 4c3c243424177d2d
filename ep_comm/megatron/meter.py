"""Where a step's MoE time goes, and how unevenly tokens fall, for any of Megatron's dispatchers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from ep_comm.errors import EPStateError
from ep_comm.megatron.dispatcher import EPCommTokenDispatcher
from ep_comm.megatron.layer import moe_layers
from ep_comm.records import timed

_PHASES = {
    "dispatch": ("dispatch_preprocess", "token_dispatch", "dispatch_postprocess"),
    "combine": ("combine_preprocess", "token_combine", "combine_postprocess"),
}


class MoEMeter:
    """Measures the forward of every MoE layer of a model. Make it on all ranks.

    Times are those of the dispatcher's six methods and of the experts, recomputation included, so
    dispatchers compare like with like: permutation and padding count as dispatch or combine,
    wherever a dispatcher does them. On a GPU they are taken by events on the current stream.

    Raises:
        EPStateError: The model has no MoE layer.
    """

    def __init__(self, model_chunks: Iterable[nn.Module]) -> None:
        self._layers = [layer for _, layer in moe_layers(model_chunks)]
        if not self._layers:
            raise EPStateError("the model has no MoE layer to measure")
        self._group = self._layers[0].ep_group
        self._spans: dict[str, list] = {"dispatch": [], "combine": [], "expert": []}
        self._tokens: dict[MoELayer, Tensor] = {}
        self._wire_bytes = 0
        for layer in self._layers:
            self._attach(layer)

    def step(self) -> dict[str, float]:
        """Everything since the last call. Collective over the expert-parallel group.

        Returns:
            ``ep/dispatch-ms``, ``ep/combine-ms``, ``ep/expert-ms``: forward time summed over
            layers and micro-batches, on the rank where it was longest.
            ``ep/imbalance-rank``, ``ep/imbalance-expert``: tokens of the fullest rank (expert)
            over the mean, in the layer where that is worst; 1 is perfectly even.
            ``ep/wire-mib``: payload that left this rank, forward and backward, in MiB; with our
            dispatcher only.
        """
        milliseconds = [1e3 * sum(span.seconds for span in spans) for spans in self._spans.values()]
        names = [f"ep/{phase}-ms" for phase in self._spans]
        device = next(self._layers[0].parameters()).device
        times = torch.tensor(milliseconds, dtype=torch.float64, device=device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX, group=self._group)
        metrics = dict(zip(names, times.tolist(), strict=True))
        metrics.update(self._imbalance(device))
        buffers = {
            layer.token_dispatcher.buffer
            for layer in self._layers
            if isinstance(layer.token_dispatcher, EPCommTokenDispatcher)
        } - {None}
        if buffers:
            total = sum(buffer.records.wire_bytes for buffer in buffers)
            metrics["ep/wire-mib"] = (total - self._wire_bytes) / 2**20
            self._wire_bytes = total
        for spans in self._spans.values():
            spans.clear()
        self._tokens.clear()
        return metrics

    def _imbalance(self, device: torch.device) -> dict[str, float]:
        zero = torch.zeros(self._layers[0].num_local_experts, dtype=torch.int64)
        mine = torch.stack([self._tokens.get(layer, zero) for layer in self._layers]).to(device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, mine, group=self._group)
        tokens_LRE = torch.stack(parts, dim=1).double().cpu()
        return {
            "ep/imbalance-rank": _worst_max_over_mean(tokens_LRE.sum(-1)),
            "ep/imbalance-expert": _worst_max_over_mean(tokens_LRE.flatten(1)),
        }

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


def _worst_max_over_mean(tokens_LX: Tensor) -> float:
    """max / mean along the last axis, for the layer where it is largest; 1 without tokens."""
    mean = tokens_LX.mean(-1)
    ratio = torch.where(mean > 0, tokens_LX.amax(-1) / mean, 1.0)
    return float(ratio.max())
