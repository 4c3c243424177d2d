"""The copy of a tensor for the host."""

from __future__ import annotations

import torch

from ep_comm.events import HostCopy


def test_a_copy_for_the_host_is_what_was_there():
    tensor = torch.arange(6).view(2, 3)
    copy = HostCopy(tensor)
    tensor.zero_()
    assert copy.is_there and copy.wait() is copy.host
    assert copy.host.tolist() == [[0, 1, 2], [3, 4, 5]]
