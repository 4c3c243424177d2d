"""What a process group says of where its ranks are, and what they can send each other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import BackendConfig


def backend_by_device_type(group: dist.ProcessGroup) -> dict[str, str]:
    """Such as {"cpu": "gloo", "cuda": "nccl"}."""
    # Not get_backend_config: frameworks that wrap process groups do not unwrap them for it.
    return BackendConfig(dist.get_backend(group)).get_device_backend_map()


def device_types(backends: dict[str, str]) -> tuple[str, ...]:
    """Of `backend_by_device_type`, the kinds of device that tensors can be sent between and this
    machine has. A gloo group claims GPUs too, and has no point-to-point there."""
    has_cuda = torch.cuda.is_available()
    return tuple(
        kind
        for kind, backend in backends.items()
        if kind == "cpu" or (kind == "cuda" and has_cuda and backend == "nccl")
    )
