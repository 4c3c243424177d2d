"""Copy engines: the gate before an operation's copies, the copies, the flags behind them.

csrc/PROTOCOL.md, "Copy engines", has the order of it all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ep_comm._native import header
from ep_comm.backends.nvlink.resources import Resources
from ep_comm.numeric import ceil_div, round_up

_HEAD, _FIRST_CHUNK = 0, 1
_WORD_TOKENS = 32  # of a word of the plan's bits
_WARM_UP_BYTES = 16  # no row is shorter


def chunk_rows(max_tokens: int) -> int:
    """Return the rows of a chunk: the same on all ranks."""
    return round_up(ceil_div(max_tokens, header.EP_COPY_CHUNKS), _WORD_TOKENS)


def token_words(max_tokens: int, num_ranks: int) -> int:
    """Return the 32-bit words that say which tokens of all ranks came."""
    return 2 * num_ranks * ceil_div(max_tokens, _WORD_TOKENS)


class CopyEngine:
    """The copies of one kind of operation.

    Args:
        resources: The backend's.
        op: EP_OP_DISPATCH or EP_OP_COMBINE.
        peers: As kernels of the operation get them.

    Attributes:
        stream: Where the copies run.
        args: Those of gate and copies, to delay in tests.
        native_wire: What the other kernels of the operation need to know; set by `begin`.
        chunk_rows: Rows of a chunk.
        num_chunks: The most of them.
    """

    def __init__(self, resources: Resources, op: int, peers: header.Peers) -> None:
        self._native = resources.native
        self._streams = resources.streams
        self.stream = resources.streams.one_more()
        self._max_tokens = resources.config.max_tokens_per_rank
        self.chunk_rows = chunk_rows(self._max_tokens)
        self.num_chunks = ceil_div(self._max_tokens, self.chunk_rows)
        kind = (header.EP_OP_DISPATCH, header.EP_OP_COMBINE).index(op)
        self._flag_bytes = 4 * header.EP_COPY_FLAGS * peers.num_ranks
        offsets = resources.offsets
        self._flag_offset = offsets.copy_flags + 2 * kind * self._flag_bytes
        mark_offset = offsets.copy_marks + 4 * kind * peers.num_ranks
        self.native_wire = header.Wire(mark_offset=mark_offset, chunk_rows=self.chunk_rows)
        self._epoch = torch.zeros(1, dtype=torch.int32, device=resources.device)
        credit_offset = offsets.dispatch_credits if kind == 0 else offsets.combine_credits
        self._gate = header.GateArgs(
            peers=peers,
            epoch=self._epoch.data_ptr(),
            credit_offset=credit_offset,
            mark_offset=mark_offset,
        )
        self._push = header.PushArgs(peers=peers, epoch=self._epoch.data_ptr())
        self.args = (self._gate, self._push)
        self._count = 0
        self._warm_up(offsets)
        self._events = [torch.cuda.Event() for _ in range(header.EP_COPY_CHUNKS)]
        for event in self._events:
            event.record()  # torch makes the CUDA event at the first use
        self._ready = [event.cuda_event for event in self._events]
        self._num_ready = 0

    def begin(self, behind: int, record: int, begins: bool) -> None:
        """Launch the gate of the next operation.

        Args:
            behind: The stream that the copies' one is ordered behind.
            record: Address of the operation's record.
            begins: Whether the operation begins here.
        """
        self._streams.wait(self.stream, behind)
        wire, flag_offset = self.native_wire, self._flag_offset
        if torch.cuda.is_current_stream_capturing():
            wire.number, flag_offset = 0, flag_offset + self._flag_bytes
        else:
            self._count += 1
            wire.number = self._count
        wire.flag_offset = self._push.flag_offset = flag_offset
        self._push.number = wire.number
        self._gate.peers.record = record
        self._gate.begins = begins
        self._num_ready = 0
        self._native.launch("ep_gate", self._gate, self.stream)

    def _warm_up(self, offsets: header.BufferOffsets) -> None:
        """Copy zeros over zeros, while no kernel waits for anything.

        What CUDA prepares for the first copy to a peer might wait for kernels that run.
        """
        push = self._push
        push.source = (push.peers.memory[push.peers.rank] or 0) + offsets.zeros
        push.target_offset = offsets.zeros
        push.row_bytes = _WARM_UP_BYTES
        push.num_rows[:] = [1] * header.EP_MAX_PEERS
        self._copy(0, 1, -1, 0, marks=False)

    def restart(self) -> None:
        """Count operations anew: all flags are zero."""
        self._count = 0
        self._epoch.zero_()

    def wait_for_chunk(self, waiting: int, chunk: int) -> None:
        """Order the stream `waiting` behind the push of a chunk, and of all before it."""
        ready = self._ready[min(chunk, self._num_ready - 1)]
        self._native.event_wait(waiting, ready)

    def _copy(self, first_row: int, num_rows: int, flag: int, tag: int, marks: bool) -> None:
        """Push what is described, then raise the flag; with `marks` chunks can be waited for."""
        push = self._push
        push.first_row, push.chunk_rows, push.flag, push.tag = first_row, num_rows, flag, tag
        push.event = None
        if marks:
            push.event = self._ready[self._num_ready]
            self._num_ready += 1
        self._native.launch("ep_push", push, self.stream)


class DispatchCopyEngine(CopyEngine):
    """The copies of dispatches: all rows of a rank, as they stand, to all others.

    Args:
        resources, peers: As in `CopyEngine`.
    """

    def __init__(self, resources: Resources, peers: header.Peers) -> None:
        super().__init__(resources, header.EP_OP_DISPATCH, peers)
        offsets = resources.offsets
        self._is_ahead = False
        self._region_offset = offsets.dispatch_slots
        self._push.target_stride = offsets.region_bytes

    def push(self, args: header.DispatchArgs, num_tokens: int, late: int | None) -> None:
        """Push rows, scales and weights.

        What `push_rows` has pushed before is left out.

        Args:
            args: Says where they are.
            num_tokens: Rows.
            late: The stream behind which the weights are there, if they are not there with the
                rows: the first chunk of rows does not wait for it.
        """
        if self._is_ahead:
            self._is_ahead = False
            self._push_rest(args, num_tokens, late)
            return
        if late is None:
            self._push_scales(args, num_tokens)
            self._push_head(args, num_tokens, marks=num_tokens == 0)
        for first in range(0, num_tokens, self.chunk_rows):
            if first == 0 and late is not None:
                self._push_scales(args, num_tokens)
                self._push_chunk(args, num_tokens, first, marks=False)
                self._push_rest(args, num_tokens, late)
            else:
                self._push_chunk(args, num_tokens, first, marks=True)
        if late is not None and num_tokens == 0:
            self._push_rest(args, num_tokens, late)

    def restart(self) -> None:
        """Count operations anew: all flags are zero, and nothing is on its way."""
        super().restart()
        self._is_ahead = False

    def push_rows(self, args: header.DispatchArgs, num_tokens: int) -> None:
        """Push rows and scales alone: `push` then pushes what is left."""
        self._is_ahead = True
        self._push_scales(args, num_tokens)
        for first in range(0, num_tokens, self.chunk_rows):
            self._push_chunk(args, num_tokens, first, marks=False)

    def _push_rest(self, args: header.DispatchArgs, num_tokens: int, late: int | None) -> None:
        if late is not None:
            self._streams.wait(self.stream, late)
        self._push_head(args, num_tokens, marks=True)

    def expand(self, args: header.DispatchArgs, num_sms: int, stream: int) -> None:
        """Launch what moves the rows of all ranks to their places: a kernel a chunk."""
        args.wire = self.native_wire
        args.chunk_tokens = 1 << args.chunk_tokens.bit_length() - 1  # so that it divides words
        args.num_push_blocks, args.num_expand_blocks = 0, num_sms
        args.num_blocks = self.num_chunks * num_sms
        args.is_behind_plan = False
        for chunk in range(self.num_chunks):
            self.wait_for_chunk(stream, chunk)
            args.first_token = chunk * self.chunk_rows
            args.end_token = min(args.first_token + self.chunk_rows, self._max_tokens)
            self._native.launch("ep_expand", args, stream)

    def end(self, args: header.DispatchArgs, stream: int) -> None:
        """End an operation whose rows nobody expands, behind its pushes."""
        args.wire = self.native_wire
        args.chunk_tokens = _WORD_TOKENS
        args.num_push_blocks, args.num_expand_blocks, args.num_blocks = 0, 1, 1
        args.first_token = args.end_token = self.num_chunks * self.chunk_rows  # behind all tokens
        self.wait_for_chunk(stream, self.num_chunks)
        self._native.launch("ep_expand", args, stream)

    def _push_chunk(
        self, args: header.DispatchArgs, num_tokens: int, first: int, marks: bool
    ) -> None:
        self._describe(args.x, args.row_bytes, 0, num_tokens)
        flag = _FIRST_CHUNK + first // self.chunk_rows
        self._copy(first, self.chunk_rows, flag, args.rows_tag, marks)

    def _push_scales(self, args: header.DispatchArgs, num_tokens: int) -> None:
        if args.scale_bytes:
            self._describe(args.scales, args.scale_bytes, args.row_bytes, num_tokens)
            self._copy(0, num_tokens, -1, 0, marks=False)

    def _push_head(self, args: header.DispatchArgs, num_tokens: int, marks: bool) -> None:
        before = args.row_bytes + args.scale_bytes
        num_rows = num_tokens if args.weight_bytes else 0
        self._describe(args.weights, args.weight_bytes, before, num_rows)
        self._copy(0, num_tokens, _HEAD, args.tag, marks)

    def _describe(self, address: int | None, row_bytes: int, before: int, num_rows: int) -> None:
        """Say what is pushed; `before` are the bytes of a row's parts that stand before it."""
        push = self._push
        push.source = address
        push.row_bytes = row_bytes
        push.target_offset = self._region_offset + before * self._max_tokens
        push.num_rows[:] = [num_rows] * header.EP_MAX_PEERS


