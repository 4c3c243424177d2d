"""The methods of `Buffer` that say what its operations did, on this rank and on all."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from ep_comm.config import EPConfig, check_positive
from ep_comm.errors import EPStateError
from ep_comm.job.files import write_json
from ep_comm.job.meeting import meet
from ep_comm.session import Session
from ep_comm.telemetry.records import OpRecord, Records
from ep_comm.telemetry.stats import JobStats, Stats, summarize
from ep_comm.telemetry.trace import chrome_trace, rank_trace


class RecordCalls:
    """Records, statistics and traces of a buffer's operations."""

    group: dist.ProcessGroup
    config: EPConfig
    rank: int
    num_ranks: int
    _session: Session

    @property
    def records(self) -> Records:
        """The records of operations: bytes moved, time taken, ranks waited for.

        They cost nothing until they are read. Reading waits for the GPU.
        """
        return self._session.backend.recorder

    def stats(self, num_operations: int | None = None) -> Stats:
        """Return times, waits and balance of the last operations of this rank.

        Of a buffer that has failed, too. It waits for the GPU, and for no other rank.

        Args:
            num_operations: The last so many; None: all that are still on record, see `records`.

        Raises:
            EPArgumentError: `num_operations` is no positive integer.
            EPStateError: The buffer was destroyed.
        """
        records = self._last_records(num_operations)
        return summarize(records, self.rank, self.num_ranks)

    def _last_records(self, num_operations: int | None) -> list[OpRecord]:
        if num_operations is not None:
            check_positive("num_operations", num_operations)
        if self._session.is_destroyed:
            self._session.check_usable()
        records = self.records
        first = 0 if num_operations is None else records.num_operations - num_operations
        return records.since(max(0, first))

    def stats_of_all_ranks(self, num_operations: int | None = None) -> JobStats:
        """Return `stats` of all ranks. Collective; nothing is sent before somebody asks.

        Raises:
            EPTimeoutError: A rank did not come within ``config.timeout_s``. The buffer is as
                before.
            EPMismatchError: A rank came to the meeting point for something else.
            Others as `stats`.
        """
        mine = self.stats(num_operations)
        meeting = meet(self.group, "compare statistics", mine, self.config.timeout_s, op="stats")
        return JobStats(ranks=tuple(meeting.answers))

    def write_trace(self, path: str | os.PathLike[str], num_operations: int | None = None) -> None:
        """Write the last operations of all ranks as a trace, for Perfetto or Chrome. Collective.

        Rank 0 of the group writes it. The file is there whole or not at all. It says by how much
        the clocks of the ranks may be apart.

        Args:
            path: Where rank 0 writes it.
            num_operations: As in `stats`.

        Raises:
            EPStateError: Rank 0 cannot write it; on all ranks. The buffer is as before.
            Others as `stats_of_all_ranks`.
        """
        records = self._last_records(num_operations)
        mine = rank_trace(records, self.rank, self.records.clock(), dist.get_rank())
        timeout_s = self.config.timeout_s
        traces = meet(self.group, "write a trace", mine, timeout_s, op="trace").answers
        problem = None
        if self.rank == 0:
            try:
                write_json(Path(path), chrome_trace(traces))
            except OSError as error:
                problem = str(error)
        answers = meet(self.group, "have written a trace", problem, timeout_s, op="trace").answers
        if answers[0] is not None:
            raise EPStateError(f"rank 0 cannot write the trace {os.fspath(path)}: {answers[0]}")
