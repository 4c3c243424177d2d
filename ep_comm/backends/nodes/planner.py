"""A new dispatch between nodes: its plan, and the dispatch that follows it at once."""

from __future__ import annotations

import torch

from ep_comm._native import NativeLibrary, header
from ep_comm.backends.base import PlanRequest, Received
from ep_comm.backends.nodes.args import NodesKernelArgs
from ep_comm.backends.nodes.mailbox import NodesMailbox
from ep_comm.backends.nodes.memory import NodesMemory
from ep_comm.backends.nodes.routing import NodesRouting, arena_places, native_routings
from ep_comm.backends.nodes.tuning import split_dispatch
from ep_comm.backends.nvlink.planner import MAX_ROWS, Planner, check_capture
from ep_comm.backends.nvlink.routing import FirstDispatch, NVLinkRouting
from ep_comm.backends.nvlink.rows import allocate_experts, allocate_rows
from ep_comm.backends.nvlink.streams import Streams
from ep_comm.backends.nvlink.tuning import split_plan
from ep_comm.config import EPConfig
from ep_comm.routing.layout import INPUT_KINDS
from ep_comm.telemetry.device import DeviceRecorder

_FIRST_WAVES = 2  # that need no credit of their own operation, so they need no output either


class NodesPlanner(Planner):
    """Launches plans, and the first dispatch of each while its plan and the host go on.

    See `Planner`, whose arguments these are.
    """

    def __init__(
        self,
        native: NativeLibrary,
        memory: NodesMemory,
        config: EPConfig,
        device: torch.device,
        streams: Streams,
        recorder: DeviceRecorder,
        args: NodesKernelArgs,
    ) -> None:
        super().__init__(native, memory, config, device, streams, recorder, args.plan)
        self._place = memory.place
        self._all_args = args
        self._counts = self._mailbox = NodesMailbox(native, memory, config)

    def plan(self, request: PlanRequest, num_sms: int, available_sms: int) -> NodesRouting:
        """Start a plan; the host does not wait for it.

        Raises:
            EPUnsupportedError: A CUDA graph is captured, and the host would have to wait.
        """
        source, num_topk, layout, alignment, has_weights, capacity = request[:6]
        expert_capacity, overflow_stats, asynchronous = request[6:]
        is_captured = check_capture(capacity)
        config, streams, place = self._config, self._streams, self._place
        asked_tokens = source.shape[0]
        if asked_tokens > config.max_tokens_per_rank:
            source = source[:0]  # the kernels tell all ranks
        num_tokens = source.shape[0]
        num_entries = self._max_rows
        if capacity is not None and layout == "rank":  # rows from there on share one entry
            num_entries = min(num_entries, capacity + 1)
        most_relayed = (place.num_nodes - 1) * config.max_tokens_per_rank
        places, total = arena_places(
            num_tokens,
            num_topk,
            0 if capacity is None else num_entries,
            0 if capacity is None else most_relayed,
            config.max_tokens_per_rank,
            place.ranks_per_node,
            place.num_nodes,
            config.num_experts // self._num_ranks,
        )
        selects_weights = has_weights and source.dtype == torch.bool
        # In a graph of two branches CUDA might run first what expands, and so waits for pushes.
        in_one = is_captured
        stream = streams.begin(header.EP_OP_DISPATCH, asynchronous, num_sms)
        record = self._recorder.start("dispatch", 0)
        self._num_plans += 1
        arena = torch.empty(total, dtype=torch.int32, device=self._device)
        native, nodes = native_routings(
            arena.data_ptr(),
            places,
            self.entries.data_ptr(),
            num_tokens=num_tokens,
            num_topk=num_topk,
            expert_major=layout == "expert",
            last_entry=num_entries - 1,
        )
        routing = NodesRouting(
            num_tokens=num_tokens,
            num_topk=num_topk,
            layout=layout,
            expert_alignment=alignment,
            capacity=capacity,
            expert_capacity=expert_capacity,
            native=native,
            nodes=nodes,
            place=place,
            ticket=self._num_plans,
            stream=streams.current,
            arena=arena,
            places=places,
            memory=(arena,),
            first=FirstDispatch(
                source,
                stream,
                num_sms,
                record,
                selects_weights,
                in_one,
                is_captured,
                overflow_stats=overflow_stats,
            ),
            wait_for_kernels=self._wait_for_kernels,
        )
        args = self._all_args.plan
        args.peers.record = record
        args.routing, args.nodes = native, nodes
        args.input = source.data_ptr()
        args.ticket = 0 if capacity is not None else routing.ticket
        args.capacity = MAX_ROWS if capacity is None else capacity
        args.input_kind = INPUT_KINDS[source.dtype]
        args.asked_tokens = asked_tokens
        args.expert_alignment = alignment
        args.expert_capacity = expert_capacity or 0
        args.overflow = None if overflow_stats is None else overflow_stats.data_ptr()
        split = split_dispatch(num_sms, place.num_nodes, True)
        args.num_send_blocks, args.num_receive_blocks = split_plan(num_sms, split.expand)
        self._native.nodes_plan(args, stream, stream if in_one else streams.side, streams.event)
        if asynchronous and selects_weights:
            # The caller's stream selects the probabilities by the experts that the plan finds.
            streams.wait(streams.current, stream)
        return routing

    def dispatch(
        self,
        args: header.DispatchArgs,
        routing: NVLinkRouting,
        recv_dtype: torch.dtype,
        first: FirstDispatch,
    ) -> Received:
        """Send while the plan and the host go on; allocate and expand once the counts are known.

        `args` are those of one node, within `NodesKernelArgs.dispatch`.

        Raises:
            EPTimeoutError, EPMismatchError: The plan ended with it.
            EPRoutingError: The plan found the routing wrong; the dispatch is complete.
        """
        assert isinstance(routing, NodesRouting)
        streams, stream, all_args = self._streams, first.stream, self._all_args.dispatch
        num_nodes = self._place.num_nodes
        args.peers.record = first.record
        args.is_planned = True
        split = split_dispatch(first.num_sms, num_nodes, not first.in_one)
        args.num_blocks = split.total
        all_args.nodes = routing.nodes
        all_args.num_gather_blocks, args.num_push_blocks = split.gather, split.push
        all_args.first_wave, all_args.end_wave = 0, min(num_nodes, _FIRST_WAVES)
        args.num_expand_blocks = 0
        if not first.in_one:
            self._native.launch("ep_nodes_dispatch", all_args, stream)
        if routing.capacity is None:
            routing.sizes = self._counts.sizes(
                routing.ticket,
                self._recorder.epoch("dispatch"),
                routing.expert_alignment,
                streams.side,
            )
        self._recorder.complete(args.row_bytes + args.scale_bytes, routing.known_expert_rows)
        received = allocate_rows(args, routing, self._config.hidden, recv_dtype, self._device)
        if routing.layout == "rank":
            routing.recv_topk_idx = allocate_experts(args, routing, first.source, self._device)
        args.planned_entries = None
        if routing.capacity is None:
            # The kernel that expands copies them: the next plan, on the same stream, is behind it.
            args.planned_entries = routing.native.entries
            args.num_received = routing.sizes.num_received
            routing.allocate_entries(args.num_received)
            routing.allocate_relay(self._counts.num_relayed)
            args.routing, all_args.nodes = routing.native, routing.nodes
        args.num_expand_blocks = split.expand
        if first.in_one:
            all_args.end_wave = num_nodes
            self._native.launch("ep_nodes_dispatch", all_args, stream)
        else:
            all_args.num_gather_blocks, args.num_push_blocks = 0, split.push_later
            all_args.first_wave, all_args.end_wave = all_args.end_wave, num_nodes
            self._native.launch("ep_nodes_dispatch", all_args, streams.side)
            streams.wait(stream, streams.side)
        if routing.capacity is None:
            self._counts.raise_if_bad(first.source, routing.num_topk)
        return received
