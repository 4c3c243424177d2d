"""Memory that the ranks of a node write into each other's, and what the host reads of it."""

from __future__ import annotations

import ctypes

import torch
import torch.distributed as dist

from ep_comm._native import structs
from ep_comm.config import EPConfig
from ep_comm.errors import EPError, EPMismatchError, EPTimeoutError

_ALIGNMENT = 256
_MIN_CHUNK_TOKENS = 4
_MAX_CHUNK_TOKENS = 32
_PHASES = {
    structs.EP_PHASE_CREDIT: "credit",
    structs.EP_PHASE_PLAN: "plan",
    structs.EP_PHASE_ROWS: "rows",
}
_OPS = {structs.EP_OP_DISPATCH: "dispatch", structs.EP_OP_COMBINE: "combine"}
# In the order of EP_FIELD_*.
_FIELDS = ("num_topk", "hidden", "num_experts", "expert-major layout", "expert_alignment")


class Offsets:
    """Where things are in every rank's symmetric memory; the same on all ranks.

    With R ranks, S = max_tokens_per_rank, rows of B bytes and K = num_topk it is mostly
    2 (R - 1) S B bytes of rows (dispatch and combine), and R S K 8 bytes of routing and weights.
    """

    def __init__(self, config: EPConfig, num_ranks: int) -> None:
        self._end = 0
        tokens, num_topk = config.max_tokens_per_rank, config.num_topk
        row_bytes = config.hidden * config.dtype.itemsize
        slot_bytes = -(-(row_bytes + 16 * -(-num_topk // 4)) // 128) * 128
        self.max_chunks = -(-tokens // _MIN_CHUNK_TOKENS)
        self.plan_flags = self._take(4 * num_ranks)
        self.dispatch_credits = self._take(4 * num_ranks)
        self.combine_credits = self._take(4 * num_ranks)
        self.plan_headers = self._take(64 * num_ranks)
        self.dispatch_flags = self._take(8 * num_ranks * self.max_chunks)
        self.combine_flags = self._take(4 * num_ranks * self.max_chunks)
        self.plan_idx = self._take(4 * num_ranks * tokens * num_topk)
        self.combine_weights = self._take(4 * num_ranks * tokens * num_topk)
        self.dispatch_slots = self._take((num_ranks - 1) * tokens * slot_bytes)
        self.combine_rows = self._take((num_ranks - 1) * tokens * row_bytes)
        self.total = self._end

    def _take(self, num_bytes: int) -> int:
        start = self._end
        self._end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return start

    @staticmethod
    def chunk_tokens(chunk_bytes: int, row_bytes: int) -> int:
        """Rows of one flag: about `chunk_bytes`, and the same on every rank."""
        return max(_MIN_CHUNK_TOKENS, min(_MAX_CHUNK_TOKENS, chunk_bytes // row_bytes))


class NodeMemory:
    """Symmetric memory of one buffer, its counters, and its mailbox and fault on the host.

    Collective: made by all ranks of `group` at once.
    """

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._group = group
        self.rank = dist.get_rank(group)
        num_ranks = dist.get_world_size(group)
        device = torch.device("cuda", torch.cuda.current_device())
        if num_ranks == 1:
            self.tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            self._rendezvous, addresses = None, [self.tensor.data_ptr()]
        else:
            import torch.distributed._symmetric_memory as symmetric_memory

            self.tensor = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
            self._rendezvous = symmetric_memory.rendezvous(self.tensor, group)
            addresses = list(self._rendezvous.buffer_ptrs)
            self.tensor.zero_()
        self.counters = torch.zeros(3, 64, dtype=torch.int32, device=device)
        # Pinned host memory has one address for host and device.
        self._host = torch.zeros(
            ctypes.sizeof(structs.Mailbox) + 128, dtype=torch.uint8, pin_memory=True
        )
        self.fault_address = self._host.data_ptr()
        self.mailbox_address = self.fault_address + 128
        self._fault = structs.Fault.from_address(self.fault_address)
        self.mailbox = structs.Mailbox.from_address(self.mailbox_address)
        self._abort = torch.zeros(1, dtype=torch.int32, device=device)
        self._node = dict(
            memory=(ctypes.c_void_p * structs.EP_MAX_NODE_RANKS)(*addresses),
            fault=self.fault_address,
            abort=self._abort.data_ptr(),
            timeout_ns=int(timeout_s * 1e9),
            rank=self.rank,
            num_ranks=num_ranks,
        )
        # Everything is zero everywhere before anybody writes a flag.
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        torch.cuda.synchronize()
        dist.barrier(self._group, device_ids=[torch.cuda.current_device()])

    def node(self, op: int) -> structs.Node:
        """What the kernels of an operation (EP_OP_*) need to know of the others."""
        return structs.Node(op=op, **self._node)

    def check_fault(self) -> None:
        """Raise what a kernel reported, if one did.

        Raises:
            EPTimeoutError, EPMismatchError: By name of the rank.
        """
        if self._fault.code != structs.EP_FAULT_NONE:
            raise self._error()

    def _error(self) -> EPError:
        fault = self._fault
        op = _OPS[fault.op]
        if fault.field == structs.EP_FIELD_CALL:
            return EPMismatchError(
                f"ranks disagree: rank {self.rank} and rank {fault.peer} made different {op} "
                "calls: handles of different dispatches, a new dispatch and a cached one, or "
                "another dtype, FP8 or probabilities on one side only. Every rank of the group "
                "must make the same calls, in the same order, with the same settings."
            )
        if fault.code == structs.EP_FAULT_MISMATCH:
            field = _FIELDS[fault.field]
            return EPMismatchError(
                f"ranks disagree: rank {self.rank} has {field}={fault.expected}; rank "
                f"{fault.peer} has {field}={fault.seen}. Every rank of the group must make the "
                "same calls, in the same order, with the same settings."
            )
        # A credit is for the operation before.
        epoch = int(fault.expected) + (fault.phase == structs.EP_PHASE_CREDIT)
        return self.timeout(op, _PHASES[fault.phase], (fault.peer,), epoch)

    def timeout(
        self, op: str, phase: str, late_ranks: tuple[int, ...], epoch: int
    ) -> EPTimeoutError:
        return EPTimeoutError(
            op=op,
            phase=phase,
            rank=self.rank,
            late_ranks=late_ranks,
            epoch=epoch,
            timeout_s=self._timeout_s,
        )

    def free(self) -> None:
        """Give the memory back, once no rank writes to it any more. Collective.

        After a fault nobody is waited for, and nothing is given back.
        """
        if self._fault.code == structs.EP_FAULT_NONE:
            self._wait_for_all()
            self.tensor = self._rendezvous = None

    def __del__(self) -> None:
        """After a fault the memory is never freed: a late peer may still write to it."""
        if getattr(self, "_fault", None) is not None and self._fault.code != structs.EP_FAULT_NONE:
            _leaked.append((self.tensor, self._rendezvous, self._host, self._abort, self.counters))


_leaked: list = []
