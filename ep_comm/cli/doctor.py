"""``ep-comm doctor``: what this machine has, what will be used, and why.

Needs no GPU, and no package but torch: it is for installations that lack something.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from ep_comm import EPConfig, _native
from ep_comm._native import header
from ep_comm.backends.nvlink import support as nvlink_support
from ep_comm.errors import EPArgumentError
from ep_comm.job.environment import NOT_INSTALLED, output_of, package_version, versions
from ep_comm.network.host import find_host, hints
from ep_comm.network.settings import NetworkSettings

# What changes how the links and the queues are used. NVSHMEM's variables are under "network".
ENVIRONMENT = (
    "NCCL_NVLS_ENABLE",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "NCCL_IB_SL",
)
_NVSHMEM_WHEELS = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
_MAX_PORTS = 9  # lines of them, so that all fits on a screen
_TITLE_WIDTH = 18


def diagnose() -> str:
    """Return one screen about this machine."""
    num_gpus = torch.cuda.device_count()
    sections = [
        ("versions", _grid(versions().items())),
        ("CUDA library", [_native.status()]),
        ("symmetric memory", [symmetric_memory_status()]),
        ("GPUs", _gpus(num_gpus) if num_gpus else [no_gpu_reason()]),
    ]
    if num_gpus > 1:
        sections.append(("peer access", _peers(num_gpus)))
    settings = [(name, os.environ.get(name, "not set")) for name in ENVIRONMENT]
    sections += [
        ("environment", _grid(settings)),
        *network_sections(),
        ("will be used", [backend_choice(num_gpus), hosts_choice(num_gpus)]),
    ]
    return sections_text(sections)


def sections_text(sections: Iterable[tuple[str, list[str]]]) -> str:
    """Return titles on the left, and their lines on the right."""
    return "\n".join(
        f"{title if i == 0 else '':<{_TITLE_WIDTH}}{line}"
        for title, lines in sections
        for i, line in enumerate(lines)
    )


def network_sections() -> list[tuple[str, list[str]]]:
    """Return what there is to reach other hosts, and what is likely to be in the way."""
    host = find_host()
    ports = [str(port) for port in host.ports]
    if len(ports) > _MAX_PORTS:
        ports[_MAX_PORTS - 1 :] = [f"and {len(ports) - _MAX_PORTS + 1} more"]
    try:
        settings = NetworkSettings.from_environment()
        described, found = settings.describe(), hints(host, settings)
    except EPArgumentError as error:
        described, found = f"refused: {error}", []
    sections = [
        ("NVSHMEM", [nvshmem_status()]),
        ("network", [described]),
        ("network cards", ports or ["none"]),
        ("GPUDirect", [host.describe_gpudirect()]),
    ]
    # A host that has no card has nothing to mend.
    return sections + [("to look at", found)] if host.ports and found else sections


def nvshmem_status() -> str:
    """Return whether kernels can use NVSHMEM here, or why not."""
    installed = {name: package_version(name) for name in _NVSHMEM_WHEELS}
    wheels = [f"{name} {found}" for name, found in installed.items() if found != NOT_INSTALLED]
    return f"{_native.nvshmem_unusable_reason() or 'usable'} ({', '.join(wheels) or 'no wheel'})"


def backend_choice(num_gpus: int) -> str:
    """Return the backend of a group of all GPUs of this host, and the reason."""
    if num_gpus == 0:
        return "reference, over gloo: there is no GPU"
    if not dist.is_nccl_available():
        return "reference, over gloo: this torch has no NCCL"
    num_ranks = min(num_gpus, header.EP_MAX_PEERS)
    sizes = EPConfig(num_experts=num_ranks, hidden=1024, max_tokens_per_rank=1, num_topk=1)
    reason = nvlink_support.reason_here(num_ranks, sizes)
    if reason is not None:
        return f"reference, over NCCL: {reason}"
    strangers = [
        f"{i} and {j}"
        for i in range(num_ranks)
        for j in range(i + 1, num_ranks)
        if not torch.cuda.can_device_access_peer(i, j)
    ]
    if strangers:
        return f"reference, over NCCL: GPUs {', '.join(strangers)} have no peer access"
    return f"nvlink, for up to {num_ranks} GPUs of this host in an NCCL group"


def hosts_choice(num_gpus: int) -> str:
    """Return the backend of a group that spans hosts like this one, and the reason."""
    if num_gpus == 0 or not dist.is_nccl_available():
        return "across hosts: reference, over gloo"
    reason = _native.nvshmem_unusable_reason()
    if reason is None:
        return "across hosts: nodes, over NVSHMEM"
    return f"across hosts: refused, as NVSHMEM cannot be used: {reason}"


def no_gpu_reason() -> str:
    """Return why torch sees no GPU."""
    if torch.version.cuda is None:
        return "none: this torch was built without CUDA"
    return "none that torch sees (driver, or CUDA_VISIBLE_DEVICES)"


def symmetric_memory_status() -> str:
    """Return whether torch's symmetric memory can be imported."""
    try:
        importlib.import_module("torch.distributed._symmetric_memory")
    except ImportError as error:
        return f"cannot be imported: {error}"
    return "importable"


def link_names(topology: str) -> list[list[str]]:
    """Return the kind of link between each two GPUs, out of ``nvidia-smi topo -m``."""
    rows = [line.split()[1:] for line in topology.splitlines() if re.match(r"GPU\d+\s", line)]
    return [row[: len(rows)] for row in rows]


def _links(num_gpus: int) -> list[list[str]] | None:
    """Return kinds of links in torch's numbering of the GPUs, where that can be known."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return None  # nvidia-smi numbers all GPUs, torch the visible ones
    links = link_names(output_of(["nvidia-smi", "topo", "-m"]))
    return links if len(links) == num_gpus else None


def _grid(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose columns are as wide as their cells."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _gpus(num_gpus: int) -> list[str]:
    rows = []
    for i in range(num_gpus):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        sms = f"{gpu.multi_processor_count} SMs"
        rows.append((str(i), gpu.name, memory, sms, f"sm_{gpu.major}{gpu.minor}"))
    return _grid(rows)


def _peers(num_gpus: int) -> list[str]:
    """Return a row a GPU: whether it reaches each other one, and over what."""
    links = _links(num_gpus)

    def cell(i: int, j: int) -> str:
        if i == j:
            return "-"
        reaches = "yes" if torch.cuda.can_device_access_peer(i, j) else "NO"
        return f"{reaches} {links[i][j]}" if links else reaches

    gpus = range(num_gpus)
    return _grid([["", *map(str, gpus)], *([str(i), *(cell(i, j) for j in gpus)] for i in gpus)])
