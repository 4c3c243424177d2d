"""Memory that the ranks of a host write into each other's, and what the host reads of it."""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm._native import NativeLibrary, header
from ep_comm.backends.nvlink.farewell import Farewell
from ep_comm.backends.nvlink.mapping import map_memory
from ep_comm.config import EPConfig
from ep_comm.errors import (
    SAME_CALLS,
    EPError,
    EPMismatchError,
    EPOverflowError,
    EPRoutingError,
    EPStateError,
    EPTimeoutError,
    EPTooManyTokensError,
)
from ep_comm.job.meeting import Meeting, meet
from ep_comm.telemetry.device import OP_NAMES, RecordAddresses
from ep_comm.telemetry.watch import Wait

_PHASES = {
    header.EP_PHASE_CREDIT: "credit",
    header.EP_PHASE_PLAN: "plan",
    header.EP_PHASE_ROWS: "rows",
}
_ROUTING_PROBLEMS = {
    header.EP_ROUTING_OUT_OF_RANGE: "no expert has number",
    header.EP_ROUTING_DUPLICATE: "a second time expert",
    header.EP_ROUTING_TOO_MANY: "one selected expert too many of",
}
_NO_FAULT, _NO_NOTICE = header.EP_FAULT_NONE, header.EP_NOTICE_NONE
HOST_STRIDE = 256  # bytes between what the device writes
NUM_OPS = 1 + max(OP_NAMES)
# In the order of EP_FIELD_*.
_FIELDS = ("num_topk", "hidden", "num_experts", "expert-major layout", "expert_alignment")


def buffer_offsets(native: NativeLibrary, config: EPConfig, num_ranks: int) -> header.BufferOffsets:
    """Return where things stand in the memory of every rank; the same on all ranks.

    With R ranks, S = max_tokens_per_rank, rows of B bytes and K = num_topk it is mostly
    2 (R - 1) S B bytes of rows (dispatch and combine), and R S K 8 bytes of routing and weights.
    """
    return native.buffer_offsets(
        header.BufferLayoutArgs(
            max_tokens=config.max_tokens_per_rank,
            row_bytes=config.hidden * config.dtype.itemsize,
            num_topk=config.num_topk,
            num_ranks=num_ranks,
            low_latency_tokens=config.low_latency_tokens or 0,
            hidden=config.hidden,
            copy_engines=config.wire == "copy-engine",
        )
    )


def clear(memory: Tensor, offsets: header.BufferOffsets) -> None:
    """Put a rank's memory into the state that operations expect at first.

    It is zero, but for the slots of low-latency rows: there all ones say that nothing has come.
    """
    memory.zero_()
    memory[offsets.low_latency_dispatch : offsets.total] = 0xFF


def farewell_flags(
    memory: Tensor, offsets: header.BufferOffsets | header.NodesOffsets, num_ranks: int
) -> Tensor:
    """Return the [R] int32 in a rank's memory for its `Farewell`."""
    return memory[offsets.farewells :][: 4 * num_ranks].view(torch.int32)


class Notice(NamedTuple):
    """What a plan has to say that no host waited for; fields as those of ``ep_notice``."""

    code: int
    routing_error: tuple[int, ...]
    num_rows: int
    capacity: int
    asked_tokens: tuple[int, ...]


