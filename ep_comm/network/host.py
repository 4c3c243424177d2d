"""What this host has for a network between GPUs, and what of it is likely to be in the way.

Only files are read: nothing is loaded, opened or sent.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ep_comm.network.settings import NetworkSettings

_MEMLOCK_BYTES = 1 << 30  # less than that, and registering a buffer with a card fails
_NVIDIA_PARAMS = "proc/driver/nvidia/params"
# One of them is there where the driver's module for GPUDirect has been loaded.
_PEER_MODULES = ("sys/module/nvidia_peermem", "sys/module/nv_peer_mem")


class Port(NamedTuple):
    """One port of a network card.

    Attributes:
        card: Such as "mlx5_0".
        number: From 1.
        state: Such as "ACTIVE".
        rate: Such as "400 Gb/sec".
        link_layer: "InfiniBand" or "Ethernet".
        numa_node: The card's, -1 where the host does not say.
    """

    card: str
    number: int
    state: str
    rate: str
    link_layer: str
    numa_node: int

    def __str__(self) -> str:
        """Return one line."""
        numa = "" if self.numa_node < 0 else f", NUMA node {self.numa_node}"
        return f"{self.card}:{self.number} {self.link_layer} {self.rate} {self.state}{numa}"


class Host(NamedTuple):
    """What was found.

    Attributes:
        ports: Of all cards that RDMA knows.
        peer_memory: The module that lets cards reach GPU memory; None where none is loaded.
        gdrdrv: Whether GDRCopy's device is there.
        peer_mapping: Whether the driver was loaded with PeerMappingOverride; None where unknown.
        has_verbs: Whether this process may open a card.
        memlock_bytes: Memory that it may pin; -1 is no limit.
        container: Whether it looks like one.
    """

    ports: tuple[Port, ...]
    peer_memory: str | None
    gdrdrv: bool
    peer_mapping: bool | None
    has_verbs: bool
    memlock_bytes: int
    container: bool

    def describe_gpudirect(self) -> str:
        """Return one line about what connects cards and GPUs."""
        mapping = {True: "yes", False: "no", None: "unknown"}[self.peer_mapping]
        return (
            f"{self.peer_memory or 'nvidia_peermem not loaded'}, "
            f"gdrdrv {'there' if self.gdrdrv else 'not there'}, PeerMappingOverride {mapping}"
        )


def find_host(root: Path = Path("/")) -> Host:
    """Look at this host; `root` stands for the root of its files."""
    params = _text(root / _NVIDIA_PARAMS)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    cgroup = _text(root / "proc/1/cgroup")
    return Host(
        ports=tuple(_ports(root / "sys/class/infiniband")),
        peer_memory=next((Path(m).name for m in _PEER_MODULES if (root / m).exists()), None),
        gdrdrv=(root / "dev/gdrdrv").exists(),
        peer_mapping="PeerMappingOverride=1" in params if params else None,
        has_verbs=any((root / "dev/infiniband").glob("uverbs*")),
        memlock_bytes=-1 if memlock == resource.RLIM_INFINITY else memlock,
        container=any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
        or any(word in cgroup for word in ("docker", "kubepods", "containerd")),
    )


def hints(host: Host, settings: NetworkSettings) -> list[str]:
    """Return what on this host stands in the way of these settings, most likely first.

    Each is a sentence that says what to do. docs/network.md has more about each.
    """
    found: list[str] = []
    if not host.ports:
        where = "this container" if host.container else "this host"
        return [f"no network card in /sys/class/infiniband: {where} reaches no other GPUs by RDMA"]
    if not host.has_verbs:
        found.append("no /dev/infiniband/uverbs*: pass the devices of the cards to the container")
    if not any(port.state == "ACTIVE" for port in host.ports):
        found.append("no port is ACTIVE: see ibstat, or the cable and the subnet manager")
    if 0 <= host.memlock_bytes < _MEMLOCK_BYTES:
        found.append(
            f"only {host.memlock_bytes >> 20} MiB may be pinned: ulimit -l unlimited, or "
            "--ulimit memlock=-1 for the container"
        )
    if host.peer_memory is None and (not settings.dmabuf or settings.ibgda):
        found.append("no module lets cards reach GPU memory: modprobe nvidia_peermem on the host")
    if settings.ibgda and settings.nic_handler in ("auto", "gpu") and host.peer_mapping is False:
        found.append(
            "IBGDA with the GPU at the doorbell needs the driver option PeerMappingOverride=1: set "
            "it, or NVSHMEM_IBGDA_NIC_HANDLER=cpu_host_memory, or use the proxy"
        )
    if settings.ibgda and settings.nic_handler == "cpu" and not host.gdrdrv:
        found.append("NVSHMEM_IBGDA_NIC_HANDLER=cpu needs GDRCopy (/dev/gdrdrv is not there)")
    found += _hints_of_cards(host.ports, settings)
    return found


def _hints_of_cards(ports: Iterable[Port], settings: NetworkSettings) -> list[str]:
    found: list[str] = []
    cards = {port.card for port in ports}
    usable = sorted(card for card in cards if card.startswith(settings.nic_prefix))
    needs_mlx5 = settings.ibgda or settings.remote_transport != "libfabric"
    if needs_mlx5 and not usable:
        found.append(
            f"no card is called {settings.nic_prefix}*, but {', '.join(sorted(cards))}: for these "
            "set NVSHMEM_REMOTE_TRANSPORT=libfabric (EFA: NVSHMEM_LIBFABRIC_PROVIDER=efa), or "
            "NVSHMEM_HCA_PREFIX"
        )
    named = [
        entry.lstrip("^").split(":")[0] for entry in settings.nics or settings.nic_mapping or ()
    ]
    if missing := [name for name in named if name not in cards]:
        variable = "HCA_LIST" if settings.nics else "HCA_PE_MAPPING"
        found.append(f"NVSHMEM_{variable} names {', '.join(missing)}, which this host has not")
    over_ethernet = any(p.link_layer == "Ethernet" for p in ports if p.card in usable)
    if over_ethernet and settings.traffic_class == 0:
        found.append(
            "RoCE with traffic class 0: where the switches give RDMA a class of its own, set "
            "NVSHMEM_IB_TRAFFIC_CLASS to it"
        )
    return found


def _ports(folder: Path) -> Iterable[Port]:
    for card in sorted(folder.glob("*")):
        numa = _text(card / "device/numa_node")
        for port in sorted((card / "ports").glob("*"), key=lambda path: int(path.name)):
            yield Port(
                card.name,
                int(port.name),
                _text(port / "state").rpartition(": ")[2],
                _text(port / "rate").partition(" (")[0],
                _text(port / "link_layer"),
                int(numa) if numa else -1,
            )


def _text(path: Path) -> str:
    """Return what a file says; nothing where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
