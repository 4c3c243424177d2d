"""For processes that import ``deep_ep``: nothing here imports what does."""

from __future__ import annotations

import os

from ep_comm import deep_ep
from ep_comm.deep_ep.hints import TIMEOUT_VARIABLE


def install(rank: int) -> None:
    deep_ep.install()


def patience() -> None:
    """Have the buffers of this process wait less long for what does not come."""
    os.environ.setdefault(TIMEOUT_VARIABLE, "30")
