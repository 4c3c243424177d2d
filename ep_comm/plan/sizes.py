"""A cluster, and what it has to move."""

from __future__ import annotations

from dataclasses import dataclass

from ep_comm import fp8
from ep_comm._native import header
from ep_comm.backends.nodes.tuning import MIN_SMS
from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.ops.settings import MIN_ITERS, Settings, Shape
from ep_comm.handle import RowLayout
from ep_comm.job.exits import UserError
from ep_comm.plan import facts

MAX_GPUS = 1024


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of GPUs; rates are of one GPU, one way, 10^9 bytes a second.

    Attributes:
        num_nodes: Nodes that the experts are spread over.
        gpus_per_node: GPUs of each.
        nvlink_gb_per_s: Nominal rate to all other GPUs of the node together.
        nic_gb_per_s: Nominal rate of its network card; infinite where nothing limits it.
        nvlink_share: What of the nominal rate is reached.
        nic_share: The same of the network.
        nvlink_latency_us: Of a flag over NVLink.
        nic_latency_us: Of a message and its flag over the network.
        num_sms: SMs of an operation.
        nvlink_is_network: The nodes are parts of one host, and rows between them go over NVLink
            too.
    """

    num_nodes: int = 1
    gpus_per_node: int = 8
    nvlink_gb_per_s: float = facts.NVLINK_GB_PER_S
    nic_gb_per_s: float = facts.NIC_GB_PER_S
    nvlink_share: float = facts.NVLINK_SHARE.value
    nic_share: float = facts.NIC_SHARE.value
    nvlink_latency_us: float = facts.NVLINK_LATENCY.value
    nic_latency_us: float = facts.NIC_LATENCY.value
    num_sms: int = facts.GPU_SMS
    nvlink_is_network: bool = False

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.num_nodes * self.gpus_per_node

    def describe(self) -> str:
        """Return nodes, GPUs and rates in a line."""
        nodes = f"{self.num_nodes} node{'s' * (self.num_nodes > 1)} of {self.gpus_per_node} GPUs"
        network = f", network {self.nic_gb_per_s:g}" if self.num_nodes > 1 else ""
        return f"{nodes}, NVLink {self.nvlink_gb_per_s:g}{network} GB/s"

    def check(self) -> None:
        """Raise `UserError` on the first value that makes no cluster."""
        if self.num_nodes < 1:
            raise UserError(f"--nodes {self.num_nodes} must be positive")
        if not 1 <= self.gpus_per_node <= header.EP_MAX_PEERS:
            raise UserError(
                f"--gpus-per-node {self.gpus_per_node} is not in 1 to {header.EP_MAX_PEERS}"
            )
        if not 2 <= self.num_gpus <= MAX_GPUS:
            raise UserError(
                f"--nodes {self.num_nodes} of --gpus-per-node {self.gpus_per_node} are "
                f"{self.num_gpus} GPUs: a plan is for 2 to {MAX_GPUS}"
            )
        for name in ("nvlink_gb_per_s", "nic_gb_per_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{_flag(name)} {getattr(self, name):g} must be positive")
        for name in ("nvlink_latency_us", "nic_latency_us"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{_flag(name)} {getattr(self, name):g} must be at least 0")
        if self.num_sms < MIN_SMS:
            raise UserError(f"--sms {self.num_sms} is too few: at least {MIN_SMS}")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a GPU sends in one operation.

    Attributes:
        shape: Sizes.
        routing: Which experts the tokens select; not "zipf". A replay is counted, see
            `ep_comm.plan.copies`.
        fp8: Dispatch FP8 rows with their scales; else BF16. Combine is BF16.
        layout: Order of the received rows, see `ep_comm.Buffer.dispatch`.
    """

    shape: Shape
    routing: RoutingSpec = RoutingSpec()
    fp8: bool = False
    layout: RowLayout = "expert"

    @property
    def dispatch_row_bytes(self) -> int:
        """A row with its scales on the way to an expert."""
        hidden = self.shape.hidden
        return hidden + hidden // fp8.BLOCK * 4 if self.fp8 else self.combine_row_bytes

    @property
    def combine_row_bytes(self) -> int:
        """A row on its way back."""
        return 2 * self.shape.hidden

    def describe(self) -> str:
        """Return it in a line."""
        tokens, hidden, experts, topk = self.shape
        return (
            f"{tokens} tokens x {hidden}, top-{topk} of {experts}, {self.routing.describe()}, "
            f"{'FP8' if self.fp8 else 'BF16'} dispatch, {self.layout}-major"
        )

    def check(self, cluster: Cluster) -> None:
        """Raise `UserError` on the first value that this cluster, or none, can have."""
        Settings(
            shape=self.shape,
            routing=self.routing,
            sms=(0,),
            fp8=self.fp8,
            layout=self.layout,
            iters=MIN_ITERS,
        ).check()
        if self.routing.kind == "zipf":
            raise UserError(
                "--routing zipf: a plan is for uniform and group-limited routing, and for a replay"
            )
        experts = self.shape.experts
        if experts > header.EP_MAX_EXPERTS:
            raise UserError(f"--experts {experts} is more than {header.EP_MAX_EXPERTS}")
        if experts % cluster.num_gpus:
            raise UserError(f"--experts {experts} is not divisible by the {cluster.num_gpus} GPUs")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
