"""What a group connects: its backends, devices that can send, the hosts of its ranks."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import BackendConfig

from ep_comm.errors import EPArgumentError


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


class Spot(NamedTuple):
    """Where a rank is.

    Attributes:
        host: Name of its host. NVSHMEM, too, tells hosts apart by nothing else.
        gpu: Its GPU's address on the host, which orders the GPUs there; () where it has none.
    """

    host: str
    gpu: tuple[int, ...]

    @classmethod
    def of(cls, backends: Mapping[str, str]) -> Spot:
        """Return that of this process, with the GPU that it has chosen where a group uses it.

        `backends` is what `backend_by_device_type` returns.
        """
        host = socket.gethostname()
        if "cuda" not in device_types(backends):
            return cls(host, ())
        gpu = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(gpu)
        names = ("pci_domain_id", "pci_bus_id", "pci_device_id")  # which an old torch does not tell
        return cls(host, tuple(getattr(properties, name, gpu) for name in names))


def num_hosts(spots: Sequence[Spot]) -> int:
    """Return on how many hosts these ranks are."""
    return len({spot.host for spot in spots})


def ranks_of_a_node(spots: Sequence[Spot], ranks_per_node: int | None = None) -> int:
    """Return what `find_ranks_per_node` does, of ranks by group rank.

    GPUs are compared by their place among those of the group on their host: it does not matter
    which others a host has, or what numbers a process sees.
    """
    on_host: dict[str, list[tuple[int, ...]]] = {}
    for spot in spots:
        on_host.setdefault(spot.host, []).append(spot.gpu)
    places = [sorted(set(on_host[spot.host])).index(spot.gpu) for spot in spots]
    return find_ranks_per_node([spot.host for spot in spots], places, ranks_per_node)


def find_ranks_per_node(
    hosts: Sequence[str], gpus: Sequence[int], ranks_per_node: int | None = None
) -> int:
    """Return how many consecutive ranks are a node: those of one host, or a part of them.

    Args:
        hosts: Name of each rank's host, by group rank.
        gpus: Number of each rank's GPU among those of its host.
        ranks_per_node: What the caller asks for, a divisor of a host's ranks; None takes them all.

    Raises:
        EPArgumentError: The ranks of a host are not consecutive, hosts have different numbers of
            them, a number was asked for that does not divide that, or ranks with the same place in
            their nodes, which talk to each other, have different GPUs.
    """
    runs = [(host, len(list(run))) for host, run in groupby(hosts)]
    names = [host for host, _ in runs]
    for place, host in enumerate(names):
        if host in names[:place]:
            first = hosts.index(host)
            again = next(r for r in range(first, len(hosts)) if hosts[r] != host)
            again = next(r for r in range(again, len(hosts)) if hosts[r] == host)
            raise EPArgumentError(
                f"ranks {first} and {again} are on host {host}, and rank {again - 1} between them "
                f"is on {hosts[again - 1]}: the ranks of a host must be consecutive in the group"
            )
    size = runs[0][1]
    for host, count in runs:
        if count != size:
            raise EPArgumentError(
                f"host {names[0]} has {size} ranks of the group, host {host} has {count}: all "
                "hosts must have equally many"
            )
    node = size if ranks_per_node is None else ranks_per_node
    if node < 1 or size % node:
        raise EPArgumentError(
            f"ranks_per_node {ranks_per_node} does not divide the {size} ranks of a host"
        )
    for rank, gpu in enumerate(gpus):
        if gpu != gpus[rank % size]:
            raise EPArgumentError(
                f"rank {rank} has GPU {gpu} of host {hosts[rank]}, rank {rank % size} has GPU "
                f"{gpus[rank % size]} of host {hosts[0]}: the GPUs of a host must have the same "
                "order everywhere"
            )
    return node
