"""Memory of the ranks of a node, mapped at all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm.errors import EPStateError
from ep_comm.job.meeting import Meeting, meet
from ep_comm.job.store import default_store


class MappedMemory(NamedTuple):
    """Memory of every rank of a node.

    Attributes:
        own: This rank's; its content is undefined.
        of_rank: That of each rank of the node, as mapped here.
        addresses: Where that is.
        keep: An object that has to live as long as the mapping.
    """

    own: Tensor
    of_rank: list[Tensor]
    addresses: list[int]
    keep: object


def map_memory(
    group: dist.ProcessGroup,
    meeting: Meeting,
    num_bytes: int,
    timeout_s: float,
    ranks_per_node: int | None = None,
) -> MappedMemory:
    """Allocate memory at each rank of a group, and map it at those of its node.

    Collective, and bounded. To map takes the ranks of a node alone; what was allocated, all know.

    Args:
        group: The ranks.
        meeting: Where they have met for this.
        num_bytes: Of each rank.
        timeout_s: Bound of a wait.
        ranks_per_node: Consecutive ranks that are a node; None is all.

    Raises:
        EPStateError: Names a rank that has no memory for it.
    """
    size = ranks_per_node or dist.get_world_size(group)
    node, local_rank = divmod(dist.get_rank(group), size)
    device = torch.device("cuda", torch.cuda.current_device())

    def allocate() -> Tensor:
        if size == 1:  # nobody maps it
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        import torch.distributed._symmetric_memory as symmetric_memory

        return symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)

    tensor = allocated_by_all(group, allocate, timeout_s)
    if size == 1:
        return MappedMemory(tensor, [tensor], [tensor.data_ptr()], None)
    rendezvous = _mapped(tensor, f"{meeting.name}/node{node}", local_rank, size)
    of_rank = [rendezvous.get_buffer(r, (num_bytes,), torch.uint8) for r in range(size)]
    return MappedMemory(tensor, of_rank, list(rendezvous.buffer_ptrs), rendezvous)


def allocated_by_all(
    group: dist.ProcessGroup, allocate: Callable[[], Tensor], timeout_s: float
) -> Tensor:
    """Allocate memory on every rank, or raise on every rank. Collective, and bounded.

    Mapping it is torch's affair, and not bounded by us: nobody begins before all can.

    Raises:
        EPStateError: Names a rank that has no memory for it.
    """
    tensor, problem = None, None
    try:
        tensor = allocate()
    except RuntimeError as error:  # out of memory is one
        problem = str(error)
    problems = meet(group, "map the memory of a Buffer", problem, timeout_s).answers
    for rank, text in enumerate(problems):
        if text is not None:
            raise EPStateError(f"rank {rank} cannot allocate the memory of a buffer: {text}")
    assert tensor is not None  # else this rank's own problem was among them
    return tensor


def _mapped(tensor: Tensor, name: str, rank: int, num_ranks: int) -> Any:
    """Map the memory of all ranks here, and return torch's handle of it. Collective.

    torch looks the ranks up by the name of a process group. The caller's may be a wrapper that it
    has never heard of, around a group that comes and goes, so it gets one that is no more than a
    name and a store.
    """
    from torch._C._distributed_c10d import (
        _register_process_group,
        _SymmetricMemory,
        _unregister_process_group,
    )

    store = dist.PrefixStore(name, default_store())
    group = dist.ProcessGroup(store, rank, num_ranks)  # torch itself does not keep it
    _register_process_group(name, group)  # type: ignore[arg-type]  # a newer torch's GroupName
    try:
        return _SymmetricMemory.rendezvous(tensor, name)
    finally:
        _unregister_process_group(name)  # type: ignore[arg-type]
