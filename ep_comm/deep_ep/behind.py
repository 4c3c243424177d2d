"""Work of ours that follows an operation, on the stream that the operation runs on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ep_comm.events import EventOverlap


def behind(
    event: EventOverlap,
    stream: torch.cuda.Stream | None,
    work: Callable[[], object],
    *used: Tensor,
) -> EventOverlap:
    """Do some work behind an operation.

    Args:
        event: The operation's.
        stream: Where asynchronous operations run.
        work: It reads and writes tensors that there are already.
        used: These tensors, but for those that the operation keeps.

    Returns:
        The end of both.
    """
    if event.event is None or stream is None:
        work()
        return event
    with torch.cuda.stream(stream):
        work()
        end = stream.record_event()
    kept = (*(event.extra_tensors or ()), *used)
    event.extra_tensors = None
    return EventOverlap(end, kept)
