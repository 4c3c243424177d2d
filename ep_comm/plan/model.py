"""The model: an operation takes as long as its busiest resource, and a little more.

With T tokens a GPU, rows of B bytes, L GPUs a node and N nodes, a token goes to `ranks` ranks and
`nodes` nodes. Then a GPU sends over the network, and over NVLink, its own rows or relayed ones, ::

    network   T B nodes (N - 1) / N
    NVLink    T B ranks (L - 1) / L

and receives as much. Of a captured routing the fullest rank and node receive more, and it is their
time. Each resource needs its bytes over its rate. The hop that is done sooner works beside the
other one, but for a chunk of rows::

    time = slowest resource + shorter hop / messages + latencies + what any operation takes
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ep_comm.backends.nodes.tuning import MIN_SMS
from ep_comm.plan import facts
from ep_comm.plan.copies import Copies, copies_of
from ep_comm.plan.kernels import Chunks, DispatchSms, chunks_of, dispatch_sms
from ep_comm.plan.memory import Memory, memory_of
from ep_comm.plan.sizes import Cluster, Workload

Resource = Literal["network", "NVLink", "gather SMs", "push SMs", "expand SMs", "SMs", "memory"]


class Traffic(NamedTuple):
    """Bytes that a GPU receives in one operation, and sends on average.

    Of a captured routing they are those of the fullest GPU.

    Attributes:
        nvlink: To GPUs of its node, relayed rows included.
        network: To other nodes.
        to_nodes: What DeepEP counts for the network: a row for each node, the own one too.
        to_experts: A row for each expert.
    """

    nvlink: float
    network: float
    to_nodes: float
    to_experts: float


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation, as the model has it.

    Attributes:
        name: "dispatch, fresh" has a new routing, "dispatch, cached" a known one.
        traffic: Its bytes.
        busy_us: How long each resource is busy.
        num_messages: Chunks of rows that a GPU sends over the network.
        fixed_us: What is added whatever is sent.
    """

    name: str
    traffic: Traffic
    busy_us: dict[Resource, float]
    num_messages: float
    fixed_us: float

    @property
    def limit(self) -> Resource:
        """The resource that is busy longest."""
        return max(self.busy_us, key=lambda name: self.busy_us[name])

    @property
    def exposed_us(self) -> float:
        """What of the shorter hop is not beside the longer one."""
        return min(self.busy_us["network"], self.busy_us["NVLink"]) / max(1.0, self.num_messages)

    @property
    def us(self) -> float:
        """The time of the public call."""
        return self.busy_us[self.limit] + self.exposed_us + self.fixed_us

    def gb_per_s(self, num_bytes: float) -> float:
        """Return 10^9 bytes a second of the public call."""
        return num_bytes / self.us / 1e3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A workload on a cluster.

    Attributes:
        cluster: The cluster.
        workload: What it has to move.
        copies: Ranks and nodes of a token.
        operations: A dispatch with a known and with a new routing, and a combine.
        sms: Of a dispatch with a known routing.
        chunks: Rows that share a flag.
        memory: Of a buffer.
    """

    cluster: Cluster
    workload: Workload
    copies: Copies
    operations: tuple[Operation, Operation, Operation]
    sms: DispatchSms
    chunks: Chunks
    memory: Memory

    def operation(self, name: str) -> Operation:
        """Return the one of that name."""
        return next(operation for operation in self.operations if operation.name == name)

    @property
    def output_bytes(self) -> float:
        """Rows that a GPU gets in a dispatch, on average, without padding."""
        return self.workload.dispatch_row_bytes * _rows_out(self.workload, self.copies)


def make_plan(cluster: Cluster, workload: Workload) -> Plan:
    """Return what the model has for sizes that were checked before."""
    _, _, experts, topk = workload.shape
    copies = copies_of(workload.routing, experts, topk, cluster.num_nodes, cluster.gpus_per_node)
    chunks = chunks_of(cluster, workload)
    return Plan(
        cluster=cluster,
        workload=workload,
        copies=copies,
        operations=(
            _dispatch(cluster, workload, copies, chunks, is_new=False),
            _dispatch(cluster, workload, copies, chunks, is_new=True),
            _combine(cluster, workload, copies, chunks),
        ),
        sms=dispatch_sms(cluster, workload, is_new=False),
        chunks=chunks,
        memory=memory_of(cluster, workload),
    )


def fewest_sms(plan: Plan, name: str) -> int | None:
    """Return the fewest SMs with which an operation is not limited by them; None: more than all.

    Args:
        plan: Its cluster says how many there are.
        name: Of one of its operations.
    """
    for num_sms in range(MIN_SMS, plan.cluster.num_sms + 1):
        fewer = dataclasses.replace(plan.cluster, num_sms=num_sms)
        if "SMs" not in make_plan(fewer, plan.workload).operation(name).limit:
            return num_sms
    return None


def _dispatch(
    cluster: Cluster, workload: Workload, copies: Copies, chunks: Chunks, is_new: bool
) -> Operation:
    row_bytes = workload.dispatch_row_bytes
    traffic = _traffic(cluster, workload, copies, row_bytes)
    sms = dispatch_sms(cluster, workload, is_new)
    read = copies.ranks * workload.shape.tokens * row_bytes
    out = _rows_out(workload, copies) * copies.fullest_rank * row_bytes
    store = facts.STORE_FP8_SM if workload.fp8 else facts.STORE_SM
    # Rows for the network are copied together, sent, received; pushed ones read and staged.
    memory = 4 * traffic.network + 2 * traffic.nvlink + read + out
    busy: dict[Resource, float] = {
        **_links(cluster, traffic),
        "gather SMs": _us(traffic.network, sms.gather * facts.STORE_SM.value),
        "push SMs": _us(traffic.nvlink, sms.push * facts.PUSH_SM.value),
        "expand SMs": _us(out, sms.expand * store.value) + is_new * facts.EXPAND_WAIT_US.value,
        "memory": _us(memory, facts.MEMORY.value),
    }
    fixed_us = facts.DISPATCH_US.value + is_new * facts.NEW_ROUTING_US.value + _latency(cluster)
    return Operation(
        name="dispatch, fresh" if is_new else "dispatch, cached",
        traffic=traffic,
        busy_us=busy,
        num_messages=_num_messages(traffic, row_bytes, chunks),
        fixed_us=fixed_us,
    )


def _combine(cluster: Cluster, workload: Workload, copies: Copies, chunks: Chunks) -> Operation:
    row_bytes = workload.combine_row_bytes
    traffic = _traffic(cluster, workload, copies, row_bytes)
    # A rank's rows of a token, ranks' sums of a node, and nodes' sums.
    rows = _rows_out(workload, copies) * copies.fullest_rank
    levels = [rows, workload.shape.tokens * copies.ranks]
    if cluster.num_nodes > 1:
        levels.append(workload.shape.tokens * copies.nodes)
    read = sum(levels) * row_bytes
    written = sum(levels[1:], workload.shape.tokens) * row_bytes
    busy: dict[Resource, float] = {
        **_links(cluster, traffic),
        "SMs": _us(read, cluster.num_sms * facts.READ_SM.value),
        "memory": _us(read + written, facts.MEMORY.value),
    }
    return Operation(
        name="combine",
        traffic=traffic,
        busy_us=busy,
        num_messages=_num_messages(traffic, row_bytes, chunks),
        fixed_us=facts.COMBINE_US.value + _latency(cluster),
    )


def _num_messages(traffic: Traffic, row_bytes: int, chunks: Chunks) -> float:
    return traffic.network / row_bytes / chunks.network if traffic.network else 0.0


def _traffic(cluster: Cluster, workload: Workload, copies: Copies, row_bytes: int) -> Traffic:
    """Each of a token's ranks is as likely the relaying one's as any other of its node."""
    tokens, _, _, topk = workload.shape
    nodes, local = cluster.num_nodes, cluster.gpus_per_node
    return Traffic(
        nvlink=tokens * row_bytes * copies.ranks * copies.fullest_rank * (local - 1) / local,
        network=tokens * row_bytes * copies.nodes * copies.fullest_node * (nodes - 1) / nodes,
        to_nodes=tokens * row_bytes * copies.nodes,
        to_experts=tokens * row_bytes * topk,
    )


def _links(cluster: Cluster, traffic: Traffic) -> dict[Resource, float]:
    over_nvlink = traffic.nvlink + traffic.network * cluster.nvlink_is_network
    return {
        "network": _us(traffic.network, cluster.nic_gb_per_s * cluster.nic_share),
        "NVLink": _us(over_nvlink, cluster.nvlink_gb_per_s * cluster.nvlink_share),
    }


def _latency(cluster: Cluster) -> float:
    over_network = cluster.nic_latency_us if cluster.num_nodes > 1 else 0.0
    return over_network + (cluster.nvlink_latency_us if cluster.gpus_per_node > 1 else 0.0)


def _rows_out(workload: Workload, copies: Copies) -> float:
    """Rows that experts get: one each, or one for all of a rank."""
    tokens, _, _, topk = workload.shape
    return tokens * (topk if workload.layout == "expert" else copies.ranks)


def _us(num_bytes: float, gb_per_s: float) -> float:
    return num_bytes / gb_per_s / 1e3 if num_bytes else 0.0
