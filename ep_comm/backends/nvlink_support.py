"""Where the NVLink backend can work."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist

from ep_comm import _native
from ep_comm._native import structs
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError, EPMismatchError

_MAX_ROW_BYTES = 92_000
# Two rows as they arrive and one as it leaves fill an SM's shared memory.
_MAX_HIDDEN_FP8_TO_FP32 = 30_208


def unavailable_reason(group: dist.ProcessGroup, config: EPConfig) -> str | None:
    """Why NVLink cannot serve `group`, or None where it can. Collective.

    Raises:
        EPMismatchError: Ranks have different configs.
    """
    if "cuda:nccl" not in dist.get_backend_config(group):
        return f"the group has no NCCL backend ({dist.get_backend_config(group)})"
    mine = (socket.gethostname(), reason_here(dist.get_world_size(group), config), config)
    answers: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, mine, group=group)
    for rank, (_, _, theirs) in enumerate(answers):
        if theirs != config:
            raise EPMismatchError(
                f"ranks disagree: rank {dist.get_rank(group)} has {config}; rank {rank} has "
                f"{theirs}"
            )
    hosts = {host for host, _, _ in answers}
    if len(hosts) > 1:
        return f"the group spans {len(hosts)} hosts"
    for rank, (_, reason, _) in enumerate(answers):
        if reason is not None:
            return f"rank {rank}: {reason}"
    return None


def reason_here(num_ranks: int, config: EPConfig) -> str | None:
    """Why this process cannot be one of `num_ranks` ranks of a node, or None where it can."""
    reason = _native.unusable_reason(torch.cuda.current_device())
    if reason is not None:
        return reason
    if num_ranks > structs.EP_MAX_NODE_RANKS:
        return f"{num_ranks} ranks, at most {structs.EP_MAX_NODE_RANKS} of one host"
    row_bytes = config.hidden * 2
    if row_bytes % 16:
        return f"rows of {row_bytes} bytes are not a multiple of 16"
    if config.hidden * config.dtype.itemsize > _MAX_ROW_BYTES:
        return f"rows of more than {_MAX_ROW_BYTES} bytes do not fit shared memory twice"
    if config.max_tokens_per_rank * num_ranks * config.num_topk >= 2**31:
        return "max_tokens_per_rank x ranks x num_topk is not below 2^31"
    if config.num_experts // num_ranks > 1024:
        return f"{config.num_experts // num_ranks} experts a rank, at most 1024"
    return None


def check_fp8_hidden(hidden: int, recv_dtype: torch.dtype = torch.bfloat16) -> None:
    """Raise `EPArgumentError` where this backend cannot send rows of `hidden` elements as FP8, or
    cannot make `recv_dtype` of them."""
    # Bulk copies move multiples of 16 bytes, so the FP32 scales of a row must be that.
    if hidden % 512:
        raise EPArgumentError(f"FP8 over NVLink needs hidden to be a multiple of 512, got {hidden}")
    if recv_dtype == torch.float32 and hidden > _MAX_HIDDEN_FP8_TO_FP32:
        raise EPArgumentError(
            f"FP8 over NVLink to FP32 needs hidden to be at most {_MAX_HIDDEN_FP8_TO_FP32}, got "
            f"{hidden}: receive it as FP8 or BF16"
        )
