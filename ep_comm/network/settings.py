"""The settings of the network between nodes: NVSHMEM's variables, typed and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ep_comm._native.header import EP_LOW_LATENCY_CHUNKS, EP_MAX_NETWORK_CHUNKS
from ep_comm.errors import EPArgumentError
from ep_comm.network.variables import (
    Cards,
    Name,
    PowerSize,
    Size,
    Switch,
    Variable,
    Whole,
    Word,
    variable,
    variables_of,
)

MIB = 2**20
# What may be in flight to one peer (csrc/PROTOCOL.md, "What the network must do"): the chunks of a
# dispatch, a combine's rows and weights, a plan, two credits, and the word at parting; and of four
# low-latency operations the head, the chunks and the credit.
_LOW_LATENCY_MESSAGES = 4 * (1 + EP_LOW_LATENCY_CHUNKS + 1)
_NORMAL_MESSAGES = 3 * EP_MAX_NETWORK_CHUNKS + 1 + 2 + 1
MESSAGES_TO_A_PEER = _NORMAL_MESSAGES + _LOW_LATENCY_MESSAGES
# Places of a queue pair that a put takes whose signal is set; a lone signal takes fewer.
PLACES_OF_A_MESSAGE = 4
# Half of a queue pair: with less free, NVSHMEM's device code waits for places, without a bound.
MIN_QUEUE_DEPTH = 2 * MESSAGES_TO_A_PEER * PLACES_OF_A_MESSAGE
_MAX_QUEUE_DEPTH = 32768


def messages_of(has_low_latency: bool) -> int:
    """Return the most messages that one buffer has in flight to one peer."""
    return MESSAGES_TO_A_PEER if has_low_latency else _NORMAL_MESSAGES


# Not ours to choose: NVSHMEM's collectives, the only thing that NCCL would serve, are not used.
_FIXED = {"NVSHMEM_DISABLE_NCCL": "1"}


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Settings of the network between nodes, fixed once NVSHMEM has been initialised.

    Each field stands for one of NVSHMEM's variables. docs/network.md has the table, and says which
    of them matter first. None leaves the choice to NVSHMEM.

    Raises:
        EPArgumentError: A value is not allowed, or two contradict each other. Names the variable.
    """

    service_level: int = variable(
        0,
        "IB_SL",
        Whole(0, 15),
        "InfiniBand service level of all messages. Another one than NCCL's (NCCL_IB_SL) keeps "
        "their traffic apart. The fabric may route a level adaptively.",
    )
    traffic_class: int = variable(
        0,
        "IB_TRAFFIC_CLASS",
        Whole(0, 255),
        "RoCE: traffic class, four times the DSCP that the switches sort by.",
    )
    gid_index: int = variable(
        -1,
        "IB_GID_INDEX",
        Whole(-1, 255),
        "RoCE: entry of the card's GID table; -1 lets NVSHMEM find one of the address family and "
        "RoCE version below.",
    )
    address_family: str = variable(
        "AF_INET", "IB_ADDR_FAMILY", Word("AF_INET", "AF_INET6"), "RoCE: kind of addresses."
    )
    roce_version: int = variable(2, "IB_ROCE_VERSION_NUM", Whole(1, 2), "RoCE: version.")
    remote_transport: str = variable(
        "ibrc",
        "REMOTE_TRANSPORT",
        Word("ibrc", "ibdevx", "ucx", "libfabric"),
        "What the proxy thread sends with: ibrc for InfiniBand and RoCE, libfabric for EFA and "
        "Slingshot.",
    )
    ibgda: bool = variable(
        False,
        "IB_ENABLE_IBGDA",
        Switch(),
        "GPUs give their cards orders themselves (mlx5 only); off: NVSHMEM's proxy thread does. "
        "Ours are few and large, so the proxy costs latency and little bandwidth, and it needs no "
        "option of the driver.",
    )
    libfabric_provider: str = variable(
        "cxi",
        "LIBFABRIC_PROVIDER",
        Word("cxi", "efa", "verbs"),
        "With remote_transport libfabric: the provider; efa on AWS.",
    )
    queue_depth: int = variable(
        4096,
        "QP_DEPTH",
        Whole(MIN_QUEUE_DEPTH, _MAX_QUEUE_DEPTH),
        "Places of a queue pair. All messages to one peer have to fit half of it.",
        unit="places",
    )
    queue_pairs: int = variable(
        2, "IBGDA_NUM_RC_PER_PE", Whole(1, 64), "IBGDA: RC queue pairs to each peer and card."
    )
    queue_pairs_by: str = variable(
        "cta",
        "IBGDA_RC_MAP_BY",
        Word("cta", "sm", "warp"),
        "IBGDA: who shares a queue pair: the warps of a block, of an SM, or nobody.",
    )
    proxy_queue_pairs: int = variable(
        1,
        "IB_NUM_RC_PER_DEVICE",
        Whole(1, 64),
        "Proxy with ibrc: RC queue pairs to each peer and card.",
    )
    nics: tuple[str, ...] | None = variable(
        None,
        "HCA_LIST",
        Cards(r"\^?[\w.-]+(:\d+)?", "mlx5_0:1,mlx5_1:1"),
        "Cards and ports that may be used; ^ in front of the first: all but these. Switches "
        "map_nics on.",
    )
    nic_mapping: tuple[str, ...] | None = variable(
        None,
        "HCA_PE_MAPPING",
        Cards(r"[\w.-]+:\d+:\d+", "mlx5_0:1:2,mlx5_1:1:2"),
        "Cards, ports and how many consecutive GPUs use each. Switches map_nics on; not together "
        "with nics.",
    )
    map_nics: bool | None = variable(
        None,
        "ENABLE_NIC_PE_MAPPING",
        Switch(),
        "On: cards go to GPUs by the two lists above, or in turn. Off: each GPU takes the nearest.",
        theirs="off, and the lists have no effect",
    )
    nic_prefix: str = variable(
        "mlx5", "HCA_PREFIX", Name("a family of cards"), "How the names of usable cards begin."
    )
    relaxed_ordering: bool = variable(
        True,
        "IB_ENABLE_RELAXED_ORDERING",
        Switch(),
        "The card may write a message's bytes in any order. Off, where data is wrong.",
    )
    dmabuf: bool = variable(
        True,
        "IB_DISABLE_DMABUF",
        Switch(inverted=True),
        "GPU memory reaches the card by dma-buf where kernel and driver have it; else by "
        "nvidia_peermem.",
    )
    gdrcopy: bool = variable(
        True, "DISABLE_GDRCOPY", Switch(inverted=True), "Use GDRCopy where it is installed."
    )
    nic_buffers: str = variable(
        "gpumem",
        "IBGDA_FORCE_NIC_BUF_MEMTYPE",
        Word("gpumem", "hostmem"),
        "IBGDA: where queues stand. In hostmem IBGDA needs less of driver and platform.",
    )
    nic_handler: str = variable(
        "auto",
        "IBGDA_NIC_HANDLER",
        Word("auto", "gpu", "cpu", "cpu_host_memory"),
        "IBGDA: who rings the card's doorbell. gpu needs the driver's PeerMappingOverride, cpu "
        "needs GDRCopy.",
    )
    symmetric_size: int = variable(
        1024 * MIB,
        "SYMMETRIC_SIZE",
        Size(),
        "Room for all buffers together, where CUDA's virtual memory is off; else memory is taken "
        "as it is needed.",
        unit="bytes",
    )
    granularity: int = variable(
        64 * MIB,
        "CUMEM_GRANULARITY",
        PowerSize(2 * MIB),
        "Memory is taken in multiples of it.",
        unit="bytes",
        theirs="512 MiB",
    )
    virtual_memory: bool = variable(
        True,
        "DISABLE_CUDA_VMM",
        Switch(inverted=True),
        "CUDA's virtual memory for the buffers. Off: symmetric_size is taken at once.",
    )
    nvls: bool = variable(
        False,
        "DISABLE_NVLS",
        Switch(inverted=True),
        "Multicast over NVLink, which we do not use and which takes memory.",
        theirs="on",
    )
    multi_node_nvlink: bool = variable(
        True,
        "DISABLE_MNNVL",
        Switch(inverted=True),
        "NVLink between hosts, where there is one, serves as the network.",
    )
    bootstrap_interface: str | None = variable(
        None,
        "BOOTSTRAP_UID_SOCK_IFNAME",
        Name("a network interface, as ip link has it"),
        "Interface over which hosts find each other at the start.",
    )

    def __post_init__(self) -> None:
        for each in VARIABLES:
            value = getattr(self, each.field)
            if not each.kind.allows(value) and not (value is None and each.default is None):
                _refuse(each, value)
        if self.nics and self.nic_mapping:
            raise EPArgumentError(
                "NVSHMEM_HCA_LIST and NVSHMEM_HCA_PE_MAPPING are both set, and NVSHMEM would "
                "ignore the second: keep one of them"
            )
        if self.map_nics is False and (self.nics or self.nic_mapping):
            name = "HCA_LIST" if self.nics else "HCA_PE_MAPPING"
            raise EPArgumentError(
                f"NVSHMEM_{name} has no effect with NVSHMEM_ENABLE_NIC_PE_MAPPING=0: set that to "
                "1, or unset it"
            )
        if self.ibgda and self.remote_transport == "libfabric":
            raise EPArgumentError(
                "NVSHMEM_IB_ENABLE_IBGDA=1 works with mlx5 cards, and NVSHMEM_REMOTE_TRANSPORT="
                "libfabric is for others: unset one of them"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> NetworkSettings:
        """Return what NVSHMEM's variables ask for, and our defaults of the rest.

        Args:
            environment: Where to look; None is this process's.

        Raises:
            EPArgumentError: A variable has a value that is not allowed. Names it, and what is.
        """
        environment = os.environ if environment is None else environment
        given: dict[str, Any] = {}
        for each in VARIABLES:
            text = environment.get(each.full_name, "").strip()
            if not text:
                continue
            try:
                given[each.field] = each.kind.parse(text)
            except ValueError:
                _refuse(each, text)
        return cls(**given)

    def environment(self) -> dict[str, str]:
        """Return the variables that have to be set before NVSHMEM is initialised."""
        values = {each: getattr(self, each.field) for each in VARIABLES}
        values[_MAP_NICS] = self.maps_nics
        given = {e.full_name: e.kind.text(v) for e, v in values.items() if v is not None}
        return given | _FIXED

    def apply(self, environment: MutableMapping[str, str] | None = None) -> None:
        """Set the variables, and unset those that are left to NVSHMEM.

        Args:
            environment: None is this process's.
        """
        environment = os.environ if environment is None else environment
        for each in VARIABLES:
            environment.pop(each.full_name, None)
        environment.update(self.environment())

    @property
    def maps_nics(self) -> bool:
        """Whether cards go to GPUs by list, or in turn."""
        if self.map_nics is None:
            return bool(self.nics or self.nic_mapping)
        return self.map_nics

    @property
    def path(self) -> str:
        """What carries messages: such as "ibrc, by the proxy" or "IBGDA"."""
        if self.ibgda:
            return "IBGDA"
        provider = f" ({self.libfabric_provider})" if self.remote_transport == "libfabric" else ""
        return f"{self.remote_transport}{provider}, by the proxy"

    def describe(self) -> str:
        """Return one line: the path, what isolates traffic, and all that is not our default."""
        always = ("service_level", "traffic_class")
        hidden = ("ibgda", "remote_transport", "libfabric_provider")  # in the path
        words = [self.path]
        for each in VARIABLES:
            value = getattr(self, each.field)
            if each.field in hidden or (each.field not in always and value == each.default):
                continue
            words.append(f"{each.field.replace('_', ' ')} {each.kind.show(value)}")
        return ", ".join(words)


def _refuse(each: Variable, value: object) -> NoReturn:
    why = ""
    if each.field == "queue_depth":
        why = (
            f": half of it has to hold {MESSAGES_TO_A_PEER} messages to a peer, of "
            f"{PLACES_OF_A_MESSAGE} places each"
        )
    raise EPArgumentError(
        f"{each.full_name} (NetworkSettings.{each.field}) must be {each.kind.allowed}, got "
        f"{value!r}{why}"
    )


VARIABLES = variables_of(NetworkSettings)
_MAP_NICS = next(each for each in VARIABLES if each.field == "map_nics")
