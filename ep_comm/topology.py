"""The backends of a process group, and the devices whose tensors its ranks can send each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import BackendConfig


def backend_by_device_type(group: dist.ProcessGroup) -> Mapping[str, str]:
    """Return the group's backend for each type of device: {"cpu": "gloo", "cuda": "nccl"}."""
    # Not get_backend_config: frameworks that wrap process groups do not unwrap them for it.
    return BackendConfig(dist.get_backend(group)).get_device_backend_map()


def device_types(backends: Mapping[str, str]) -> tuple[str, ...]:
    """Return the types of device that this machine has and that tensors can be sent between.

    `backends` is what `backend_by_device_type` returns. A gloo group claims GPUs too, but cannot
    send from rank to rank there.
    """
    has_cuda = torch.cuda.is_available()
    return tuple(
        kind
        for kind, backend in backends.items()
        if kind == "cpu" or (kind == "cuda" and has_cuda and backend == "nccl")
    )
