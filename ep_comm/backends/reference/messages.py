"""Point-to-point messages between the ranks of a torch.distributed group, with bounded waits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm.errors import EPLostRankError, EPStateError, EPTimeoutError, EPUnsupportedError
from ep_comm.events import HostCopy
from ep_comm.telemetry.watch import Wait
from ep_comm.topology import backend_by_device_type, device_types

_HEADER = "header"
_PHASES = (_HEADER, "routing", "rows", "weights")
# Far from the tags that a user's own messages have on the same group, 0 as a rule.
_FIRST_TAG = 1 << 30


class Operation(NamedTuple):
    """The operation that a wait is part of; error messages name it."""

    op: str
    epoch: int
    buffer: int

    def tag(self, phase: str) -> int:
        """Return the tag of its messages, by which nothing else is taken for them.

        All headers on a group have the same tag. So one that belongs to another buffer is seen,
        and named. The rest is exchanged once headers agree.
        """
        if phase == _HEADER:
            return _FIRST_TAG
        place = _PHASES.index(phase) << 28 | self.buffer % 1024 << 18 | self.epoch % 2**18
        return _FIRST_TAG | place


class Transport:
    """Carries messages between the ranks of a group; or between those that are not masked.

    gloo blocks the host, so that every wait can be bounded and its late peer named; its messages
    carry tags. NCCL enqueues on the current stream, and takes messages in the order in which they
    come, whosever they are; only `to_host` blocks, and there the late peer is unknown.

    After a wait that ran out gloo closes all connections of its group on that rank.

    Attributes:
        masked: Ranks that nothing is sent to, and nothing received from.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.timeout_s = timeout_s
        self.masked: tuple[int, ...] = ()
        # Connections of the buffer's own, once ranks were masked; the ranks at their ends.
        self._gloo: Any = None  # a ProcessGroupGloo; torch's stubs lack its methods
        self._members: list[int] = []
        self._waiting: Wait | None = None
        self.backends = backend_by_device_type(group)
        self.device_types = device_types(self.backends)
        on_cpu = "cpu" in self.backends
        self.host_device = torch.device("cpu" if on_cpu else f"cuda:{torch.cuda.current_device()}")

    @property
    def peers(self) -> list[int]:
        """The other ranks, the next one first, so that not all ranks write to the same one."""
        others = ((self.rank + i) % self.num_ranks for i in range(1, self.num_ranks))
        return [r for r in others if r not in self.masked]

    def check_can_mask(self) -> None:
        """Refuse a transport that cannot leave ranks out.

        Raises:
            EPUnsupportedError: Names it.
        """
        others = sorted({*self.backends.values()} - {"gloo"})
        if others:
            raise EPUnsupportedError(
                f"the reference backend masks ranks over gloo, not over {'/'.join(others)}: use a "
                "gloo group, or the NVLink backend"
            )

    def restart(self, masked: tuple[int, ...], store: dist.Store) -> None:
        """Connect the ranks that are not in `masked` anew. Collective among them, and bounded.

        So no message of an operation that was given up is ever taken for a later one.

        Args:
            masked: Ranks to leave out from now on.
            store: Of these ranks, for this alone.

        Raises:
            EPStateError: One of them did not come to this, or is not reached.
        """
        self.masked = masked
        self._members = [r for r in range(self.num_ranks) if r not in masked]
        self._gloo = None
        if len(self._members) == 1:
            return
        place, bound = self._members.index(self.rank), timedelta(seconds=2 * self.timeout_s)
        try:
            self._gloo = dist.ProcessGroupGloo(store, place, len(self._members), bound)
        except RuntimeError as error:
            raise EPStateError(
                f"rank {self.rank} cannot connect to the ranks that go on: {error}"
            ) from error

    def send(self, tensor: Tensor, peer: int, tag: int) -> dist.Work:
        """Begin to send a tensor to another rank."""
        if self._gloo is not None:
            return self._gloo.send([tensor], self._members.index(peer), tag)
        work = dist.isend(tensor, group=self.group, group_dst=peer, tag=tag)
        assert work is not None  # this rank is a member of the group
        return work

    def receive(self, tensor: Tensor, peer: int, tag: int) -> dist.Work:
        """Begin to receive a tensor from another rank."""
        if self._gloo is not None:
            return self._gloo.recv([tensor], self._members.index(peer), tag)
        work = dist.irecv(tensor, group=self.group, group_src=peer, tag=tag)
        assert work is not None
        return work

    def waits(self) -> list[Wait]:
        """Return whom the host waits for at the moment; from any thread."""
        waiting = self._waiting
        return [] if waiting is None else [waiting]

    def to_host(self, tensor: Tensor, operation: Operation, phase: str) -> Tensor:
        """Return `tensor` on the CPU; the stream has the timeout to get there."""
        if not tensor.is_cuda:
            return tensor
        copy = HostCopy(tensor)
        deadline = time.monotonic() + self.timeout_s
        self._waiting = Wait(operation.op, phase, operation.epoch, None)
        try:
            while not copy.is_there:
                if time.monotonic() > deadline:
                    raise self.timeout(operation, phase, late_ranks=())
                time.sleep(20e-6)
        finally:
            self._waiting = None
        return copy.host

    def timeout(
        self, operation: Operation, phase: str, late_ranks: tuple[int, ...]
    ) -> EPTimeoutError:
        """Return the error of a wait of this rank that ran out."""
        return EPTimeoutError(
            op=operation.op,
            phase=phase,
            rank=self.rank,
            late_ranks=late_ranks,
            epoch=operation.epoch,
            timeout_s=self.timeout_s,
        )


