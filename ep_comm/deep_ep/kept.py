"""What handles keep of what is read of them, where CUDA graphs are captured and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ep_comm.events import is_captured
from ep_comm.handle import Handle


def for_reader(tensor: Tensor) -> Tensor:
    """Return a tensor of a dispatch, kept until the current stream is done with it.

    Who drops the handle does not see it, and so cannot tell torch's allocator of that stream.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


class Readable(Handle):
    """A handle, of which something is made when somebody reads it.

    Attributes:
        was_captured: Whether its dispatch was called while a CUDA graph was captured.
    """

    was_captured: bool

    @property
    def is_read_where_made(self) -> bool:
        """Whether dispatch and reader are both in a CUDA graph, or both in none."""
        return is_captured() == self.was_captured


class KeptProperty:
    """A property of a `Readable` that is made once, where that is right.

    Outside of the graph of its dispatch it is made anew each time: a replay may have come in
    between. What a graph makes of a dispatch outside of it is not kept either: it is not there
    before the graph is replayed.
    """

    def __init__(self, make: Callable[[Any], object]) -> None:
        self._make = make
        self._name = make.__name__
        self.__doc__ = make.__doc__

    def __get__(self, handle: Readable | None, _: object = None) -> Any:
        """Return it; once it is kept nobody asks here any more. Of the class: this object."""
        if handle is None:
            return self
        value = self._make(handle)
        if handle.is_read_where_made:
            handle.__dict__[self._name] = value
        return value
