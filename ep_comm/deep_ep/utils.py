"""Events, under the names that callers of DeepEP import them by."""

from __future__ import annotations

import torch

from ep_comm.events import EventOverlap

__all__ = ["EventHandle", "EventOverlap"]


class EventHandle(torch.cuda.Event):
    """The current end of the current stream: ``EventOverlap(EventHandle())``.

    None where there is no GPU, as which `EventOverlap` takes it.
    """

    def __new__(cls) -> EventHandle | None:  # type: ignore[misc]  # nobody asks a CPU's for more
        """Record it."""
        if not torch.cuda.is_available():
            return None
        event = super().__new__(cls)
        event.record()
        return event

    def current_stream_wait(self) -> None:
        """Make the current stream wait for it; the host does not block."""
        self.wait()
