"""Ranks of several hosts without GPUs and NVSHMEM, as emulated_nodes.py has those of one.

Their memory is made by `NodesMemory.of_hosts`, on `World`s whose NVSHMEM is a fake one: its heaps
are memory of the process, so that kernels store into it. What processes would say to each other at
meetings, threads do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from emulated_nodes import EmulatedLibrary, run_emulated_nodes
from fake_nvshmem import FakeNvshmem, FakePes, host_tensor_at
from torch import Tensor

from ep_comm import EPConfig
from ep_comm.backends.nodes import memory as memory_module
from ep_comm.backends.nodes.memory import NodesMemory, nodes_offsets
from ep_comm.backends.nvlink import mapping
from ep_comm.job.meeting import Meeting
from ep_comm.network import world as world_module
from ep_comm.network.world import World

_MEETING_S = 30


class _Group(NamedTuple):
    """What stands for a process group in the thread of a rank."""

    rank: int


class _Meetings:
    """`ep_comm.job.meeting.meet` between threads."""

    def __init__(self, num_ranks: int) -> None:
        self._all = threading.Barrier(num_ranks)
        self._answers: list[Any] = [None] * num_ranks

    def meet(self, group: _Group, what_for: str, answer: object, timeout_s: float) -> Meeting:
        self._answers[group.rank] = (what_for, answer)
        self._all.wait(_MEETING_S)
        said = list(self._answers)
        self._all.wait(_MEETING_S)
        assert {theirs for theirs, _ in said} == {what_for}
        return Meeting("meeting", 1, [answer for _, answer in said])


class _Mappings:
    """`mapping._mapped` between threads: the ranks of each name map each other's memory."""

    def __init__(self, num_nodes: int, ranks_per_node: int) -> None:
        self._of_name = {
            f"meeting/node{node}": (threading.Barrier(ranks_per_node), [None] * ranks_per_node)
            for node in range(num_nodes)
        }

    def mapped(self, tensor: Tensor, name: str, rank: int, num_ranks: int) -> Any:
        barrier, tensors = self._of_name[name]
        tensors[rank] = tensor
        assert len(tensors) == num_ranks
        barrier.wait(_MEETING_S)  # of this node alone
        return SimpleNamespace(
            buffer_ptrs=[each.data_ptr() for each in tensors],
            get_buffer=lambda other, *_: tensors[other],
            keep=tensors,
        )


class _StoresWorld(World):
    """Kernels reach the heaps of others by address: the network that they have is stores."""

    native: FakeNvshmem

    def addresses(self, memory: Tensor, pes: Sequence[int]) -> Sequence[int]:
        heaps = [heap.data_ptr() for heap in self.native.pes.heaps]
        offset = memory.data_ptr() - heaps[self.native.pe]
        return [heaps[pe] + offset for pe in pes]


def run_emulated_hosts(
    library: Path,
    num_nodes: int,
    ranks_per_node: int,
    function: Callable[..., Any],
    config: EPConfig,
    *args: Any,
    **how: Any,
) -> tuple[list[Any], FakePes]:
    """As `run_emulated_nodes`; returns what was asked of NVSHMEM besides."""
    num_ranks = num_nodes * ranks_per_node
    native = EmulatedLibrary(library)
    pes, meetings = FakePes(num_ranks), _Meetings(num_ranks)
    empty, store = torch.empty, dist.HashStore()
    offsets = nodes_offsets(native, config, num_nodes, ranks_per_node)

    def host_empty(*size: Any, device: Any = "cpu", **how: Any) -> Tensor:
        return empty(*size, **how).fill_(7)  # whoever needs zeros has to write them

    def make_memory(rank: int) -> NodesMemory:
        world = _StoresWorld(FakeNvshmem(pes, rank, native), tuple(range(num_ranks)), "3.4.5", None)
        return NodesMemory.of_hosts(
            _Group(rank), Meeting("meeting", 1, []), world, offsets, ranks_per_node,
            config.timeout_s, config.low_latency_tokens is not None,
        )  # fmt: skip

    with ExitStack() as stack:
        for patch in (
            mock.patch.object(mapping, "meet", meetings.meet),
            mock.patch.object(world_module, "meet", meetings.meet),
            mock.patch.object(mapping, "_mapped", _Mappings(num_nodes, ranks_per_node).mapped),
            mock.patch.object(world_module, "tensor_at", host_tensor_at),
            mock.patch.object(symmetric_memory, "empty", host_empty),
            mock.patch.object(torch, "empty", host_empty),
            mock.patch.object(dist, "get_rank", lambda group: group.rank),
            mock.patch.object(dist, "get_world_size", lambda group: num_ranks),
            mock.patch.object(memory_module, "default_store", lambda: store),
        ):
            stack.enter_context(patch)
        results = run_emulated_nodes(
            library, num_nodes, ranks_per_node, function, config, *args, carried=False,
            make_memory=make_memory, **how,
        )  # fmt: skip
    return results, pes