class PeerMemory:
    """One rank's view of the symmetric memory of a buffer.

    Its counters are on the device; its mailbox, fault, notice and progress are on the host.

    Args:
        rank: This GPU's.
        tensor: This rank's memory, all zero.
        addresses: Address of every rank's memory, as mapped here.
        timeout_s: Bound of every wait.
        keep: An object that has to live as long as the mapping.
        farewell: How its ranks part.
    """

    @classmethod
    def of_group(
        cls,
        group: dist.ProcessGroup,
        meeting: Meeting,
        offsets: header.BufferOffsets,
        timeout_s: float,
    ) -> PeerMemory:
        """Make memory with these offsets at each rank of a group. Collective, and bounded."""
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        mapped = map_memory(group, meeting, offsets.total, timeout_s)
        flags_of = [farewell_flags(each, offsets, num_ranks) for each in mapped.of_rank]
        clear(mapped.own, offsets)
        # It is so everywhere before anybody writes a flag.
        torch.cuda.synchronize()
        meet(group, "use the memory of a Buffer", None, timeout_s)
        farewell = Farewell(rank, flags_of)
        return cls(rank, mapped.own, mapped.addresses, timeout_s, mapped.keep, farewell)

    def __init__(
        self,
        rank: int,
        tensor: Tensor,
        addresses: Sequence[int],
        timeout_s: float,
        keep: object,
        farewell: Farewell,
    ) -> None:
        self._set_place(rank, len(addresses))
        self.tensor: Tensor | None = tensor
        self._timeout_s = timeout_s
        self._is_given_up = False
        self.has_diverged = False
        self._keep = keep
        self._farewell: Farewell | None = farewell
        self._addresses = (ctypes.c_void_p * header.EP_MAX_PEERS)(*addresses)
        # A row each for dispatch, combine and plan, so that they share no cache line.
        self.counters = torch.zeros(3, 64, dtype=torch.int32, device=tensor.device)
        self._epochs = torch.zeros(NUM_OPS, 64, dtype=torch.int32, device=tensor.device)
        self._waits = torch.zeros(NUM_OPS, self.num_ranks, dtype=torch.int64, device=tensor.device)
        self.abort = torch.zeros(1, dtype=torch.int32, device=tensor.device)
        self._host = self._allocate_host()
        torch.cuda.synchronize()

    def _set_place(self, rank: int, num_local_ranks: int) -> None:
        """Set who this rank is, and among the ranks whose memory is mapped."""
        self.rank = self._local_rank = rank
        self.num_ranks = self._num_local_ranks = num_local_ranks

    def _allocate_host(self) -> Tensor:
        """Return what device and host both see: pinned memory has one address for both."""
        small = (header.Fault, header.Notice, header.Progress)
        assert max(map(ctypes.sizeof, small)) <= HOST_STRIDE
        num_bytes = len(small) * HOST_STRIDE + ctypes.sizeof(header.Mailbox)
        host = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.fault_address = host.data_ptr()
        self.notice_address = self.fault_address + HOST_STRIDE
        self._progress_address = self.notice_address + HOST_STRIDE
        self.mailbox_address = self._progress_address + HOST_STRIDE
        self._fault = header.Fault.from_address(self.fault_address)
        self._notice = header.Notice.from_address(self.notice_address)
        self._progress = header.Progress.from_address(self._progress_address)
        self.mailbox = header.Mailbox.from_address(self.mailbox_address)
        return host

    def _progress_of(self, op: int) -> int:
        """Return where kernels say whom they wait for."""
        return self._progress_address + getattr(header.Progress, OP_NAMES[op]).offset

    def _rank_of(self, peer: int) -> int:
        """Return the rank that kernels call `peer`."""
        return peer

    def _late_ranks(self, peer: int) -> tuple[int, ...]:
        """Return the ranks that may be late where kernels waited for `peer`."""
        return (self._rank_of(peer),)

    def _names(self, peer: int) -> str:
        """Name those whose doing it may be where what came of `peer` is wrong."""
        origin, *relays = self._late_ranks(peer)
        return f"rank {origin}" + "".join(f" (or rank {r}, which relays its rows)" for r in relays)

    def peers(self, op: int, records: RecordAddresses) -> header.Peers:
        """Return what the kernels of an operation need to know of the other ranks.

        Args:
            op: EP_OP_*.
            records: Where they write records.
        """
        return header.Peers(
            memory=self._addresses,
            fault=self.fault_address,
            progress=self._progress_of(op),
            abort=self.abort.data_ptr(),
            epoch=self._epochs[op].data_ptr(),
            longest_wait_ns=self._waits[op].data_ptr(),
            wire_bytes=records.wire_bytes,
            call_offset=records.call_offset,
            timeout_ns=int(self._timeout_s * 1e9),
            op=op,
            rank=self._local_rank,
            num_ranks=self._num_local_ranks,
        )

    @property
    def has_fault(self) -> bool:
        """Whether a kernel has given up; those after it then do too."""
        return self._fault.code != _NO_FAULT

    def waits(self) -> list[Wait]:
        """Return the ranks that kernels have waited for longer than a second; from any thread.

        Only host memory is read. After a fault, which has ended their waits, it is nobody.
        """
        if self.has_fault:
            return []
        return [
            Wait(name, *_phase_and_epoch(word >> 32, word & 0xFFFFFFFF), self._rank_of(peer))
            for op, name in OP_NAMES.items()
            for peer, word in enumerate(self._progress_words(op))
            if word
        ]

    def _progress_words(self, op: int) -> Iterable[int]:
        return getattr(self._progress, OP_NAMES[op])

    def check_fault(self) -> None:
        """Raise what a kernel reported, if one did.

        Raises:
            EPTimeoutError, EPMismatchError, EPRoutingError: Names the rank.
        """
        if self._fault.code != _NO_FAULT:
            raise self._error()

    def check(self) -> None:
        """Raise what kernels reported, before an operation begins.

        Raises:
            EPTimeoutError, EPMismatchError: As `check_fault`.
            EPOverflowError, EPRoutingError: An earlier dispatch, which no host waited for, had it;
                said once.
        """
        if self._fault.code != _NO_FAULT:
            raise self._error()
        if self._has_notice:
            raise self._error_of(self._take_notice())

    @property
    def _has_notice(self) -> bool:
        return self._notice.code != _NO_NOTICE

    def _take_notice(self) -> Notice:
        """Return what a plan has left, and make room for the next."""
        left = self._notice
        notice = Notice(
            left.code,
            tuple(left.routing_error),
            left.num_rows,
            left.capacity,
            tuple(left.asked_tokens[: self.num_ranks]),
        )
        left.code = header.EP_NOTICE_NONE
        return notice

    def _error_of(self, notice: Notice) -> EPError:
        if notice.code == header.EP_NOTICE_OVERFLOW:
            return EPOverflowError(num_rows=notice.num_rows, capacity=notice.capacity)
        if notice.code == header.EP_NOTICE_TOO_MANY:
            # Nobody waited for this: by now some ranks may have started what others have not.
            self.has_diverged = True
            return EPTooManyTokensError(notice.asked_tokens, notice.capacity)
        kind, token, place, value = notice.routing_error
        return EPRoutingError(
            f"an earlier dispatch, for which the host did not wait, got a bad routing: token "
            f"{token}, entry {place}, {_ROUTING_PROBLEMS[kind]} {value}. Wrong entries counted as "
            "dropped."
        )

    def _error(self) -> EPError:
        fault = self._fault
        op, peer = OP_NAMES[fault.op], self._rank_of(fault.peer)
        if fault.code == header.EP_FAULT_RESULTS:
            return EPStateError(
                f"{op} #{fault.expected}: a third result would be out, or one is received twice: "
                "receive what was sent, each once and in turn, in a replayed graph too"
            )
        if fault.code == header.EP_FAULT_OVERWRITTEN:
            return EPStateError(
                f"{op} #{fault.expected}: rank {peer} gave up, and what its copy engines sent "
                f"meanwhile may have come over rows that rank {self.rank} was reading; its own "
                "error says why"
            )
        if fault.code == header.EP_FAULT_UNFINISHED:
            return EPStateError(
                f"{op} #{fault.expected} came twice on rank {self.rank}: a CUDA graph with a {op} "
                "was replayed while another one of this buffer was begun and not ended. Replay "
                "none between begin_dispatch and its dispatch, nor beside other operations of the "
                "buffer"
            )
        if fault.field == header.EP_FIELD_CALL:
            return EPMismatchError(
                f"ranks disagree: rank {self.rank} and {self._names(fault.peer)} made different "
                f"{op} calls: handles of different dispatches, a new dispatch and a cached one, or "
                f"another dtype, FP8 or probabilities on one side only. {SAME_CALLS}"
            )
        if fault.code == header.EP_FAULT_MISMATCH:
            field = _FIELDS[fault.field]
            return EPMismatchError(
                f"ranks disagree: rank {self.rank} has {field}={fault.expected}; rank "
                f"{peer} has {field}={fault.seen}. {SAME_CALLS}"
            )
        phase, epoch = _phase_and_epoch(fault.phase, fault.expected)
        return self.timeout(op, phase, self._late_ranks(fault.peer), epoch)

    def timeout(
        self, op: str, phase: str, late_ranks: tuple[int, ...], epoch: int
    ) -> EPTimeoutError:
        """Return the error of a wait of this rank that ran out."""
        return EPTimeoutError(
            op=op,
            phase=phase,
            rank=self.rank,
            late_ranks=late_ranks,
            epoch=epoch,
            timeout_s=self._timeout_s,
        )

    def restart(self, offsets: header.BufferOffsets, masked: tuple[int, ...]) -> None:
        """Put all into the state that operations expect at first, faults too.

        No kernel of this rank runs, and no rank writes here but, late, those in `masked`: so with
        any the memory is kept for ever.
        """
        assert self.tensor is not None and self._farewell is not None  # it was not destroyed
        clear(self.tensor, offsets)
        for tensor in (self.counters, self._epochs, self._waits, self.abort, self._host):
            tensor.zero_()
        self.has_diverged = False
        self._farewell.masked = masked
        self._is_given_up = bool(masked)

    def free(self) -> None:
        """Give the memory back, once no rank writes to it any more.

        After a fault, or where it was given up, it is kept and nobody is waited for. It is kept
        with a warning where a rank does not come to this within the timeout.

        Raises:
            EPTimeoutError, EPMismatchError, EPRoutingError: An operation in flight ended with it.
        """
        if self._farewell is None:
            return  # given back before
        if self._may_be_written_to:
            with contextlib.suppress(RuntimeError):  # the GPU itself may have failed
                self._say(self._farewell)
            return
        self._say(self._farewell)
        self.check_fault()  # what was in flight may have had one
        late_ranks = self._farewell.wait(self._timeout_s)
        if late_ranks:
            self.give_up()
            warnings.warn(
                f"rank {self.rank} keeps the memory of its buffer: rank "
                f"{', '.join(map(str, late_ranks))} did not destroy its own within "
                f"{self._timeout_s:g} s, or had failed",
                stacklevel=4,
            )
            return
        self.tensor = self._keep = self._farewell = None

    def _say(self, farewell: Farewell) -> None:
        torch.cuda.synchronize()  # from here on this rank writes to nobody
        farewell.say(not self._may_be_written_to)
        torch.cuda.synchronize()

    def give_up(self) -> None:
        """Keep the memory for ever: this rank failed, and the others do not know of it."""
        self._is_given_up = True

    @property
    def _may_be_written_to(self) -> bool:
        return self._is_given_up or self.has_fault

    def __del__(self) -> None:
        """Leak the memory that a late peer may still write to."""
        if getattr(self, "_fault", None) is not None and self._may_be_written_to:
            device = (self.counters, self._epochs, self._waits, self.abort)
            _leaked.append((self.tensor, self._keep, self._farewell, self._host, device))


def _phase_and_epoch(phase: int, expected: int) -> tuple[str, int]:
    """Return name and operation of a wait (EP_PHASE_*); a credit is for the operation before."""
    return _PHASES[phase], expected + (phase == header.EP_PHASE_CREDIT)


_leaked: list = []
