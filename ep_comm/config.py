"""The sizes and settings of a `Buffer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ep_comm._native.header import EP_MAX_EXPERTS, EP_MAX_LOCAL_EXPERTS, EP_MAX_TOPK
from ep_comm.errors import EPArgumentError
from ep_comm.network.settings import NetworkSettings
from ep_comm.numeric import is_int, is_number

ROW_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
BackendName = Literal["auto", "nvlink", "nodes", "reference"]
Wire = Literal["sm", "copy-engine"]

# Copy engines push every row to every rank. Where an expert wants fewer of them than this share,
# experts being chosen evenly, kernels are the better wire: they push wanted rows alone.
_LEAST_WANTED = 2 / 3
_LOW_LATENCY_HIDDEN = 8  # elements of 16 bytes
_MAX_TIMEOUT_S = 1e8  # three years; of more the nanoseconds of ten do not fit into 64 bits


def check_positive(name: str, value: object) -> None:
    """Refuse what is no positive integer.

    Raises:
        EPArgumentError: Names what was passed.
    """
    if not is_int(value) or value < 1:
        raise EPArgumentError(f"{name} must be a positive integer, got {value!r}")


def check_timeout(timeout_s: object) -> None:
    """Refuse a bound of waits that is no positive number of seconds.

    Raises:
        EPArgumentError: Names what was passed.
    """
    if not is_number(timeout_s) or not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise EPArgumentError(
            f"timeout_s must be a positive number of seconds, at most {_MAX_TIMEOUT_S:g}, got "
            f"{timeout_s!r}"
        )


@dataclass(frozen=True, kw_only=True)
class EPConfig:
    """Sizes and settings of one `Buffer`; must be equal on every rank of the group.

    Attributes:
        num_experts: Experts over all ranks, at most 4096. Rank r owns experts
            ``[r * num_experts / ranks, (r + 1) * num_experts / ranks)``.
        hidden: Elements of one token row.
        max_tokens_per_rank: Most tokens that a rank passes to one dispatch.
        num_topk: Most experts that a token selects, at most 32.
        dtype: Widest type of the rows: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
            Of the first two a buffer takes either.
        ranks_per_node: Consecutive ranks whose partial sums combine adds and rounds before the
            sums of different nodes meet (docs/architecture.md, "Numerics"). None takes the ranks of
            a host where the group is on several, with as many on each; else the whole group is one
            node. Give it a number to have the same sums wherever the ranks are.
        backend: "auto" takes the fastest backend that the group can have: on one host "nvlink", on
            several "nodes" (on GPUs without NVSHMEM that is refused); else "reference". "nodes" on
            one host is for tests and figures: parts of it, of `ranks_per_node` each, with NVLink
            for a network.
        timeout_s: Bound of every wait, in seconds. (Between nodes, with more than 512 ranks, a
            low-latency operation may wait for two ranks one after the other, each so long.)
        low_latency_tokens: Most tokens that a rank passes to one low-latency dispatch. None: the
            buffer has no low-latency operations (`ep_comm.low_latency`).
        wire: What moves rows between the GPUs of one host. "sm": kernels, which send each row to
            the ranks that want it. "copy-engine": copy engines, which send all rows to all ranks
            and leave the SMs to other work. For few ranks that most tokens go to; needs the
            "nvlink" backend. Results are the same.
        network: Settings of the network between nodes. None takes those of the environment, which
            may differ from host to host (`NetworkSettings.from_environment`).

    Raises:
        EPArgumentError: A value is out of its range.
    """

    num_experts: int
    hidden: int
    max_tokens_per_rank: int
    num_topk: int
    dtype: torch.dtype = torch.bfloat16
    ranks_per_node: int | None = None
    backend: BackendName = "auto"
    timeout_s: float = 30.0
    low_latency_tokens: int | None = None
    wire: Wire = "sm"
    network: NetworkSettings | None = None

    def __post_init__(self) -> None:
        names = ["num_experts", "hidden", "max_tokens_per_rank", "num_topk"]
        optional = ("ranks_per_node", "low_latency_tokens")
        names += [name for name in optional if getattr(self, name) is not None]
        for name in names:
            check_positive(name, getattr(self, name))
        for name, maximum in (("num_experts", EP_MAX_EXPERTS), ("num_topk", EP_MAX_TOPK)):
            if getattr(self, name) > maximum:
                raise EPArgumentError(f"{name} is at most {maximum}, got {getattr(self, name)}")
        if self.num_topk > self.num_experts:
            raise EPArgumentError(
                f"num_topk {self.num_topk} is more than num_experts {self.num_experts}"
            )
        if self.dtype not in ROW_DTYPES:
            raise EPArgumentError(f"dtype must be bfloat16, float16 or float32, got {self.dtype!r}")
        if self.backend not in get_args(BackendName):
            raise EPArgumentError(
                f"backend must be one of {', '.join(get_args(BackendName))}, got {self.backend!r}"
            )
        if self.wire not in get_args(Wire):
            raise EPArgumentError(
                f"wire must be one of {', '.join(get_args(Wire))}, got {self.wire!r}"
            )
        if self.wire == "copy-engine" and self.backend not in ("auto", "nvlink"):
            raise EPArgumentError(
                f'wire="copy-engine" is one of the "nvlink" backend, not of {self.backend!r}'
            )
        check_timeout(self.timeout_s)
        if not isinstance(self.network, (NetworkSettings, type(None))):
            raise EPArgumentError(
                f"network must be NetworkSettings or None, got {type(self.network).__name__}"
            )
        if self.low_latency_tokens is not None and self.hidden % _LOW_LATENCY_HIDDEN:
            raise EPArgumentError(
                "low-latency operations need a hidden size that is a multiple of "
                f"{_LOW_LATENCY_HIDDEN}, got {self.hidden}"
            )

    def check_group(self, num_ranks: int) -> None:
        """Raise `EPArgumentError` where these sizes do not fit a group of `num_ranks`."""
        if self.num_experts % num_ranks:
            raise EPArgumentError(
                f"num_experts {self.num_experts} is not divisible by the group's {num_ranks} ranks"
            )
        if self.ranks_per_node is not None and num_ranks % self.ranks_per_node:
            raise EPArgumentError(
                f"the group's {num_ranks} ranks are not divisible by ranks_per_node "
                f"{self.ranks_per_node}"
            )
        wanted = 1 - (1 - 1 / num_ranks) ** self.num_topk
        if self.wire == "copy-engine" and wanted < _LEAST_WANTED:
            raise EPArgumentError(
                f"wire='copy-engine' sends every row to each of the {num_ranks} ranks: with "
                f"num_topk {self.num_topk} experts want {wanted:.0%} of them, and it takes "
                f"{_LEAST_WANTED:.0%}; take wire='sm', which sends these alone"
            )
        num_local_experts = self.num_experts // num_ranks
        if self.low_latency_tokens is not None and num_local_experts > EP_MAX_LOCAL_EXPERTS:
            raise EPArgumentError(
                f"low-latency operations serve at most {EP_MAX_LOCAL_EXPERTS} experts a rank, got "
                f"{num_local_experts}"
            )
