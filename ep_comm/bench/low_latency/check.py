"""How many rows of a result are not what they must be, bit for bit."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm import LowLatencyDispatchOutput
from ep_comm.bench.low_latency.inputs import InputSet

_POISON = 0x5A  # bytes of no row


def poison(*tensors: Tensor) -> None:
    """Overwrite results, so that only what is written from here on can be right."""
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(_POISON)


def poison_received(out: LowLatencyDispatchOutput) -> None:
    """Overwrite what a dispatch has given."""
    rows = out.recv_x[0] if isinstance(out.recv_x, tuple) else out.recv_x
    poison(rows, out.recv_count, out.handle.recv_src_info)
    if isinstance(out.recv_x, tuple):
        out.recv_x[1].fill_(-1)  # not contiguous; no scale is negative


def wrong_received(out: LowLatencyDispatchOutput, given: InputSet) -> Tensor:
    """Return how many rows of this rank are wrong, and how many experts have a wrong count."""
    rows, scales = out.recv_x if isinstance(out.recv_x, tuple) else (out.recv_x, None)
    at = given.experts, given.places
    is_wrong = (rows.view(torch.uint8)[at] != given.rows).any(dim=1)
    is_wrong |= out.handle.recv_src_info[at] != given.src_info
    if given.scales is not None:
        assert scales is not None
        is_wrong |= (scales[at].view(torch.int32) != given.scales.view(torch.int32)).any(dim=1)
    return is_wrong.sum() + (out.recv_count != given.counts).sum()


def wrong_combined(combined: Tensor, given: InputSet) -> Tensor:
    """Return how many rows of this rank are wrong."""
    differs = combined.view(torch.int16) != given.combined.view(torch.int16)
    return differs.any(dim=1).sum()


def over_all_ranks(*counts: Tensor) -> int:
    """Return the sum of counts over ranks. Collective."""
    total = torch.stack(counts).sum()
    dist.all_reduce(total)
    return int(total)
