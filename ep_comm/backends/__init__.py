"""The backends, and the choice among them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch.distributed as dist

from ep_comm.backends.base import Backend
from ep_comm.backends.nodes.backend import NodesBackend
from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.reference.backend import ReferenceBackend
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError, EPMismatchError
from ep_comm.job.meeting import Meeting, meet
from ep_comm.topology import Spot, backend_by_device_type, num_hosts, ranks_of_a_node

# Fastest first: "auto" takes the first that is available, of those for as many hosts.
BACKENDS: tuple[type[Backend], ...] = (NVLinkBackend, NodesBackend, ReferenceBackend)


class _Member(NamedTuple):
    """A rank's word at the meeting; `facts` are those of each backend, by name."""

    config: EPConfig
    spot: Spot
    facts: dict[str, object]


def make_backend(group: dist.ProcessGroup, config: EPConfig) -> tuple[Backend, dict[str, str], str]:
    """Build the backend that `config` asks for on `group`. Collective, and bounded.

    Returns:
        The backend; why each faster one for as many hosts was not taken, by name; and the buffer's
        name, the same on all ranks and of no other one.

    Raises:
        EPArgumentError: The backend asked for is not available, or the hosts of a group of GPUs
            have different numbers of its ranks; says why.
        EPUnsupportedError: A group of GPUs spans hosts, and NVSHMEM cannot be used; says why.
        EPMismatchError: Ranks passed different configs.
        EPTimeoutError: A rank did not come.
    """
    wanted = [each for each in BACKENDS if config.backend in ("auto", each.name)]
    if config.wire == "copy-engine":
        wanted = [NVLinkBackend]
    mine = _Member(
        config,
        Spot.of(backend_by_device_type(group)),
        {backend.name: backend.facts(group, config) for backend in wanted},
    )
    meeting = meet(group, "make a Buffer", mine, config.timeout_s)
    _check_same_config(meeting, dist.get_rank(group))
    spots = [member.spot for member in meeting.answers]
    config = with_nodes(config, spots)
    if config.backend == "auto" and len(wanted) > 1:
        wanted.remove(NodesBackend if num_hosts(spots) == 1 else NVLinkBackend)
    passed_over: dict[str, str] = {}
    for backend in wanted:
        facts = [member.facts[backend.name] for member in meeting.answers]
        reason = backend.unavailable_reason(facts, spots, config)
        if reason is None:
            return backend.create(group, config, meeting, spots), passed_over, meeting.name
        passed_over[backend.name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    what = "no backend" if config.wire == "sm" else f"no backend with wire={config.wire!r}"
    raise EPArgumentError(f"{what} for this group: {reasons}")


def with_nodes(config: EPConfig, spots: list[Spot]) -> EPConfig:
    """Return `config` with its `ranks_per_node` found, where the ranks are on several hosts.

    Every backend sums by it. Where hosts have different numbers of ranks it stays None, one node
    for all: only the reference backend can serve these.
    """
    if config.ranks_per_node is not None or num_hosts(spots) == 1:
        return config
    try:
        return dataclasses.replace(config, ranks_per_node=ranks_of_a_node(spots))
    except EPArgumentError:
        return config


def _check_same_config(meeting: Meeting, rank: int) -> None:
    mine = meeting.answers[rank].config
    for other, member in enumerate(meeting.answers):
        if member.config == mine:
            continue
        names = [field.name for field in dataclasses.fields(mine)]
        different = [n for n in names if getattr(mine, n) != getattr(member.config, n)]
        here, there = (
            ", ".join(f"{name}={getattr(config, name)!r}" for name in different)
            for config in (mine, member.config)
        )
        raise EPMismatchError(
            f"ranks disagree: rank {rank} has {here}; rank {other} has {there}. Every rank of the "
            "group must pass the same EPConfig."
        )
