"""Where the NVLink backend can work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ep_comm import _native
from ep_comm._native import header
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError
from ep_comm.topology import Spot, backend_by_device_type

_MAX_ROW_BYTES = 92_000
# Two rows as they arrive and one as it leaves fill an SM's shared memory.
_MAX_HIDDEN_FP8_TO_FP32 = 30_208


class Facts(NamedTuple):
    """A rank's own account of itself.

    Attributes:
        gpu: See `gpu_id`; "" where there is none.
        unreached: GPUs visible to it that it cannot write to.
        reason: Why it cannot take part, or None where it can.
    """

    gpu: str
    unreached: tuple[str, ...]
    reason: str | None


def facts_of(
    group: dist.ProcessGroup, config: EPConfig, reason_of: Callable[[int, EPConfig], str | None]
) -> Facts:
    """Find out what the other ranks of `group` need to know of this one.

    `reason_of` takes the group's size, and is asked where there is a GPU.
    """
    if backend_by_device_type(group).get("cuda") != "nccl":
        return Facts("", (), f"the group has no NCCL backend ({dist.get_backend(group)})")
    gpu = gpu_id(torch.cuda.current_device())
    return Facts(gpu, _unreached(), reason_of(dist.get_world_size(group), config))


def unavailable_reason(
    facts: Sequence[Facts], spots: Sequence[Spot], ranks_per_node: int
) -> str | None:
    """Say why the ranks of each node are no peers, or None where they are.

    Args:
        facts: Those of every rank, by group rank.
        spots: Where they are.
        ranks_per_node: Consecutive ranks that have to reach each other.

    Raises:
        EPArgumentError: Ranks have the same GPU.
    """
    gpus = [(spot.host, each.gpu) for spot, each in zip(spots, facts, strict=True)]
    for rank, gpu in enumerate(gpus):
        if facts[rank].gpu and gpus.index(gpu) != rank:
            raise EPArgumentError(
                f"ranks {gpus.index(gpu)} and {rank} have the same GPU: every process calls "
                "torch.cuda.set_device(its local rank) before it makes a Buffer"
            )
    for rank, each in enumerate(facts):
        if each.reason is not None:
            return each.reason if not each.gpu else f"rank {rank}: {each.reason}"
    for rank, each in enumerate(facts):
        first = rank - rank % ranks_per_node
        for other in range(first, first + ranks_per_node):
            if facts[other].gpu in each.unreached:
                return f"rank {rank}: its GPU has no peer access to that of rank {other}"
    return None


def gpu_id(gpu: int) -> str:
    """Return a GPU's name that is the same in every process, whatever number it has there."""
    return str(torch.cuda.get_device_properties(gpu).uuid)


def _unreached() -> tuple[str, ...]:
    """Return the GPUs visible to this process that its own cannot write to."""
    mine = torch.cuda.current_device()
    return tuple(
        gpu_id(other)
        for other in range(torch.cuda.device_count())
        if other != mine and not torch.cuda.can_device_access_peer(mine, other)
    )


def reason_here(num_ranks: int, config: EPConfig) -> str | None:
    """Return why this process cannot be one of `num_ranks` peers, or None where it can."""
    reason = _native.unusable_reason(torch.cuda.current_device())
    if reason is None and num_ranks > header.EP_MAX_PEERS:
        reason = f"{num_ranks} ranks, at most {header.EP_MAX_PEERS} of one host"
    if reason is None and config.wire == "copy-engine" and num_ranks > 1:
        native = _native.load()
        assert native is not None  # or it would not be usable
        reason = native.copies_reason()
    return reason or sizes_reason(num_ranks, config)


def sizes_reason(num_ranks: int, config: EPConfig) -> str | None:
    """Return why our kernels have no room for these sizes on `num_ranks` ranks, or None."""
    row_bytes = config.hidden * 2
    if row_bytes % 16:
        return f"rows of {row_bytes} bytes are not a multiple of 16"
    if config.hidden * config.dtype.itemsize > _MAX_ROW_BYTES:
        return f"rows of more than {_MAX_ROW_BYTES} bytes do not fit shared memory twice"
    if config.max_tokens_per_rank * num_ranks * config.num_topk >= 2**31:
        return "max_tokens_per_rank x ranks x num_topk is not below 2^31"
    num_local_experts = config.num_experts // num_ranks
    if num_local_experts > header.EP_MAX_LOCAL_EXPERTS:
        return f"{num_local_experts} experts a rank, at most {header.EP_MAX_LOCAL_EXPERTS}"
    low_latency_rows = num_ranks * (config.low_latency_tokens or 0)
    if num_local_experts * low_latency_rows > header.EP_LOW_LATENCY_MAX_PLACES:
        return (
            f"{num_local_experts} experts a rank x {low_latency_rows} low-latency tokens of all "
            f"ranks, at most {header.EP_LOW_LATENCY_MAX_PLACES}"
        )
    return None


def check_fp8_hidden(hidden: int, recv_dtype: torch.dtype = torch.bfloat16) -> None:
    """Refuse rows of `hidden` elements that cannot travel as FP8 and arrive as `recv_dtype`.

    Raises:
        EPArgumentError: Names the limit.
    """
    # Bulk copies move multiples of 16 bytes, so the FP32 scales of a row must be that.
    if hidden % 512:
        raise EPArgumentError(f"FP8 over NVLink needs hidden to be a multiple of 512, got {hidden}")
    if recv_dtype == torch.float32 and hidden > _MAX_HIDDEN_FP8_TO_FP32:
        raise EPArgumentError(
            f"FP8 over NVLink to FP32 needs hidden to be at most {_MAX_HIDDEN_FP8_TO_FP32}, got "
            f"{hidden}: receive it as FP8 or BF16"
        )
