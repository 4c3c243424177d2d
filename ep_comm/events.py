"""Ordering between streams, and between a stream and the host."""

from __future__ import annotations

import contextlib
from collections import deque

import torch
from torch import Tensor


def is_captured() -> bool:
    """Return whether a CUDA graph is captured on the current stream.

    The default stream never is, and CUDA may not be asked while another one is captured.
    """
    if not torch.cuda.is_initialized() or _is_default_stream():
        return False
    return torch.cuda.is_current_stream_capturing()


def _is_default_stream() -> bool:
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice()) == 0


# Of operations whose event was dropped before anybody had waited for it: what they still use.
_unwaited: deque[tuple[torch.cuda.Event, tuple]] = deque()


def _forget_ended() -> None:
    if is_captured():  # or the capture is void
        return
    with contextlib.suppress(IndexError):  # another thread has taken the last one
        for _ in range(len(_unwaited)):
            kept = _unwaited.popleft()
            if not _has_ended(kept[0]):
                _unwaited.append(kept)


def _has_ended(event: torch.cuda.Event) -> bool:
    try:
        return event.query()
    except RuntimeError as error:
        # Part of a graph, as its memory is. Or another thread captures, and nobody may ask now.
        return "event last recorded" in str(error)


class EventOverlap:
    """The point on a stream where an operation is complete. Everything is a no-op on CPU.

    Meaning and name follow DeepEP's ``EventOverlap``. As a context manager it runs the body while
    the operation is still in flight and makes the current stream wait at the end::

        recv_x, *_, event = buffer.dispatch(..., async_finish=True)
        with event:
            independent_work()
    """

    event: torch.cuda.Event | None = None
    extra_tensors: tuple | None = None  # which the operation still uses

    def __init__(
        self, event: torch.cuda.Event | None = None, extra_tensors: tuple | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        if _unwaited:
            _forget_ended()

    def __del__(self) -> None:
        """Keep what the operation still uses, where nobody has waited, as after an exception."""
        if self.event is not None and self.extra_tensors:
            _unwaited.append((self.event, self.extra_tensors))

    @classmethod
    def record(cls, device: torch.device) -> EventOverlap:
        """Return an event at the current end of `device`'s current stream."""
        if device.type != "cuda":
            return cls()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return cls(event)

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the operation; the host does not block.

        Call it on the stream that the operation's inputs belong to: afterwards they may be freed.
        """
        self.order_current_stream()
        self.extra_tensors = None

    def order_current_stream(self) -> None:
        """Make the current stream wait, whichever it is: the inputs are kept."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: object) -> None:
        self.current_stream_wait()


class HostCopy:
    """A copy of a tensor in the host's memory, made behind what is on the current stream.

    Args:
        tensor: On a GPU or on the CPU. It may be written to again on that stream at once.

    Attributes:
        host: The copy. To be read once it `is_there`.
    """

    def __init__(self, tensor: Tensor) -> None:
        on_gpu = tensor.is_cuda
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
        self.host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event() if on_gpu else None
        if self._event is not None:
            self._event.record()

    @property
    def is_there(self) -> bool:
        """Whether it is complete; waits for nothing."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """Return it when it is complete."""
        if self._event is not None:
            self._event.synchronize()
        return self.host
