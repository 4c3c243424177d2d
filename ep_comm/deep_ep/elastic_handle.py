"""`EPHandle`: the handle of `ElasticBuffer.dispatch`, with what its callers read."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ep_comm.deep_ep.kept import KeptProperty, Readable, for_reader
from ep_comm.deep_ep.sized import SizedBuffer
from ep_comm.events import is_captured
from ep_comm.handle import DispatchHandle
from ep_comm.numeric import round_up


class EPHandle(Readable):
    """Where the rows of a dispatch went. Pass it to combine, or to dispatch to repeat the routing.

    Tensors are made when they are first asked for, on the current stream, behind the operation.
    Outside of the CUDA graph of a dispatch they are made anew each time, from its last replay,
    which the caller orders the current stream behind. The host waits only where it is said below.
    With E experts on each of R ranks:

    Attributes:
        native: The handle of the native buffer.
        buffer: That buffer.
        do_expand: Whether rows stand by expert.
        num_experts: Of all ranks.
        expert_alignment: Rows of each expert are counted, and with `do_expand` padded, to a
            multiple of this. FP8 rows by expert take a multiple of 4, whatever was asked for.
        num_max_tokens_per_rank: Most tokens of a rank, equal on all.
        num_sms: The most SMs of the dispatch; 0 is as natively.
        num_recv_tokens_per_expert_list: Rows of each local expert, rounded up to the alignment;
            [] where the host did not wait for the counts.
    """

    def __init__(
        self,
        native: DispatchHandle,
        buffer: SizedBuffer,
        topk_idx: Tensor,
        *,
        do_expand: bool,
        do_handle_copy: bool,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        counts: list[int],
    ) -> None:
        self.was_captured = is_captured()
        self.native = native
        self.buffer = buffer
        self._event = native.event.event  # the handle's own one may be of a later operation
        self.do_expand = do_expand
        self.num_experts = buffer.native.config.num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.num_recv_tokens_per_expert_list = [self._aligned(count) for count in counts]
        self._topk_dtype = topk_idx.dtype
        if not do_handle_copy:
            self.topk_idx = topk_idx

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"ep_comm's EPHandle has no {name!r} (docs/deep_ep.md): rows stand by source rank and "
            "then by token, and which tokens they are copies of is not sent along"
        )

    @KeptProperty
    def topk_idx(self) -> Tensor:
        """[T, K], the experts that were dispatched to; -1 is dropped.

        The caller's own tensor with ``do_handle_copy=False``.
        """
        return self._read(self.native.topk_idx).to(self._topk_dtype, copy=True)

    @KeptProperty
    def psum_num_recv_tokens_per_scaleup_rank(self) -> Tensor:
        """[R] int32: the rows that came from ranks 0 to r, each token once. The last is all."""
        return self._read(self.native.device_tokens_per_rank).cumsum(0, dtype=torch.int32)

    @KeptProperty
    def psum_num_recv_tokens_per_expert(self) -> Tensor:
        """[E] int32: with `do_expand` where the last token of each expert ends, behind it padding.

        Without: the running sum of counts, each rounded up to the alignment.
        """
        counts = self._read(self.native.device_tokens_per_expert)
        if self.do_expand:
            return self._read(self.native.device_expert_offsets)[:-1] + counts
        return self._aligned(counts).cumsum(0, dtype=torch.int32)

    @property
    def num_unaligned_recv_tokens_per_expert(self) -> Tensor | None:
        """[E] int32, the tokens of each local expert; None without `do_expand`."""
        if not self.do_expand:
            return None
        return self._read(self.native.device_tokens_per_expert)

    @property
    def num_recv_tokens(self) -> int:
        """Copies of tokens that came, one for each token.

        The host waits for it, where it did not wait in the dispatch.
        """
        return self.native.num_recv_tokens

    def _aligned(self, count):
        return round_up(count, self.expert_alignment)

    def _read(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the dispatch for the current stream, which is ordered behind it.

        The event goes on holding the inputs. CUDA has no such order between a graph and what is
        outside of it: that is the caller's.
        """
        if self._event is not None and self.is_read_where_made:
            torch.cuda.current_stream().wait_event(self._event)
        return for_reader(tensor)
