"""For processes that import ``deep_ep``: nothing here imports what does."""

from __future__ import annotations

from ep_comm import deep_ep


def install(rank: int) -> None:
    deep_ep.install()
