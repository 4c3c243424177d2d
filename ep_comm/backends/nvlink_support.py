"""Where the NVLink backend can work."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ep_comm import _native
from ep_comm._native import structs
from ep_comm.config import EPConfig
from ep_comm.errors import EPArgumentError, EPMismatchError

_MAX_ROW_BYTES = 92_000
# Two rows as they arrive and one as it leaves fill an SM's shared memory.
_MAX_HIDDEN_FP8_TO_FP32 = 30_208


class _Member(NamedTuple):
    """What the ranks of a group tell each other. `reason` is `reason_here`'s."""

    config: EPConfig
    host: str
    gpu: str
    reason: str | None


def unavailable_reason(group: dist.ProcessGroup, config: EPConfig) -> str | None:
    """Why NVLink cannot serve `group`, or None where it can. Collective.

    Raises:
        EPMismatchError: Ranks have different configs.
        EPArgumentError: Ranks have the same GPU.
    """
    if "cuda:nccl" not in dist.get_backend_config(group):
        return f"the group has no NCCL backend ({dist.get_backend_config(group)})"
    mine = _Member(
        config=config,
        host=socket.gethostname(),
        gpu=gpu_id(torch.cuda.current_device()),
        reason=reason_here(dist.get_world_size(group), config),
    )
    members: list[_Member] = _gather(mine, group)
    for rank, member in enumerate(members):
        if member.config != config:
            raise EPMismatchError(
                f"ranks disagree: rank {dist.get_rank(group)} has {config}; rank {rank} has "
                f"{member.config}"
            )
    gpus = [member.gpu for member in members]
    for rank, gpu in enumerate(gpus):
        if gpus.index(gpu) != rank:
            raise EPArgumentError(
                f"ranks {gpus.index(gpu)} and {rank} have the same GPU: every process calls "
                "torch.cuda.set_device(its local rank) before it makes a Buffer"
            )
    hosts = {member.host for member in members}
    if len(hosts) > 1:
        return f"the group spans {len(hosts)} hosts"
    for rank, member in enumerate(members):
        if member.reason is not None:
            return f"rank {rank}: {member.reason}"
    for rank, unreached in enumerate(_gather(_first_unreached(gpus), group)):
        if unreached is not None:
            return f"rank {rank}: its GPU has no peer access to that of rank {unreached}"
    return None


def _gather(mine: object, group: dist.ProcessGroup) -> list:
    answers: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, mine, group=group)
    return answers


def gpu_id(gpu: int) -> str:
    """The same in every process, whatever number a GPU has there."""
    return str(torch.cuda.get_device_properties(gpu).uuid)


def _first_unreached(gpus: Sequence[str]) -> int | None:
    """The first rank whose GPU this process's cannot write to, as far as it is visible here."""
    mine = torch.cuda.current_device()
    visible = {gpu_id(i): i for i in range(torch.cuda.device_count())}
    for rank, gpu in enumerate(gpus):
        other = visible.get(gpu, mine)
        if other != mine and not torch.cuda.can_device_access_peer(mine, other):
            return rank
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
