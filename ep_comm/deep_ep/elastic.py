"""`ElasticBuffer`, the expert-parallel part of DeepEP V2's, over this library's `Buffer`."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm.backends.nvlink.tuning import default_sms
from ep_comm.config import check_positive
from ep_comm.deep_ep import place
from ep_comm.deep_ep.bias import checked_bias, with_bias
from ep_comm.deep_ep.config import bytes_of_rows
from ep_comm.deep_ep.elastic_calls import (
    SCALE_GROUP,
    check_repeated,
    check_stats,
    finish,
    run_arguments,
)
from ep_comm.deep_ep.elastic_handle import EPHandle
from ep_comm.deep_ep.handles import checked
from ep_comm.deep_ep.hints import Hints
from ep_comm.deep_ep.payload import payload, sizes_of, without_grad
from ep_comm.deep_ep.sized import SizedBuffers
from ep_comm.deep_ep.utils import EventHandle
from ep_comm.errors import EPArgumentError, EPUnsupportedError
from ep_comm.events import EventOverlap
from ep_comm.fp8 import Payload
from ep_comm.numeric import round_up

_SMS_OF_AN_H200 = 132
_TWO_MIB = 2 << 20


class ElasticBuffer:
    """Expert-parallel communication of one group, with the signatures of DeepEP V2.

    `docs/deep_ep.md` in the repository says what differs. Of V2's ``ElasticBuffer`` this is the
    part for experts: no Engram, no pipeline, no all-gather. There is no autograd. Errors are those
    of `ep_comm.Buffer`, whose docstrings say when they are raised.

    The constructor, `dispatch`, `combine` and `destroy` are collective. Memory is taken by the
    first dispatch, which says how many experts there are (`ep_comm.deep_ep.sized`).

    Args:
        group: Ranks that share the experts. On GPUs a group of gloo will do.
        num_bytes: Kept as the attribute; None is `get_buffer_size_hint`. Sizes follow the calls.
        num_cpu_bytes: Anything but 0 is refused.
        num_max_tokens_per_rank: Most tokens of a rank, where a dispatch does not say it.
        hidden: Of the size hint. What counts is the rows of a dispatch.
        num_topk: No effect.
        use_fp8_dispatch: Of the size hint. FP8 rows can always be dispatched.
        deterministic: No effect: rows always come in the same order.
        allow_hybrid_mode: No effect: the path between hosts is chosen by itself.
        allow_multiple_reduction: No effect: with ``do_expand`` a token's rows on one rank are added
            and rounded before they travel, else there is one sum within a host.
        prefer_overlap_with_compute: Whether operations leave SMs to computation that runs beside
            them, see `ep_comm.Buffer.set_overlapped`.
        sl_idx: No effect.
        num_allocated_qps: No effect, see `ep_comm.NetworkSettings`.
        num_cpu_timeout_secs: No effect.
        num_gpu_timeout_secs: Bound of every wait, unless `ep_comm.deep_ep.hints` has one.
        explicitly_destroy: Kept as the attribute. Without `destroy` memory stays until the process
            ends.

    Attributes:
        group: As passed.
        rank_idx: This process's in the group.
        num_ranks: Ranks of the group.
        num_bytes: See above.
        Others as the arguments.

    Raises:
        EPUnsupportedError: `num_cpu_bytes`.
        EPMismatchError: Another rank makes something else.
        EPTimeoutError: A rank did not come.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        if num_cpu_bytes:
            raise EPUnsupportedError(
                f"num_cpu_bytes={num_cpu_bytes}: rows are kept in GPU memory only (Engram is not "
                "there)"
            )
        hints = Hints.from_environment(timeout_s=float(num_gpu_timeout_secs))
        mine = place.group_for_gpus(group, hints)
        if num_bytes is None:
            num_bytes = self.get_buffer_size_hint(
                mine, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch
            )
        self.group = group
        self.rank_idx = dist.get_rank(mine)
        self.num_ranks = dist.get_world_size(mine)
        self.num_bytes = num_bytes
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.num_allocated_qps = num_allocated_qps
        self.explicitly_destroy = explicitly_destroy
        self._ranks_per_node = place.ranks_per_node(mine, hints, "ElasticBuffer")
        # A dispatch says itself how many tokens a rank may have: nobody has to ask the others.
        tokens = max(hints.max_tokens_per_rank or 0, num_max_tokens_per_rank, 1)
        self._buffers = SizedBuffers(
            mine,
            replace(hints, max_tokens_per_rank=tokens),
            overlapped=prefer_overlap_with_compute,
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"ep_comm's ElasticBuffer has no {name!r}: it is the expert-parallel part of DeepEP's "
            "alone (docs/deep_ep.md)"
        )

    def destroy(self) -> None:
        """Free the memory. Collective. Allowed without `explicitly_destroy` too."""
        self._buffers.destroy()

    # --- sizes and settings ----------------------------------------------------------------------

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Return the bytes that a rank holds, about: a multiple of 2 MiB.

        Rows come back in BF16, so `use_fp8_dispatch` makes no difference. Nor do `num_topk` and the
        last two.
        """
        hidden_bytes = hidden * torch.bfloat16.itemsize
        num_bytes = bytes_of_rows(num_max_tokens_per_rank, hidden_bytes, dist.get_world_size(group))
        return round_up(num_bytes, _TWO_MIB)

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """Return the SMs that operations take where nobody sets them, about; no argument counts.

        They are 24 with `prefer_overlap_with_compute`, else all of the GPU's. Where there are
        measured prices, what runs beside computation takes what these say instead.
        """
        if not torch.cuda.is_available():
            return default_sms(_SMS_OF_AN_H200, self.prefer_overlap_with_compute)
        available = torch.cuda.get_device_properties().multi_processor_count
        return default_sms(available, self.prefer_overlap_with_compute)

    def get_physical_domain_size(self) -> tuple[int, int]:
        """Return the number of hosts, and of ranks on each."""
        per_node = self._ranks_per_node or self.num_ranks
        return self.num_ranks // per_node, per_node

    def get_logical_domain_size(self) -> tuple[int, int]:
        """Return (1, ranks): callers see no hosts."""
        return 1, self.num_ranks

    @staticmethod
    def capture() -> EventHandle | None:
        """Return the current end of the current stream, to pass as `previous_event`."""
        return EventHandle()

    def get_comm_stream(self) -> torch.cuda.Stream:
        """Return the stream that operations with ``async_with_compute_stream=True`` run on.

        Raises:
            EPArgumentError: No operation has made a buffer yet; or it is on the CPU.
        """
        return self._buffers.comm_stream

    # --- operations ------------------------------------------------------------------------------

    def dispatch(
        self,
        x: Payload,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | EventOverlap | None = None,
        previous_event_before_epilogue: EventHandle | EventOverlap | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Payload, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Send each token once to every rank that owns one of its experts.

        Args:
            x: [T, hidden] BF16 (or FP16, FP32); or (``float8_e4m3fn`` rows, FP32 scales [T, hidden
                / 128] of any strides).
            topk_idx: [T, K] int64 or int32, -1 where dropped.
            topk_weights: [T, K] FP32, to travel along.
            cumulative_local_expert_recv_stats: [E] int32, to which the tokens of each local expert
                are added.
            num_experts: Of all ranks.
            num_max_tokens_per_rank: Most tokens of a rank, equal on all; None is the constructor's.
            expert_alignment: See `EPHandle`; None is 1.
            num_sms: The most SMs; 0 is as natively, see `get_theoretical_num_sms`.
            num_qps: No effect.
            previous_event: It starts after this event.
            previous_event_before_epilogue: As `previous_event`: there is no separate epilogue.
            async_with_compute_stream: Run on the communication stream; wait for the event.
            allocate_on_comm_stream: As in `ep_comm.Buffer.dispatch`, with or without an event.
            handle: Repeat the routing of an earlier dispatch. All else but the rows, their weights
                and what says how to run may be left out, or is as it was.
            do_handle_copy: False keeps the caller's `topk_idx` in the handle.
            do_cpu_sync: Wait on the host for the counts, and return as many rows as came. False
                returns as many as may come at most: R `num_max_tokens_per_rank`, and by expert
                those times min(K, E), with room for the padding; that can be captured in a CUDA
                graph, once there was such a call. None is True.
            do_expand: Rows stand by local expert, a token in the group of each of its experts; else
                by source rank, once. In both cases by source rank and then by token.
            do_zero_padding: No effect: padding of groups is always zeros.
            use_tma_aligned_col_major_sf: Scales come column by column, each on 16 bytes.

        Returns:
            (recv_x, recv_topk_idx, recv_topk_weights, handle, event). N rows, local experts [N, K]
            and weights [N, K]; with `do_expand` M rows, None and weights [M]. Weights are None
            where none were sent. Local experts are -1 where another rank owns the expert, and in
            rows behind the last that came.

        Raises:
            EPArgumentError: More tokens than `num_max_tokens_per_rank`, among others; nothing was
                sent.
        """
        x, weights = payload(x), without_grad(topk_weights)
        how = run_arguments(
            previous_event,
            previous_event_before_epilogue,
            bool(async_with_compute_stream),
            allocate_on_comm_stream,
        )
        counted = cumulative_local_expert_recv_stats
        if handle is not None:
            kept: EPHandle = checked(handle, EPHandle, "ElasticBuffer.dispatch")
            expands = do_expand or None  # False may be left out
            check_repeated(kept, (expands, num_experts, num_max_tokens_per_rank, expert_alignment))
            if counted is not None:
                check_stats(counted, kept.num_experts // self.num_ranks, x)
            kept.buffer.limit_sms(num_sms or None)
            native = kept.buffer.native
            out = native.dispatch(x, topk_idx, weights, handle=kept.native, **how)
        else:
            if topk_idx is None or num_experts is None:
                raise EPArgumentError("pass a handle, or topk_idx and num_experts")
            if counted is not None:
                check_stats(counted, num_experts // self.num_ranks, x)
            num_tokens, hidden, dtype = sizes_of(x)
            most_tokens = num_max_tokens_per_rank or self.num_max_tokens_per_rank
            check_positive("num_max_tokens_per_rank", most_tokens)
            if num_tokens > most_tokens:
                raise EPArgumentError(
                    f"x has {num_tokens} tokens, more than num_max_tokens_per_rank {most_tokens}"
                )
            alignment, most_rows = expert_alignment or 1, None
            if do_expand and isinstance(x, tuple):
                alignment = round_up(alignment, SCALE_GROUP)
            if do_cpu_sync is not None and not do_cpu_sync:  # 0 is False too
                most_rows = self.num_ranks * most_tokens
                if do_expand:
                    local_experts = num_experts // self.num_ranks
                    most_rows *= min(topk_idx.shape[-1], local_experts)
                    most_rows = round_up(most_rows + local_experts * (alignment - 1), alignment)
            buffer = self._buffers.normal(hidden, num_experts, dtype, num_tokens, most_tokens)
            buffer.limit_sms(num_sms or None)
            out = buffer.native.dispatch(
                x,
                topk_idx,
                weights,
                layout="expert" if do_expand else "rank",
                expert_alignment=alignment if do_expand else None,
                num_worst_tokens=most_rows,
                **how,
            )
            kept = EPHandle(
                out.handle,
                buffer,
                topk_idx,
                do_expand=bool(do_expand),
                do_handle_copy=bool(do_handle_copy),
                expert_alignment=alignment,
                num_max_tokens_per_rank=most_tokens,
                num_sms=num_sms,
                counts=out.num_recv_tokens_per_expert_list,
            )
        recv_x, event = out.recv_x, out.event
        if counted is not None or isinstance(recv_x, tuple):
            recv_x, event = finish(out, kept, counted, use_tma_aligned_col_major_sf)
        return recv_x, out.recv_topk_idx, out.recv_topk_weights, kept, event

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | EventOverlap | None = None,
        previous_event_before_epilogue: EventHandle | EventOverlap | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sum the rows of each token back on the rank it came from, unweighted.

        Args:
            x: A row for each that the dispatch gave, BF16 (or FP16, FP32). Padding is not read.
            handle: The dispatch's.
            topk_weights: FP32, [N, K] or [M] as the dispatch gives them. Each goes back from the
                rank that owns its expert.
            bias: One or two [T, hidden] of x's type, added to the sum, which is then rounded again.
            num_sms: The most SMs; 0 is as in the dispatch.
            num_qps: No effect.
            previous_event: As in `dispatch`.
            previous_event_before_epilogue: As in `dispatch`.
            async_with_compute_stream: As in `dispatch`.
            allocate_on_comm_stream: As in `dispatch`.

        Returns:
            (combined_x [T, hidden], combined_topk_weights [T, K] or None, event).
        """
        kept: EPHandle = checked(handle, EPHandle, "ElasticBuffer.dispatch")
        biases: tuple[Tensor, ...] = ()
        if bias is not None:
            biases = checked_bias(bias, (kept.native.num_tokens, x.shape[-1]), x.device)
        kept.buffer.limit_sms(num_sms or kept.num_sms or None)
        out = kept.buffer.native.combine(
            without_grad(x),
            kept.native,
            without_grad(topk_weights),
            **run_arguments(
                previous_event,
                previous_event_before_epilogue,
                bool(async_with_compute_stream),
                allocate_on_comm_stream,
            ),
        )
        if biases:
            out = with_bias(out, biases, kept.buffer.native.comm_stream)
        return out.combined_x, out.combined_topk_weights, out.event