class CombineCopyEngine(CopyEngine):
    """The copies of combines: partial rows of each owner's tokens, by slot.

    Args:
        resources, peers: As in `CopyEngine`.

    Attributes:
        rows: Where kernels leave partial rows.
        weights: Where they leave weights.
    """

    def __init__(self, resources: Resources, peers: header.Peers) -> None:
        super().__init__(resources, header.EP_OP_COMBINE, peers)
        offsets, config, device = resources.offsets, resources.config, resources.device
        self._row_offset, self._weight_offset = offsets.combine_rows, offsets.combine_weights
        self._rank = peers.rank
        num_rows = (peers.num_ranks - 1) * self._max_tokens
        row_bytes = config.hidden * config.dtype.itemsize
        self.rows = torch.empty(num_rows * row_bytes, dtype=torch.uint8, device=device)
        self.weights = torch.empty(num_rows * config.num_topk, dtype=torch.float32, device=device)

    @property
    def num_bytes(self) -> int:
        """Local memory of partial rows and weights."""
        return self.rows.nbytes + self.weights.nbytes

    def combine(
        self, args: header.CombineArgs, received: Sequence[int] | None, stream: int
    ) -> None:
        """Launch a combine: kernels that make partial rows, their copies, the kernel that sums.

        Args:
            args: Those of the kernels.
            received: [R] rows that came from each rank; None where the host does not know: then
                all are pushed that there is room for.
            stream: Where kernels run.
        """
        num_ranks = self._gate.peers.num_ranks
        num_rows = [self._max_tokens] * num_ranks if received is None else list(received)
        self._push.num_rows[:num_ranks] = num_rows
        args.wire = wire = self.native_wire
        args.num_pushed = self._max_tokens if received is None else -1
        args.partial_rows = self.rows.data_ptr()
        args.partial_weights = self.weights.data_ptr()
        # Sums find the flags of chunks where those of the other wire would be; the head has none.
        args.flag_offset = wire.flag_offset + 4 * _FIRST_CHUNK
        args.max_chunks, args.chunk_rows = header.EP_COPY_FLAGS, self.chunk_rows
        most = max(rows for rank, rows in enumerate(num_rows) if rank != self._rank)
        # Their marks are the later ones, where they give up.
        self._streams.wait(stream, self.stream)
        for chunk in range(ceil_div(most, self.chunk_rows)):
            args.first_row = chunk * self.chunk_rows
            self._native.launch("ep_partial_sums", args, stream)
            self._streams.wait(self.stream, stream)
            if chunk == 0 and args.weights is not None:
                self._push_weights(args.routing.num_topk, most)
            self._push_chunk(args, chunk)
        self._streams.wait(stream, self.stream)
        self._native.launch("ep_combine", args, stream)

    def _push_weights(self, num_topk: int, num_rows: int) -> None:
        push, of_a_rank = self._push, 4 * num_topk * self._max_tokens
        push.source, push.source_stride = self.weights.data_ptr(), of_a_rank
        push.target_offset = self._weight_offset + self._rank * of_a_rank
        push.target_stride, push.row_bytes = 0, 4 * num_topk
        self._copy(0, num_rows, -1, 0, marks=False)

    def _push_chunk(self, args: header.CombineArgs, chunk: int) -> None:
        push = self._push
        push.source, push.target_offset = self.rows.data_ptr(), self._row_offset
        push.source_stride = push.target_stride = self._max_tokens * args.row_bytes
        push.row_bytes = args.row_bytes
        first = chunk * self.chunk_rows
        self._copy(first, self.chunk_rows, _FIRST_CHUNK + chunk, args.tag, marks=False)
