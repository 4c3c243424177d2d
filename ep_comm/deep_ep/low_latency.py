"""The low-latency methods of `Buffer`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ep_comm import Buffer as NativeBuffer
from ep_comm.deep_ep.handles import LowLatencyHandleTuple, checked
from ep_comm.deep_ep.payload import without_grad
from ep_comm.deep_ep.sized import SizedBuffer, SizedBuffers
from ep_comm.errors import EPArgumentError, EPStateError, EPUnsupportedError
from ep_comm.events import EventOverlap
from ep_comm.fp8 import Payload
from ep_comm.tracing import untraced


class LowLatencyCalls:
    """The low-latency methods of `Buffer`.

    Arguments, results and errors are those of `ep_comm.Buffer`'s methods of the same names, where
    nothing else is said.
    """

    rank: int
    group_size: int
    low_latency_mode: bool
    enable_shrink: bool
    _buffers: SizedBuffers

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Return the bytes of device memory that low-latency operations of these sizes take."""
        return NativeBuffer.get_low_latency_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        )

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Make the buffer for low-latency operations of these sizes, if there is none. Collective.

        There is nothing to clean. After it the first operation may be captured in a CUDA graph.
        """
        self._sized(hidden, num_experts, num_max_dispatch_tokens_per_rank)

    @untraced
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Payload, Tensor, tuple, EventOverlap, Callable[[], None] | None]:
        """Send each token once to every rank that owns one of its experts; receive by expert.

        Args:
            x: [T, hidden] BF16.
            topk_idx: [T, K] int64 or int32, -1 where dropped.
            num_max_dispatch_tokens_per_rank: M, equal on all ranks.
            num_experts: Of all ranks.
            cumulative_local_expert_recv_stats: [E] int32, to which the rows of each expert are
                added.
            dispatch_wait_recv_cost_stats: [R] int64, or [R, R] of which this rank's row counts: the
                nanoseconds waited for each rank are added. (DeepEP adds clock cycles.)
            use_fp8: Send FP8 with scales.
            round_scale: Scales are powers of two.
            use_ue8m0: Scales are their exponent bytes.
            async_finish: Run on the communication stream.
            return_recv_hook: Only send; the returned hook receives.

        Returns:
            (recv_x, recv_count [E] int32, handle, event, hook or None).
        """
        buffer = self._sized(x.size(-1), num_experts, num_max_dispatch_tokens_per_rank)
        call = (
            num_max_dispatch_tokens_per_rank, num_experts, use_fp8, round_scale, use_ue8m0,
            async_finish, return_recv_hook,
        )  # fmt: skip
        stats = dispatch_wait_recv_cost_stats
        given = (  # without calls: this is to take no longer than the native dispatch
            x.detach() if x.requires_grad else x, topk_idx, None,
            cumulative_local_expert_recv_stats, None if stats is None else self._own_row(stats),
        )  # fmt: skip
        recv_x, recv_count, native, event, hook = buffer.native._low_latency_dispatch(call, given)
        handle = LowLatencyHandleTuple(native, buffer, recv_count)
        return recv_x, recv_count, handle, event, hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None] | None]:
        """Add up the rows of each token, weighted, on the rank that it came from.

        Args:
            x: [E, R M, hidden] BF16.
            topk_idx: That of the dispatch.
            topk_weights: [T, K] FP32.
            handle: The dispatch's. It serves any number of combines, one after the other.
            use_logfmt: True is refused.
            zero_copy: The rows stand in `get_next_low_latency_combine_buffer` of the handle.
            async_finish: As in `low_latency_dispatch`.
            return_recv_hook: As in `low_latency_dispatch`.
            out: [T, hidden] BF16 for the result; None: a new one.
            combine_wait_recv_cost_stats: As `dispatch_wait_recv_cost_stats` there.

        Returns:
            (combined_x [T, hidden], event, hook or None).

        Raises:
            EPUnsupportedError: `use_logfmt`; nothing was sent.
        """
        if use_logfmt:
            raise EPUnsupportedError("use_logfmt=True: rows travel back in BF16 only")
        kept = self._kept(handle)
        combined_x, event, hook = kept.buffer.native.low_latency_combine(
            without_grad(x),
            topk_idx,
            without_grad(topk_weights),
            kept.native,
            zero_copy=zero_copy,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
            out=out,
            combine_wait_recv_cost_stats=self._own_row(combine_wait_recv_cost_stats),
        )
        return combined_x, event, hook

    def get_next_low_latency_combine_buffer(self, handle: tuple) -> Tensor:
        """Return where the rows of a combine with ``zero_copy=True`` stand."""
        kept = self._kept(handle)
        return kept.buffer.native.get_next_low_latency_combine_buffer(kept.native)

    # --- masks -----------------------------------------------------------------------------------

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank, or take it in again. Collective among all ranks that go on.

        See `ep_comm.Buffer.mask_rank`. With ``mask=False`` the rank takes part in the call, by
        `low_latency_clean_mask_buffer`.

        Raises:
            EPUnsupportedError: Other ranks would stay masked: all come back together.
        """
        for native in self._maskable():
            if mask:
                native.mask_rank(rank_to_mask)
                continue
            masked = set(native.query_masked())
            if masked - {rank_to_mask}:
                raise EPUnsupportedError(
                    f"ranks {sorted(masked)} are masked, and come back together: call "
                    "low_latency_clean_mask_buffer on all ranks"
                )
            if masked:
                native.clear_mask()

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write 1 for each masked rank and 0 for the others into `mask_status`, [R] int32."""
        masked = {rank for native in self._maskable() for rank in native.query_masked()}
        status = [int(rank in masked) for rank in range(self.group_size)]
        mask_status.copy_(torch.tensor(status, dtype=mask_status.dtype, device="cpu"))

    def low_latency_clean_mask_buffer(self) -> None:
        """Let all ranks take part again. Collective among all, see `ep_comm.Buffer.clear_mask`."""
        for native in self._maskable():
            native.clear_mask()

    # --- what the calls share --------------------------------------------------------------------

    def _sized(self, hidden: int, num_experts: int, max_tokens: int) -> SizedBuffer:
        if not self.low_latency_mode:
            raise EPArgumentError("the buffer was made without low_latency_mode=True")
        return self._buffers.low_latency(hidden, num_experts, max_tokens)

    def _kept(self, handle: object) -> LowLatencyHandleTuple:
        return checked(handle, LowLatencyHandleTuple, "low_latency_dispatch")

    def _own_row(self, stats: Tensor | None) -> Tensor | None:
        """Return where this rank's waits are counted."""
        return stats[self.rank] if stats is not None and stats.dim() == 2 else stats

    def _maskable(self) -> list[NativeBuffer]:
        if not self.enable_shrink:
            raise EPArgumentError("the buffer was made without enable_shrink=True")
        buffers = [buffer.native for buffer in self._buffers.of_low_latency]
        if not buffers:
            raise EPStateError(
                "there are no low-latency operations yet to mask ranks in: call "
                "clean_low_latency_buffer first"
            )
        return buffers
