"""The context of one operation of a buffer."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from ep_comm.backends.base import Backend


class Guard:
    """What `Buffer.guard` returns; as a generator it would cost a call 2 µs more.

    Args:
        backend: What the body works with.
        take_error: Called with an error of the body, and whether the body had started anything that
            other ranks may be waiting for.
    """

    def __init__(self, backend: Backend, take_error: Callable[[BaseException, bool], None]) -> None:
        self._backend = backend
        self._take_error = take_error

    def __enter__(self) -> Backend:
        self._num_started = self._backend.num_started
        return self._backend

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is not None:
            self._take_error(exc, self._backend.num_started != self._num_started)
