"""The life of one buffer: its backend, its usable state, and one operation at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ep_comm import fault_file
from ep_comm.backends.base import Backend
from ep_comm.config import EPConfig
from ep_comm.errors import (
    EPArgumentError,
    EPError,
    EPOverflowError,
    EPRoutingError,
    EPStateError,
    EPTimeoutError,
    EPUnsupportedError,
)
from ep_comm.job.blame import Blame

_process = os.getpid()  # to ask for it again costs each call a good part of a microsecond


def _note_fork() -> None:
    global _process
    _process = os.getpid()


os.register_at_fork(after_in_child=_note_fork)


class Session:
    """The common part of a buffer, its handles and their backward passes.

    A buffer gets a new one when ranks are masked: handles and hooks of before keep the old one.

    Args:
        backend: Moves the tokens.
        config: The buffer's.
        masked: Ranks that operations go on without, ascending.
        identity: Whose operations they are; None keeps nothing of a fault.
        blame: Where ranks say whom they have waited for; None asks nobody.

    Attributes:
        unusable: Why the buffer can no longer be used; None as long as it can.
        is_destroyed: Whether that is for good.
    """

    def __init__(
        self,
        backend: Backend,
        config: EPConfig,
        masked: tuple[int, ...] = (),
        identity: fault_file.Identity | None = None,
        blame: Blame | None = None,
    ) -> None:
        self.backend = backend
        self.identity = identity
        self._blame = blame
        self.config = config
        self.masked = masked
        self.unusable: str | None = None
        self.is_destroyed = False
        self._whose = "the buffer"
        self._process = _process
        self._in_use = threading.RLock()

    def check_usable(self) -> None:
        """Raise `EPStateError` where no operation can begin any more."""
        if self.unusable is not None:
            raise EPStateError(f"{self._whose} can no longer be used: {self.unusable}")
        self._check_process()

    def check_no_mask(self) -> None:
        """Raise `EPStateError` for an operation that needs all ranks, where some are masked."""
        if self.masked:
            raise EPStateError(
                f"rank {', '.join(map(str, self.masked))} is masked, and only low-latency "
                "operations go on without it: make a new Buffer on a group without it for the "
                "others, or call clear_mask on all ranks"
            )

    def check_own(self, session: Session) -> None:
        """Raise for a handle that was not made by this session.

        Raises:
            EPArgumentError: It is of another buffer.
            EPStateError: Ranks were masked since it was made.
        """
        if session is self:
            return
        if session.backend is self.backend:
            session.check_usable()
        raise EPArgumentError("the handle belongs to another buffer")

    def _check_process(self) -> None:
        if self._process != _process:
            raise EPStateError(
                f"the buffer belongs to process {self._process}, of which this one ({_process}) is "
                "a fork: make one in the process that uses it"
            )

    def operation(self, is_backward: bool = False) -> Operation:
        """Return the context of one operation, which gives the backend.

        An error in it makes the buffer unusable: after a timeout or a mismatch messages of the
        failed operation may still be on their way, and nothing could be trusted. Wrong arguments
        leave the buffer as it was, as long as no other rank waits for what they should have
        started.

        Args:
            is_backward: Whether a backward pass calls it, for the operation's record.

        Raises:
            EPStateError: As `check_usable`; here, not where the context is entered.
        """
        if self.unusable is not None or self._process != _process:
            self.check_usable()
        return Operation(self, self._in_use, is_backward)

    @contextmanager
    def recovery(self) -> Iterator[Backend]:
        """Give the backend to a call that makes a buffer usable again, whatever has failed on it.

        What an error in it means for the buffer is the call's affair.
        """
        if self.is_destroyed:
            self.check_usable()
        self._check_process()
        operation = Operation(self, self._in_use)
        backend = operation.__enter__()
        try:
            yield backend
        finally:
            operation.__exit__(None, None, None)

    def retire(self, reason: str) -> None:
        """End the handles and hooks of this session: the buffer has a new one."""
        self._whose, self.unusable = "this handle or hook", reason

    def destroy(self) -> None:
        """Free what the backend holds. Collective."""
        self.unusable, self.is_destroyed = "it was destroyed", True
        self.backend.destroy()

    def take_error(self, error: BaseException, has_started: bool) -> None:
        """Decide what an error of an operation means for the next one.

        Args:
            error: It ended the operation.
            has_started: Whether the operation had started anything that other ranks may be waiting
                for.
        """
        backend = self.backend
        is_harmless = not backend.has_failed and (
            isinstance(error, EPRoutingError)
            or (isinstance(error, (EPArgumentError, EPUnsupportedError)) and not has_started)
        )
        try:
            if not is_harmless and not isinstance(error, EPOverflowError):
                self._fail(error)
        finally:  # what takes seconds may be interrupted
            if has_started or backend.has_failed:
                backend.abandon()

    def _fail(self, error: BaseException) -> None:
        """Note that an operation ended with `error`; find out, and leave, what is known of it."""
        backend = self.backend
        self.unusable = f"an earlier operation failed: {error!r}"
        backend.give_up()
        if self._blame is not None:
            self._find_origin(self._blame, error)
        if self.identity is not None:
            file = fault_file.leave(self.identity, backend, error)
            if isinstance(error, EPError):
                error.file = file
        if isinstance(error, EPError):
            self.unusable = f"an earlier operation failed: {error}"

    def _find_origin(self, blame: Blame, error: BaseException) -> None:
        """Tell the others whom this rank has waited for, and the error whom they have."""
        if isinstance(error, EPTimeoutError):
            error.origin_ranks = blame.trace(error.late_ranks)
        else:
            blame.trace(())


class Operation:
    """See `Session.operation`; as a generator it would cost a call 2 µs more."""

    __slots__ = ("_in_use", "_is_backward", "_num_started", "_session")

    def __init__(
        self, session: Session, in_use: threading.RLock, is_backward: bool = False
    ) -> None:
        self._session = session
        self._is_backward = is_backward
        self._in_use = in_use  # a thread may hold it more than once

    def __enter__(self) -> Backend:
        backend = self._session.backend
        recorder = backend.recorder
        self._num_started = backend.num_started
        # An interrupt comes in calls: nothing is called between this one and the block.
        if not self._in_use.acquire(False):
            raise EPStateError(
                "another thread is in an operation of this buffer: one thread at a time uses it, "
                "in the same order on every rank"
            )
        recorder.is_backward = self._is_backward
        return backend

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if error is not None:
                has_started = self._session.backend.num_started != self._num_started
                self._session.take_error(error, has_started)
        finally:
            self._in_use.release()
