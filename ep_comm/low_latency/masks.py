"""The methods of `Buffer` by which low-latency operations go on without ranks that are dead."""

from __future__ import annotations

from ep_comm.errors import EPArgumentError
from ep_comm.job.blame import Blame
from ep_comm.job.roster import Roster
from ep_comm.low_latency.calls import LowLatencyCalls
from ep_comm.low_latency.handle import HooksOut
from ep_comm.numeric import is_int
from ep_comm.session import Session


class MaskCalls(LowLatencyCalls):
    """The low-latency methods of `Buffer`, and those that mask ranks."""

    rank: int
    _roster: Roster

    def mask_rank(self, *ranks: int) -> None:
        """Go on without `ranks`, in low-latency operations. Collective among all others.

        They may be dead, or late. Nothing comes from them any more, and entries of ``topk_idx``
        that name one of their experts count as -1. Captured CUDA graphs heed it at their next
        replay.

        After an operation that ended with an error this makes the buffer usable again. Everything
        that was started before is given up, on all ranks: handles and hooks of before are void, and
        outputs of operations that had not ended are unspecified. So each rank begins anew what it
        was at, at a point that is the same for all, such as the first layer of a step. Operations
        count on from a number that is higher than any before.

        As long as a rank is masked, `dispatch` and `combine` are refused, and `destroy` waits for
        nobody. Masked ranks stay so until `clear_mask`.

        The ranks meet in torch.distributed's store. Mostly the process of rank 0 holds it: nothing
        can be masked once that has died.

        Args:
            ranks: Group ranks, the same on all ranks that go on. None: those that do not come to
                this within twice ``config.timeout_s``. Errors of several ranks need not name the
                same one as late; this finds out.

        Raises:
            EPArgumentError: No rank of the group, or this one; or a buffer without
                ``config.low_latency_tokens``.
            EPMismatchError: Others that go on passed other ranks. The buffer is as before.
            EPTimeoutError: Names a rank that goes on and did not come within twice
                ``config.timeout_s``. Call it again, on all ranks.
            EPStateError: The others have masked this rank; the buffer was destroyed; the store is
                gone.
            EPUnsupportedError: The reference backend over NCCL; capture in a CUDA graph.
        """
        for rank in ranks:
            if not is_int(rank) or not 0 <= rank < self.num_ranks:
                raise EPArgumentError(
                    f"mask_rank takes ranks of the group, 0 to {self.num_ranks - 1}, got {rank!r}"
                )
            if rank == self.rank:
                raise EPArgumentError(
                    f"rank {rank} cannot mask itself: the ranks that go on without it call this"
                )
        wanted = tuple(sorted({*self._roster.masked, *ranks})) if ranks else None
        self._change_mask("mask_rank", wanted)

    def clear_mask(self) -> None:
        """Let all ranks take part again. Collective among all of the group, masked ones too.

        All of them begin anew, as after `mask_rank`. A masked rank comes to this with whatever its
        last operation raised. Afterwards all operations work, `dispatch` and `combine` too, and
        handles of before are void.

        Raises:
            EPMismatchError: Another rank called `mask_rank`.
            EPTimeoutError: Names the ranks that did not come within twice ``config.timeout_s``.
            Others as `mask_rank`.
        """
        self._change_mask("clear_mask", ())

    def query_masked(self) -> tuple[int, ...]:
        """Return the masked ranks, ascending.

        Once an operation has failed this asks the store, so that a rank which the others have
        masked finds itself among them.

        Raises:
            EPStateError: The store is gone, and the buffer is unusable.
        """
        if self._session.unusable is None:
            return self._session.masked
        return self._roster.latest()

    def _change_mask(self, op: str, masked: tuple[int, ...] | None) -> None:
        """Agree with the other ranks that go on, and begin anew with them."""
        self._made_for_low_latency()
        session = self._session
        with session.recovery() as backend:
            numbers = self._roster.agree(op, masked, backend.quiesce())
            session.unusable = f"{op} did not come to its end: call it again"
            masked = self._roster.masked
            # Even, so that the two halves of the memory are as far.
            first = 2 * (max(numbers) // 2 + 1)
            backend.restart(masked, first, self._roster.store())
            self._roster.meet(op)
        session.retire(f"{op} was called since it was made; begin anew with a dispatch")
        blame = Blame(self._roster.store(), self.rank, self.num_ranks)
        self._session = Session(session.backend, self.config, masked, session.identity, blame)
        self._dispatches = HooksOut("low_latency_dispatch", first)
        self._combines = HooksOut("low_latency_combine", first)
