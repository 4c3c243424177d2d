"""`Buffer`, as DeepEP V1 has it, over this library's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import Buffer as NativeBuffer
from ep_comm.checks import check_num_sms
from ep_comm.config import check_positive
from ep_comm.deep_ep import place
from ep_comm.deep_ep.bias import checked_bias, with_bias
from ep_comm.deep_ep.config import Config
from ep_comm.deep_ep.handles import NormalHandle, checked
from ep_comm.deep_ep.hints import Hints
from ep_comm.deep_ep.low_latency import LowLatencyCalls
from ep_comm.deep_ep.payload import payload, sizes_of, without_grad
from ep_comm.deep_ep.routing import map_of_ranks, token_layout
from ep_comm.deep_ep.sized import SizedBuffer, SizedBuffers
from ep_comm.errors import EPArgumentError, EPTooManyTokensError, EPUnsupportedError
from ep_comm.events import EventOverlap
from ep_comm.fp8 import Payload
from ep_comm.handle import DispatchOutput
from ep_comm.numeric import ceil_div, round_up


class Buffer(LowLatencyCalls):
    """Expert-parallel communication of one group, with the signatures of DeepEP V1's ``Buffer``.

    Code written against that runs on this unchanged. ``docs/deep_ep.md`` in the repository says
    what differs. There is no autograd, as there is none in DeepEP. Errors are those of
    `ep_comm.Buffer`, whose docstrings say when they are raised.

    The constructor, `dispatch`, `combine` and `destroy` are collective: every rank of the group
    calls them, in the same order. Memory is taken by the first call of a kind, see
    `ep_comm.deep_ep.sized`.

    Args:
        group: Ranks that share the experts, at most one process a GPU. On GPUs a group of gloo will
            do: an NCCL one of the same ranks is made for it.
        num_nvl_bytes: Kept as the attribute. Sizes follow the calls.
        num_rdma_bytes: As `num_nvl_bytes`.
        low_latency_mode: Whether low-latency calls are allowed; normal ones always are.
        num_qps_per_rank: No effect, see `ep_comm.NetworkSettings`.
        allow_nvlink_for_low_latency_mode: False is refused: NVLink is what these operations use.
        allow_mnnvl: No effect.
        use_fabric: True is refused.
        explicitly_destroy: Kept as the attribute. Without `destroy` memory stays until the process
            ends.
        enable_shrink: Whether the calls for masks are allowed.
        comm: Refused where `group` is None: mpi4py is not used.

    Attributes:
        group: As passed.
        rank: This process's in the group.
        group_size: Ranks of the group.
        num_sms: See `set_num_sms`.
        Others as the arguments.

    Raises:
        EPArgumentError: Neither `group` nor `comm`; or an argument that no buffer can have.
        EPUnsupportedError: Something that is refused above, or low-latency mode for GPUs of several
            hosts.
        EPMismatchError: Ranks passed other modes.
        EPTimeoutError: A rank did not come within the timeout (`ep_comm.deep_ep.hints`).
    """

    num_sms: int = 20
    _sm_limit: int | None = None

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        if group is None and comm is None:
            raise EPArgumentError("pass a group: neither group nor comm was given")
        if group is None:
            raise EPUnsupportedError("comm: a communicator of mpi4py is not used, pass a group")
        if not allow_nvlink_for_low_latency_mode and low_latency_mode:
            raise EPUnsupportedError(
                "allow_nvlink_for_low_latency_mode=False: low-latency operations use NVLink"
            )
        if use_fabric:
            raise EPUnsupportedError("use_fabric=True: memory is not shared by the fabric API")
        if enable_shrink and not low_latency_mode:
            raise EPArgumentError("enable_shrink=True needs low_latency_mode=True")
        hints = Hints.from_environment()
        mine = place.group_for_gpus(group, hints)
        self.group = group
        self.rank = dist.get_rank(mine)
        self.group_size = dist.get_world_size(mine)
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        what = f"Buffer (low_latency_mode={low_latency_mode}, enable_shrink={enable_shrink})"
        self._ranks_per_node = place.ranks_per_node(mine, hints, what, enable_shrink)
        self._buffers = SizedBuffers(mine, hints)
        self._scratch: dict[bool, Tensor] = {}

    def destroy(self) -> None:
        """Free the memory. Collective."""
        self._buffers.destroy()

    # --- settings --------------------------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Return whether FP8 rows can be dispatched: they always can."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Limit the SMs of normal operations, of all buffers; those of low latency have all.

        Until this is called, and where no `Config` of the caller's own says it, an operation has
        the SMs that it has natively, see `ep_comm.Buffer.set_num_sms`.

        Raises:
            EPArgumentError: Less than 2.
        """
        check_positive("new_num_sms", new_num_sms)
        check_num_sms(new_num_sms)
        Buffer.num_sms = Buffer._sm_limit = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Return a `Config` with the SMs of `set_num_sms`, for any number of ranks."""
        return Config(Buffer.num_sms, limits_sms=Buffer._sm_limit is not None)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Return what `get_dispatch_config` does."""
        return Buffer.get_dispatch_config(num_ranks)

    @staticmethod
    def capture() -> EventOverlap:
        """Return the current end of the current stream, to pass as `previous_event`."""
        return NativeBuffer.capture()

    def get_comm_stream(self) -> torch.cuda.Stream:
        """Return the stream that operations with ``async_finish=True`` run on.

        It is that of the buffer which the last new sizes made.

        Raises:
            EPArgumentError: No operation has made a buffer yet; or it is on the CPU.
        """
        return self._buffers.comm_stream

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> Tensor:
        """Return memory of the caller's own, ``num_nvl_bytes`` or ``num_rdma_bytes`` of it, zeroed.

        DeepEP gives the memory that its kernels use. Ours is nobody else's to touch: what is
        written here reaches no kernel and no other rank. The same memory each time.

        Args:
            dtype: Of its elements.
            size: Shape of the part to return; None is all, one-dimensional.
            offset: Bytes before the part.
            use_rdma_buffer: Which number of bytes.

        Raises:
            EPArgumentError: The part is larger than the memory.
        """
        memory = self._scratch.get(use_rdma_buffer)
        if memory is None:
            num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
            device = "cuda" if torch.cuda.is_available() else "cpu"
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            self._scratch[use_rdma_buffer] = memory
        end = len(memory) - (len(memory) - offset) % dtype.itemsize
        part = memory[offset:end].view(dtype)
        if size is None:
            return part
        count = torch.Size(size).numel()
        if count > len(part):
            raise EPArgumentError(f"{count} elements of {dtype}, the buffer has {len(part)}")
        return part[:count].view(size)

    # --- normal operations -----------------------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Count what `dispatch` will send. No other rank takes part.

        `dispatch` needs nothing of it but the number of experts: it counts by itself.

        Args:
            topk_idx: [T, K] int64 or int32, -1 where dropped.
            num_experts: Of all ranks.
            previous_event: It starts after this event.
            async_finish: Return an event. It runs on the current stream all the same.
            allocate_on_comm_stream: No effect.

        Returns:
            (num_tokens_per_rank [R] int32, num_tokens_per_rdma_rank [nodes] int32 or None on one
            host, num_tokens_per_expert [num_experts] int32, is_token_in_rank [T, R] bool, event).
            On a GPU bad content of `topk_idx` is found by `dispatch`.
        """
        if previous_event is not None:
            previous_event.order_current_stream()
        layout, per_node = token_layout(
            topk_idx, num_experts, self.group_size, self._ranks_per_node
        )
        return (
            layout.num_tokens_per_rank,
            per_node,
            layout.num_tokens_per_expert,
            layout.is_token_in_rank,
            Buffer.capture() if async_finish else EventOverlap(),
        )

    def dispatch(
        self,
        x: Payload,
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Payload, Tensor | None, Tensor | None, list[int] | None, tuple | None, EventOverlap]:
        """Send each token once to every rank that owns one of its experts.

        Args:
            x: [T, hidden] BF16 (or FP32); or (``float8_e4m3fn`` rows, FP32 scales [T, hidden /
                128] of any strides).
            handle: Repeat the routing of an earlier dispatch; the rest of the routing is left out.
            num_tokens_per_rank: Not read: it follows from the routing.
            num_tokens_per_rdma_rank: Not read.
            is_token_in_rank: [T, R] bool. Read where there is no `topk_idx`.
            num_tokens_per_expert: [num_experts] int32, of which the length is read, and the rest
                where there is no `topk_idx`.
            topk_idx: [T, K] int64 or int32, -1 where dropped: where tokens go.
            topk_weights: [T, K] FP32, to travel along.
            expert_alignment: The counts that come back are rounded up to multiples of this. Rows
                are not padded.
            num_worst_tokens: Rows of the output, so that the host waits for nothing; 0 is as many
                as come.
            config: Of which `Config.num_sms` counts.
            previous_event: It starts after this event.
            async_finish: Run on the communication stream; wait for the returned event.
            allocate_on_comm_stream: As in `ep_comm.Buffer.dispatch`.

        Returns:
            (recv_x, recv_topk_idx [N, K] or None, recv_topk_weights [N, K] or None, tokens of each
            local expert or [] with `num_worst_tokens`, handle, event). Rows stand by source rank,
            then by token. With `handle` all but `recv_x` and the event are None.
        """
        x = payload(x)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise EPArgumentError("pass a handle, or topk_idx and topk_weights, not both")
            kept: NormalHandle = checked(handle, NormalHandle, "dispatch")
            kept.buffer.limit_sms(_sms(config))
            again = kept.buffer.native.dispatch(
                x,
                handle=kept.native,
                previous_event=previous_event,
                async_finish=async_finish,
                allocate_on_comm_stream=allocate_on_comm_stream,
            )
            return again.recv_x, None, None, None, None, again.event

        if num_tokens_per_expert is None:
            raise EPArgumentError("pass a handle, or num_tokens_per_expert of get_dispatch_layout")
        routing_map = None
        if topk_idx is None:
            routing_map = map_of_ranks(is_token_in_rank, num_tokens_per_expert)
        how: dict[str, Any] = dict(
            topk_idx=topk_idx,
            topk_weights=without_grad(topk_weights),
            routing_map=routing_map,
            layout="rank",
            num_worst_tokens=num_worst_tokens or None,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        out, buffer = self._dispatch(x, num_tokens_per_expert.numel(), _sms(config), how)
        counts = out.num_recv_tokens_per_expert_list
        if expert_alignment != 1:
            counts = [round_up(count, expert_alignment) for count in counts]
        return (
            out.recv_x,
            None if topk_idx is None else out.recv_topk_idx,
            out.recv_topk_weights,
            counts,
            NormalHandle(out.handle, buffer, is_token_in_rank),
            out.event,
        )

    def _dispatch(
        self, x: Payload, num_experts: int, num_sms: int | None, how: dict[str, Any]
    ) -> tuple[DispatchOutput, SizedBuffer]:
        """Dispatch by a buffer that has room for it."""
        num_tokens, hidden, dtype = sizes_of(x)
        sizes = (hidden, num_experts, dtype)
        # No host waits that could find out who has too many tokens, so there is room for as many a
        # rank as make up these rows.
        least = ceil_div(how["num_worst_tokens"] or 0, self.group_size)
        buffer = self._buffers.normal(*sizes, num_tokens, least)
        buffer.limit_sms(num_sms)
        try:
            return buffer.native.dispatch(x, **how), buffer
        except EPTooManyTokensError as error:
            if not buffer.native.is_usable:  # one of before, which no host waited for
                raise
            buffer = self._buffers.larger(*sizes, error)
        buffer.limit_sms(num_sms)
        return buffer.native.dispatch(x, **how), buffer

    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sum the rows of each token back on the rank it came from, unweighted.

        Args:
            x: [N, hidden] BF16 (or FP32), a row for each that the dispatch gave.
            handle: The dispatch's.
            topk_weights: [N, K] FP32, which are added up over a token's ranks, all entries of them.
            bias: One or two [T, hidden] of x's type, added to the sum, which is then rounded again.
            config: As in `dispatch`.
            previous_event: As in `dispatch`.
            async_finish: As in `dispatch`.
            allocate_on_comm_stream: As in `dispatch`.

        Returns:
            (combined_x [T, hidden], combined_topk_weights [T, K] or None, event).
        """
        kept: NormalHandle = checked(handle, NormalHandle, "dispatch")
        biases: tuple[Tensor, ...] = ()
        if bias is not None:
            biases = checked_bias(bias, (kept.native.num_tokens, x.shape[-1]), x.device)
        kept.buffer.limit_sms(_sms(config))
        out = kept.buffer.native.combine(
            without_grad(x),
            kept.native,
            without_grad(topk_weights),
            add_weights=topk_weights is not None,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=allocate_on_comm_stream,
        )
        if biases:
            out = with_bias(out, biases, kept.buffer.native.comm_stream)
        return out.combined_x, out.combined_topk_weights, out.event

    # Within DeepEP a call chooses between these two by itself, as ours does among its backends.
    internode_dispatch = dispatch
    internode_combine = combine


def _sms(config: Config | None) -> int | None:
    """Return the SMs that somebody has asked for, or None."""
    if config is None:
        return Buffer._sm_limit
    return config.num_sms if config.limits_sms else None
