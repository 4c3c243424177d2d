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

# Fastest first: "auto" takes the first that is available.
BACKENDS: tuple[type[Backend], ...] = (NVLinkBackend, ReferenceBackend)
# Those that have to be asked for by name.
BACKENDS_BY_NAME: tuple[type[Backend], ...] = (NodesBackend,)


class _Member(NamedTuple):
    """A rank's word at the meeting; `facts` are those of each backend, by name."""

    config: EPConfig
    facts: dict[str, object]


class Made(NamedTuple):
    """A backend for a buffer.

    Attributes:
        backend: The one that `config` asks for, or the fastest that works.
        passed_over: Why each faster one was not taken, by name.
        name: The buffer's, the same on all ranks and of no other one.
    """

    backend: Backend
    passed_over: dict[str, str]
    name: str


def make_backend(group: dist.ProcessGroup, config: EPConfig) -> Made:
    """Build the backend that `config` asks for on `group`. Collective, and bounded.

    Raises:
        EPArgumentError: The backend asked for is not available; says why.
        EPMismatchError: Ranks passed different configs.
        EPTimeoutError: A rank did not come.
    """
    candidates = BACKENDS
    if config.backend != "auto":
        candidates = tuple(b for b in (*BACKENDS, *BACKENDS_BY_NAME) if b.name == config.backend)
    mine = _Member(config, {backend.name: backend.facts(group, config) for backend in candidates})
    meeting = meet(group, "make a Buffer", mine, config.timeout_s)
    _check_same_config(meeting, dist.get_rank(group))
    passed_over: dict[str, str] = {}
    for backend in candidates:
        facts = [member.facts[backend.name] for member in meeting.answers]
        reason = backend.unavailable_reason(facts)
        if reason is None:
            return Made(backend.create(group, config, meeting), passed_over, meeting.name)
        passed_over[backend.name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise EPArgumentError(f"no backend for this group: {reasons}")


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
