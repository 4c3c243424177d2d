"""A new dispatch between nodes: its plan, and the dispatch that follows it at once."""

from __future__ import annotations

from typing import Any

import torch

from ep_comm._native import header
from ep_comm.backends.nodes.args import NodesKernelArgs
from ep_comm.backends.nodes.mailbox import NodesMailbox
from ep_comm.backends.nodes.memory import NodesMemory
from ep_comm.backends.nodes.routing import NodesRouting, arena_places, native_routings
from ep_comm.backends.nodes.tuning import split_dispatch
from ep_comm.backends.nvlink.planner import Planner
from ep_comm.backends.nvlink.resources import Resources
from ep_comm.backends.nvlink.routing import FirstDispatch, NVLinkRouting
from ep_comm.backends.requests import PlanRequest
from ep_comm.blank import Make, maker
from ep_comm.routing.types import RowLayout

_FIRST_WAVES = 2  # that need no credit of their own operation, so they need no output either


class NodesPlanner(Planner):
    """Launches plans, and the first dispatch of each while its plan and the host go on.

    The arguments of a dispatch are those of one node, within `NodesKernelArgs.dispatch`.

    Args:
        resources: The backend's.
        args: Those of all kernels.
    """

    _mailbox_type = NodesMailbox
    _routing_type = NodesRouting
    _mailbox: NodesMailbox
    _memory: NodesMemory

    def __init__(self, resources: Resources, args: NodesKernelArgs) -> None:
        super().__init__(resources, args.plan)
        self._all_args = args
        self._place = self._memory.place

    def launch_known(
        self, args: header.DispatchArgs, routing: NVLinkRouting, num_sms: int, stream: int
    ) -> None:
        """Launch a dispatch whose routing is known: one kernel sends, pushes and expands."""
        assert isinstance(routing, NodesRouting)
        all_args, num_nodes = self._all_args.dispatch, self._place.num_nodes
        split = split_dispatch(num_sms, num_nodes, False)
        args.num_push_blocks, args.num_expand_blocks = split.push, split.expand
        args.num_blocks = split.total
        all_args.num_gather_blocks = split.gather
        all_args.first_wave, all_args.end_wave = 0, num_nodes
        all_args.nodes = routing.nodes
        self._native.launch("ep_nodes_dispatch", all_args, stream)

    def _fits_beside_plan(self, has_all_sms: bool) -> bool:
        return False

    def _sms_beside_plan(self, num_sms: int, layout: RowLayout, num_topk: int) -> int:
        return split_dispatch(num_sms, self._place.num_nodes, True).expand

    def _allocate(self, request: PlanRequest, num_tokens: int) -> dict[str, Any]:
        place, max_tokens = self._place, self._config.max_tokens_per_rank
        num_entries, is_known = self._num_entries(request), request.capacity is not None
        places, total = arena_places(
            num_tokens=num_tokens,
            num_topk=request.num_topk,
            num_entries=num_entries if is_known else 0,
            num_relay_entries=(place.num_nodes - 1) * max_tokens if is_known else 0,
            max_tokens=max_tokens,
            ranks_per_node=place.ranks_per_node,
            num_nodes=place.num_nodes,
            num_local_experts=self._num_local_experts,
        )
        arena = maker(self._device)((total,), (1,), torch.int32)
        native, nodes = native_routings(
            arena.data_ptr(),
            places,
            self.entries.data_ptr(),
            num_tokens=num_tokens,
            num_topk=request.num_topk,
            expert_major=request.layout == "expert",
            last_entry=num_entries - 1,
        )
        return dict(arena=arena, places=places, native=native, nodes=nodes, place=place)

    def _allocate_entries(self, routing: NVLinkRouting, num_received: int, make: Make) -> None:
        assert isinstance(routing, NodesRouting)
        routing.allocate_entries(num_received, make)
        routing.allocate_relay(self._mailbox.num_relayed)

    def _launch_plan(self, routing: NVLinkRouting, stream: int, second_stream: int) -> None:
        assert isinstance(routing, NodesRouting)
        args = self._all_args.plan
        args.nodes = routing.nodes
        self._native.nodes_plan(args, stream, second_stream, self._streams.event)

    def _launch_push(
        self, args: header.DispatchArgs, routing: NVLinkRouting, first: FirstDispatch
    ) -> None:
        """Launch what sends to the network, and pushes the first waves."""
        assert isinstance(routing, NodesRouting)
        all_args, num_nodes = self._all_args.dispatch, self._place.num_nodes
        split = split_dispatch(first.num_sms, num_nodes, not first.in_one)
        args.num_blocks = split.total
        all_args.nodes = routing.nodes
        all_args.num_gather_blocks, args.num_push_blocks = split.gather, split.push
        all_args.first_wave, all_args.end_wave = 0, min(num_nodes, _FIRST_WAVES)
        args.num_expand_blocks = 0
        if not first.in_one:
            self._native.launch("ep_nodes_dispatch", all_args, first.stream)

    def _launch_expand(
        self, args: header.DispatchArgs, routing: NVLinkRouting, first: FirstDispatch
    ) -> None:
        """Launch what expands, and pushes the later waves; in one with all before it in a graph."""
        assert isinstance(routing, NodesRouting)
        all_args, num_nodes = self._all_args.dispatch, self._place.num_nodes
        split = split_dispatch(first.num_sms, num_nodes, not first.in_one)
        all_args.nodes = routing.nodes
        args.num_expand_blocks = split.expand
        if not first.in_one:
            all_args.num_gather_blocks, args.num_push_blocks = 0, split.push_later
            all_args.first_wave = all_args.end_wave
        all_args.end_wave = num_nodes
        stream = first.stream if first.in_one else self._streams.side
        self._native.launch("ep_nodes_dispatch", all_args, stream)
