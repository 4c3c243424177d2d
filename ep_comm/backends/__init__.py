"""The backends, and the choice among them."""

from __future__ import annotations

import torch.distributed as dist

from ep_comm.backends.base import Backend
from ep_comm.backends.reference import ReferenceBackend
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError

# Fastest first: "auto" takes the first that is available.
BACKENDS: tuple[type[Backend], ...] = (ReferenceBackend,)


def make_backend(group: dist.ProcessGroup, config: EPConfig) -> Backend:
    """Build the backend that `config` asks for on `group`. Collective."""
    reasons = []
    for backend in BACKENDS:
        if config.backend not in ("auto", backend.name):
            continue
        reason = backend.unavailable_reason(group, config)
        if reason is None:
            return backend(group, config)
        reasons.append(f"{backend.name}: {reason}")
    raise EPArgumentError(f"no backend for this group: {'; '.join(reasons)}")
