"""The backends, and the choice among them."""

from __future__ import annotations

import torch.distributed as dist

from ep_comm.backends.base import Backend
from ep_comm.backends.nvlink import NVLinkBackend
from ep_comm.backends.reference import ReferenceBackend
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError

# Fastest first: "auto" takes the first that is available.
BACKENDS: tuple[type[Backend], ...] = (NVLinkBackend, ReferenceBackend)


def make_backend(group: dist.ProcessGroup, config: EPConfig) -> tuple[Backend, dict[str, str]]:
    """Build the backend that `config` asks for on `group`. Collective.

    Returns:
        The backend, and why each faster one was passed over.

    Raises:
        EPArgumentError: The backend asked for is not available; says why.
        EPMismatchError: Ranks passed different configs.
    """
    passed_over: dict[str, str] = {}
    for backend in BACKENDS:
        # Asked of those that this rank does not want, too: ranks compare what they want there.
        reason = backend.unavailable_reason(group, config)
        if config.backend not in ("auto", backend.name):
            continue
        if reason is None:
            return backend.create(group, config), passed_over
        passed_over[backend.name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise EPArgumentError(f"no backend for this group: {reasons}")
