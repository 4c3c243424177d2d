"""The token dispatcher that Megatron-Core's MoE layer calls.

Megatron calls six methods in order; the middle one of each half communicates::

    dispatch_preprocess -> token_dispatch -> dispatch_postprocess -> experts
    combine_preprocess  -> token_combine  -> combine_postprocess

Rows arrive grouped by expert and padded, so there is no permutation on either side. The experts
apply the probabilities; combine is an unweighted sum.

With expert tensor parallelism (ETP) each expert is split over the ETP ranks, and all of them need
its tokens. One dispatch over all ranks that hold experts brings them there: each shard counts as an
expert of its own, and a token that selects an expert selects all its shards. Combine then sums the
shards' partial outputs like those of different experts, in its own fixed order. So there is no
gather before the experts and no reduction behind them, and backward sums the shards' gradients.

With padding to capacity Megatron's router fills each expert up with tokens that did not select it,
at probability 0. These stay where they are: zero rows fill up the experts' groups instead, whose
size is known without asking anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    get_align_size_for_quantization,
    get_capacity,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from ep_comm import Buffer, DispatchHandle, DispatchOutput, EPTooManyTokensError, fp8
from ep_comm.megatron.buffers import LayerBuffers
from ep_comm.megatron.fp8_direct import FP8Rows, attach, gradient_of
from ep_comm.megatron.options import EPOptions
from ep_comm.megatron.overflow import ExpertOverflow
from ep_comm.megatron.wgrad import at_end_of_backward
from ep_comm.numeric import round_up


class EPCommTokenDispatcher(MoETokenDispatcher):
    """The dispatcher that moves tokens with an `ep_comm.Buffer`.

    Args:
        num_local_experts, local_expert_indices, config, pg_collection: As Megatron passes them.
        options: Settings of ep_comm.
        during_backward: Run while the backward combine is in flight (delayed weight gradients), or
            at the end of a backward pass that has none: nothing before the experts is trainable.

    Attributes:
        on_dispatch: Called with the rows [T, H] and the routing map bool [T, E * ETP] of each
            dispatch, on the stream that it is launched on.

    The configuration is one that `ep_comm.megatron.support.check_supported` accepts.
    """

    def __init__(
        self,
        num_local_experts,
        local_expert_indices,
        config,
        pg_collection=None,
        *,
        options: EPOptions,
        during_backward: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self._expert_dp_group = pg_collection.expt_dp
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self.options = options
        self.during_backward = during_backward
        self.expert_alignment = options.expert_alignment or _quantisation_alignment(config)
        # What the preprocessing leaves here. Megatron may have it in a CUDA graph, whose replays do
        # not run it: the tensor is then one of the outputs, shapes go by the number of tokens.
        self.cudagraph_attrs = ["_routing_map"]
        self._routing_map: Tensor | None = None
        self._shape_of: dict[int, torch.Size] = {}
        self.overflow: ExpertOverflow | None = None
        if options.capacity_factor is not None:
            rank = dist.get_rank(self.tp_ep_group)
            self.overflow = ExpertOverflow(
                options.capacity_factor,
                num_local_experts=num_local_experts,
                first_expert=None if options.device_counts else rank * num_local_experts,
                rank=rank,
            )
        self._layer_buffers = LayerBuffers(
            config, options, self.tp_ep_group, self.tp_size, says=self.is_first_replica
        )
        self.handle: DispatchHandle | None = None
        self._fp8_rows: FP8Rows | None = None  # on their way to the experts
        self.on_dispatch: Callable[[Tensor, Tensor], None] | None = None

    # --- tokens ahead of their routing -----------------------------------------------------------

    def begin_ahead(self, hidden_states: Tensor) -> None:
        """Begin to send [S, B, H], whose routing the router is about to compute.

        Not under the 1F1B overlap, where the dispatch of another micro-batch may come between.
        """
        if self.config.overlap_moe_expert_parallel_comm or not hidden_states.is_contiguous():
            return
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        buffer = self._layer_buffers.shared(rows)
        if len(rows) <= buffer.config.max_tokens_per_rank:  # else a larger one is made first
            buffer.begin_dispatch(rows, wire_dtype=self._wire_dtype)

    @property
    def _wire_dtype(self) -> torch.dtype | None:
        return fp8.FP8_DTYPE if self.options.fp8_dispatch else None

    def set_shared_experts(self, shared_experts: Any) -> None:
        """Run them beside the dispatch, as Megatron's `MoELayer` asks for."""
        super().set_shared_experts(shared_experts)
        if shared_experts.use_shared_expert_gate:
            self.cudagraph_attrs.append("shared_experts.gate_score")
        self.cudagraph_attrs.append("shared_experts.cached_fc1_input")

    # --- tokens to experts -----------------------------------------------------------------------

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turn [S, B, H], bool [T, E] and [T, E] into [T, H] and FP32 [T, E * ETP]."""
        shape = hidden_states.shape
        self._shape_of[shape[:-1].numel()] = shape
        if self.config.moe_pad_expert_input_to_capacity:
            routing_map = routing_map & (probs != 0)
        self._routing_map = self._for_shards(routing_map)
        self._probs_dtype = probs.dtype
        hidden_states = hidden_states.reshape(-1, shape[-1])
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states.view(shape))
        return hidden_states, self._for_shards(probs.float()).contiguous()

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send [T, H] and [T, E * ETP]; return expert-major rows [M, H] and probabilities [M].

        With `EPOptions.fp8_direct` what is returned stands for rows in FP8.
        """
        buffer = self._layer_buffers.shared(hidden_states)
        if self._is_padded:
            out = self._dispatch_to_capacity(buffer, hidden_states, probs)
        else:
            out = self._dispatch_what_comes(buffer, hidden_states, probs)
        assert self._routing_map is not None  # the preprocessing set it
        if self.on_dispatch is not None:
            self.on_dispatch(hidden_states, self._routing_map)
        self._note_use(self._routing_map)
        self._routing_map = None
        rows, probs_of_rows = out.recv_edge, out.recv_topk_weights
        if isinstance(out.recv_x, Tensor):
            rows = out.recv_x
        else:
            self._fp8_rows = FP8Rows(*out.recv_x, out.handle.device_expert_offsets)
        assert rows is not None and probs_of_rows is not None  # as what was sent
        self._has_backward = rows.requires_grad
        self.handle = out.handle
        return rows, probs_of_rows

    def _dispatch_what_comes(
        self, buffer: Buffer, hidden_states: Tensor, probs: Tensor
    ) -> DispatchOutput:
        sizes = dict(layout="expert", expert_alignment=self.expert_alignment)
        try:
            return self._dispatch(buffer, hidden_states, probs, **sizes)
        except EPTooManyTokensError as error:  # on all ranks
            if self.options.max_tokens_per_rank is not None:
                raise
            larger = self._layer_buffers.larger(hidden_states, max(error.num_tokens))
            return self._dispatch(larger, hidden_states, probs, **sizes)

    def _dispatch_to_capacity(
        self, buffer: Buffer, hidden_states: Tensor, probs: Tensor
    ) -> DispatchOutput:
        """Fill each expert's group up to the rows that it has, by Megatron's capacity or by ours.

        No rank hears how many tokens the others have before the next operation, so all know it:
        as with alltoall, they have as many.
        """
        num_tokens, room = len(hidden_states), buffer.config.max_tokens_per_rank
        if num_tokens > room:
            if self.options.max_tokens_per_rank is not None:
                raise EPTooManyTokensError((num_tokens,) * buffer.num_ranks, room)
            buffer = self._layer_buffers.larger(hidden_states, num_tokens)
        if self.overflow is None:
            rows = self._rows_of_megatron(num_tokens, buffer.num_ranks)
            return self._dispatch(buffer, hidden_states, probs, expert_capacity=rows)
        rows = self.overflow.set_room(
            num_tokens=num_tokens * buffer.num_ranks,
            num_topk=self.config.moe_router_topk,
            num_experts=self.config.num_moe_experts,
            alignment=self.expert_alignment,
        )
        stats = self.overflow.stats(hidden_states.device)
        if self.options.device_counts:
            sizes = dict(layout="expert", expert_alignment=self.expert_alignment)
            return self._dispatch(
                buffer, hidden_states, probs, num_worst_tokens=rows, overflow_stats=stats, **sizes
            )
        return self._dispatch(
            buffer, hidden_states, probs, expert_capacity=rows, overflow_stats=stats
        )

    def _rows_of_megatron(self, num_tokens: int, num_ranks: int) -> int:
        """Return the rows of an expert that each rank's router gives its capacity of tokens."""
        rows = num_ranks * get_capacity(
            num_tokens=num_tokens * self.config.moe_router_topk,
            num_experts=self.config.num_moe_experts,
            capacity_factor=self.config.moe_expert_capacity_factor,
        )
        return max(round_up(rows, self.expert_alignment), 1)

    def _dispatch(
        self, buffer: Buffer, hidden_states: Tensor, probs: Tensor, **sizes: Any
    ) -> DispatchOutput:
        self._buffer = buffer
        return buffer.dispatch(
            hidden_states,
            routing_map=self._routing_map,
            topk_weights=probs,
            wire_dtype=self._wire_dtype,
            recv_dtype=fp8.FP8_DTYPE if self.options.fp8_direct else None,
            during_backward=self.during_backward,
            **sizes,
        )

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the rows of each local expert, padding included: [E_local] int64 on the CPU.

        With `EPOptions.device_counts` it is where each one's rows end: int32 on the device.
        """
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(hidden_states)
        self._note_use(hidden_states, probs)
        if self._fp8_rows is not None:
            self._note_use(*self._fp8_rows)
            attach(hidden_states, self._fp8_rows)
            self._fp8_rows = None
        assert self.handle is not None  # the dispatch set it
        if probs.dtype != self._probs_dtype:
            probs = probs.to(self._probs_dtype)
        if self.options.device_counts:
            return hidden_states, self.handle.device_expert_offsets[1:], probs
        return hidden_states, self.handle.padded_tokens_per_expert, probs

    def _note_use(self, *tensors: Tensor) -> None:
        """Keep what another stream made from being written over while the current one reads it.

        Under the 1F1B overlap preprocessing and experts are on one stream, dispatch and combine on
        another. Megatron sees to the inputs of combine and to gradients; and it keeps the inputs of
        dispatch until what follows that is on the first stream again.
        """
        if self.config.overlap_moe_expert_parallel_comm:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream())

    @property
    def _is_padded(self) -> bool:
        """Whether every expert has the same number of rows, which the host knows in advance."""
        return self.overflow is not None or self.config.moe_pad_expert_input_to_capacity

    @property
    def tokens_per_expert(self) -> Tensor:
        """[E_local] of the last dispatch, padding not counted: where nobody waits for it."""
        assert self.handle is not None  # the dispatch set it
        if self._is_padded:
            return self.handle.device_tokens_per_expert
        return self.handle.tokens_per_expert

    # --- experts to tokens -----------------------------------------------------------------------

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the rows as they are: combine itself sums those of a token."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send expert-major rows [M, H] back; return the sums [T, H]."""
        if self.during_backward is not None and not self._has_backward:
            at_end_of_backward(hidden_states, self.during_backward)
        handle = self.handle
        assert handle is not None  # the dispatch set it
        gradient, take_grad = gradient_of(hidden_states), None
        if gradient is not None:

            def take_grad(rows: Tensor, scales: Tensor, instead: Tensor) -> None:
                gradient.put(FP8Rows(rows, scales, handle.device_expert_offsets), instead)

        return self._buffer.combine(
            hidden_states.contiguous(),
            handle,
            grad_wire_dtype=fp8.FP8_DTYPE if self.options.fp8_grad_dispatch else None,
            take_grad=take_grad,
        ).combined_x

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Turn [T, H] into [S, B, H]; add shared experts that ran beside the dispatch."""
        output = hidden_states.view(self._shape_of[len(hidden_states)])
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(hidden_states)
            self.shared_experts.post_forward_comm()
            output = output + self.shared_experts.get_output()
        return output

    # --- expert tensor parallelism ---------------------------------------------------------------

    def _for_shards(self, per_expert: Tensor) -> Tensor:
        """Turn [T, E] into [T, E * ETP]: repeat an expert's column for each of its shards.

        Columns go by rank of the group of all shards, in which the ETP ranks of the same experts
        are neighbours.
        """
        if self.tp_size == 1:
            return per_expert
        columns = per_expert.view(-1, self.ep_size, 1, self.num_local_experts)
        return columns.expand(-1, -1, self.tp_size, -1).flatten(1)

    # --- the buffer ------------------------------------------------------------------------------

    @property
    def buffers(self) -> list[Buffer]:
        """The buffers of this layer's group that are in use; see `LayerBuffers`."""
        return self._layer_buffers.of_group

    @property
    def buffer(self) -> Buffer | None:
        """The buffer that the next dispatch uses; None before the first one."""
        return self.buffers[-1] if self.buffers else None

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank is of the first data-parallel replica of the experts."""
        return dist.get_rank(self._expert_dp_group) == 0


def _quantisation_alignment(config) -> int:
    """Return what quantised GEMMs need the rows of an expert to be a multiple of, else 1."""
    return get_align_size_for_quantization(config) if config.fp8 else 1
