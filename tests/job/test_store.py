"""A store that is gone: the error names the rank, and what it was doing."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from ranks import run_ranks

from ep_comm import EPStateError
from ep_comm.fault_file import run_name
from ep_comm.job import meeting


class LostStore(dist.HashStore):
    def set(self, key: str, value: str) -> None:
        raise dist.DistNetworkError("Broken pipe")

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        raise dist.DistNetworkError("Connection reset by peer")


def meet_in_a_lost_store(rank: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "default_store", LostStore)
        with pytest.raises(EPStateError) as caught:
            meeting.meet(None, "make a Buffer", None, 5.0)
    assert isinstance(caught.value.__cause__, dist.DistNetworkError)
    return str(caught.value)


def test_a_meeting_in_a_store_that_is_gone():
    assert run_ranks(1, meet_in_a_lost_store) == [
        "rank 0 lost torch.distributed's store while it waited for other ranks (make a Buffer): "
        "Broken pipe"
    ]


def test_the_name_of_a_run_in_a_store_that_is_gone():
    with pytest.raises(EPStateError, match="^rank 3 lost .* while it asked for the run's name: Co"):
        run_name(LostStore(), 3)
