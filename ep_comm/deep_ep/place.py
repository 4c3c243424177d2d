"""Where the ranks of a `Buffer` are, and the group that they communicate by."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ep_comm.checks import checked_group
from ep_comm.deep_ep.hints import Hints
from ep_comm.errors import EPArgumentError, EPUnsupportedError
from ep_comm.job.meeting import meet
from ep_comm.topology import (
    Spot,
    backend_by_device_type,
    device_types,
    num_hosts,
    ranks_of_a_node,
)


def group_for_gpus(group: dist.ProcessGroup, hints: Hints) -> dist.ProcessGroup:
    """Return the group, or an NCCL one of its ranks where GPUs are to be used. Collective.

    DeepEP takes no more of its group than a way to exchange handles, so callers pass one of gloo.
    """
    group = checked_group(group)
    is_for_cpus = not torch.cuda.is_available() or hints.backend == "reference"
    if is_for_cpus or "cuda" in device_types(backend_by_device_type(group)):
        return group
    made = dist.new_group(
        dist.get_process_group_ranks(group), backend="nccl", use_local_synchronization=True
    )
    assert made is not None  # this process is one of the ranks
    return made


def ranks_per_node(
    group: dist.ProcessGroup, hints: Hints, what: str, enable_shrink: bool = False
) -> int | None:
    """Return how many consecutive ranks are on a host; None where all are on one. Collective.

    Args:
        group: The ranks.
        hints: Of them the timeout and the backend.
        what: They make, with its modes.
        enable_shrink: Whether its ranks may be masked.

    Raises:
        EPMismatchError: Ranks make different things.
        EPTimeoutError: A rank did not come.
        EPUnsupportedError: Ranks on GPUs of several hosts are to be masked.
    """
    backends = backend_by_device_type(group)
    what_for = f"make a deep_ep.{what}"
    spots = meet(group, what_for, Spot.of(backends), hints.timeout_s).answers
    if num_hosts(spots) == 1:
        return None
    if enable_shrink and "cuda" in device_types(backends) and hints.backend != "reference":
        raise EPUnsupportedError(
            f"enable_shrink=True: the group is on {num_hosts(spots)} hosts, and ranks on GPUs are "
            "masked on one host only"
        )
    try:
        return ranks_of_a_node(spots)
    except EPArgumentError:  # hosts differ: what is a node then is nobody's to say
        return None
