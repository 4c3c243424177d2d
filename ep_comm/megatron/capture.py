"""Capture the routing of a training run, to measure with it (`ep_comm.routing.capture`)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ep_comm.events import HostCopy
from ep_comm.megatron.dispatcher import EPCommTokenDispatcher
from ep_comm.megatron.graphs import is_for_a_graph
from ep_comm.megatron.layer import required_moe_layers
from ep_comm.routing.capture import RankFile, Sizes, of_map, spread, write_step

MAX_LAYERS = 4


class _Taken(NamedTuple):
    """The routing of one layer on its way to the host.

    Attributes:
        sizes: Of the dispatch.
        rank: This one's, among those that share the experts.
        routing_map: bool [T, E].
    """

    sizes: Sizes
    rank: int
    routing_map: HostCopy


class RoutingCapture:
    """Writes which experts tokens select, in some steps. Make it on all ranks.

    Of the steps since it was made it takes the 1st, 2nd, 4th, 8th, and so on. Of a step it takes
    the first micro-batch; of a pipeline stage at most `MAX_LAYERS` MoE layers, spread evenly; of
    data-parallel replicas of the experts the first one. What is dispatched without gradients, as in
    a validation, or in a CUDA graph, is not taken.

    A routing is copied to the host behind what is on the GPU's stream, and a thread writes it after
    the step. Where it cannot be written a warning says so, and nothing more is captured.

    Args:
        model_chunks: A model. Only MoE layers with our dispatcher are captured.
        folder: Of the capture; made if need be. None: nothing is captured.

    Raises:
        EPStateError: The model has no MoE layer.
    """

    def __init__(self, model_chunks: Iterable[nn.Module], folder: str | Path | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._step = 1  # since this was made
        self._taken: dict[int, _Taken] = {}
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1)
        if self._folder is None:
            return
        layers = [
            (layer.layer_number or place, layer.token_dispatcher)
            for place, (_, layer) in enumerate(required_moe_layers(list(model_chunks)), 1)
            if isinstance(layer.token_dispatcher, EPCommTokenDispatcher)
            and layer.token_dispatcher.is_first_replica
        ]
        for place in spread(len(layers), min(len(layers), MAX_LAYERS)):
            number, dispatcher = layers[place]
            dispatcher.on_dispatch = functools.partial(self._take, number, dispatcher)

    def step(self, iteration: int) -> None:
        """Write what was taken of the step that is over.

        Args:
            iteration: Its number, from 1.
        """
        self._step += 1
        taken, self._taken = self._taken, {}
        if taken and self._is_well():
            self._writing = self._writer.submit(self._write, iteration, taken)

    def close(self) -> None:
        """Wait until all is written. Nothing is captured afterwards."""
        self._is_well()
        self._folder = None

    def _take(
        self,
        number: int,
        dispatcher: EPCommTokenDispatcher,
        hidden_states: Tensor,
        routing_map: Tensor,
    ) -> None:
        """Begin to copy the routing of a dispatch, where it is one to take."""
        is_due = self._folder is not None and self._step & (self._step - 1) == 0
        if not is_due or number in self._taken or not torch.is_grad_enabled():
            return
        if is_for_a_graph():  # each replay would copy to the host, whoever has that memory by then
            return
        config, group, shards = dispatcher.config, dispatcher.tp_ep_group, dispatcher.tp_size
        sizes = Sizes(
            num_experts=config.num_moe_experts * shards,
            num_topk=config.moe_router_topk * shards,
            hidden=hidden_states.shape[-1],
            num_ranks=dist.get_world_size(group),
        )
        self._taken[number] = _Taken(sizes, dist.get_rank(group), HostCopy(routing_map))

    def _write(self, iteration: int, taken: dict[int, _Taken]) -> None:
        topk_idx = {}
        for number, (sizes, _, routing_map) in sorted(taken.items()):
            topk_idx[number] = of_map(routing_map.wait().numpy(), sizes.num_topk)
        first = next(iter(taken.values()))
        assert self._folder is not None  # nothing was taken without
        write_step(
            self._folder, dist.get_rank(), RankFile(iteration, first.sizes, first.rank, topk_idx)
        )

    def _is_well(self) -> bool:
        """Wait for the last writing; warn, and end the capture, where it failed."""
        try:
            if self._writing is not None:
                self._writing.result()
        except OSError as error:
            print(
                f"warning: no more routing is captured, training goes on: {self._folder} cannot "
                f"be written: {error.strerror}",
                file=sys.stderr,
            )
            self._folder = self._writing = None
        return self._folder is not None