_IS_THERE_S = 1e-3  # of a message that waits for us it takes less


class Exchange:
    """Messages in flight. Keeps the tensors alive; `wait` before reading any of them.

    Both sides know the sizes.

    Args:
        transport: Carries the messages.
        send: ``send[r]`` goes to rank r.
        recv: Takes the rows of all ranks, in rank order.
        recv_rows: Rows that come from each rank.
        operation: The messages are part of it.
        phase: Names their part of it.
    """

    def __init__(
        self,
        transport: Transport,
        send: Sequence[Tensor],
        recv: Tensor,
        recv_rows: Sequence[int],
        operation: Operation,
        phase: str,
    ) -> None:
        self._transport = transport
        self._operation = operation
        self._phase = phase
        self._tensors = (send, recv)
        self._sends: list[tuple[int, dist.Work]] = []
        self._recvs: list[tuple[int, dist.Work]] = []
        self._collective: dist.Work | None = None
        _unfinished.add(self)
        peers = transport.peers
        if recv.is_cuda and transport.backends.get("cuda") == "nccl":
            self._collective = dist.all_to_all_single(
                recv,
                torch.cat(tuple(send)),
                list(recv_rows),
                [len(rows) for rows in send],
                group=transport.group,
                async_op=True,
            )
            return
        tag, recvs = operation.tag(phase), recv.split(tuple(recv_rows))
        recvs[transport.rank].copy_(send[transport.rank])
        for r in peers:
            if recvs[r].numel():
                with self._losing(r):
                    self._recvs.append((r, transport.receive(recvs[r], r, tag)))
        for r in peers:
            if send[r].numel():
                with self._losing(r):
                    self._sends.append((r, transport.send(send[r], r, tag)))

    def wait(self) -> tuple[float, ...]:
        """Complete the exchange.

        Returns:
            Host seconds until each rank's message was there, waited for in rank order; next to
            nothing of those that were there when their turn came. Empty where the host does not
            block.

        Raises:
            EPTimeoutError: A peer did not arrive in time; names all that are missing.
            EPLostRankError: A peer's connection has ended.
        """
        if self._collective is not None:
            self._collective.wait()
            _unfinished.discard(self)
            return ()
        start = time.monotonic()
        waited = [0.0] * self._transport.num_ranks
        arrived = {self._transport.rank}
        for r, work in [*self._recvs, *self._sends]:
            turn = time.monotonic()
            left = self._transport.timeout_s - (turn - start)
            self._transport._waiting = Wait(
                self._operation.op, self._phase, self._operation.epoch, r
            )
            try:
                work.wait(timedelta(seconds=max(left, 1e-3)))
            except RuntimeError as error:
                if time.monotonic() - start < 0.95 * self._transport.timeout_s:
                    raise self._lost(r, error) from error
                late = {r} | self._missing(arrived | {r})
                raise self._transport.timeout(
                    self._operation, self._phase, tuple(sorted(late))
                ) from error
            finally:
                self._transport._waiting = None
            now = time.monotonic()
            # Or whoever comes behind a late rank in this order would look late, too.
            waited[r] = max(waited[r], now - (start if now - turn > _IS_THERE_S else turn))
            arrived.add(r)
        _unfinished.discard(self)
        return tuple(waited)

    def _missing(self, known: set[int]) -> set[int]:
        """Return the ranks outside `known` whose message has not come either."""
        missing = set()
        for r, work in self._recvs:
            if r in known:
                continue
            try:
                work.wait(timedelta(milliseconds=1))
            except RuntimeError:
                missing.add(r)
        return missing

    @contextmanager
    def _losing(self, peer: int) -> Iterator[None]:
        """Raise what is known of `peer` for what the transport raises."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(peer, error) from error

    def _lost(self, peer: int, error: RuntimeError) -> EPLostRankError:
        late = self._transport.timeout(self._operation, self._phase, (peer,))
        return EPLostRankError(**asdict(late), reason=str(error).partition(". ")[0])


# Exchanges that nobody has waited for to the end: an operation may be left, by an error or with a
# hook that is never called. gloo must not lose what it still moves: other messages of the group,
# those of other buffers too, would wait behind it for ever.
_unfinished: set[Exchange] = set()
