"""Ranks of several nodes that are threads of one process and share a GPU.

As virtual_ranks.py, with a network between them::

    outputs = run_virtual_nodes(2, 3, my_function, config, argument)

calls ``my_function(rank, buffer, argument)`` in six threads, of two nodes of three ranks. The
network is stores, or ep_network_carry: one block that carries messages out late and in random
order. emulated_nodes.py does the same without a GPU.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import BrokenBarrierError
from typing import Any
from unittest import mock

import cases
import numpy as np
import torch
import virtual_ranks
from cases import Case, assert_same, to_numpy, to_torch
from oracle import local_experts
from ranks import run_ranks
from virtual_ranks import VirtualBuffer, sms_of_a_rank

from ep_comm import Buffer, EPConfig, _native
from ep_comm._native import header


def run_virtual_nodes(
    num_nodes: int,
    ranks_per_node: int,
    function: Callable[..., Any],
    config: EPConfig,
    *args: Any,
    carried: bool = True,
    network_us: int = 100,
    early_flags: bool = False,
    delay_us: int = 0,
    in_step: bool = False,
    num_sms: int | None = None,
    timeout_s: float = 120.0,
) -> list[Any]:
    """Run ``function(rank, buffer, *args)`` on all ranks; results in rank order.

    With `carried` messages are up to `network_us` late, else they are stores. With `early_flags` a
    message's flag comes before its data: a network that no result may be right on. `delay_us` and
    `in_step` are those of `run_virtual_ranks`.
    """
    with mock.patch.dict(os.environ, virtual_ranks._ENVIRONMENT):
        (results,) = run_ranks(
            1, _on_gpu, num_nodes, ranks_per_node, function, config, args, carried, network_us,
            early_flags, delay_us, in_step, num_sms, pool="virtual", timeout_s=timeout_s,
        )  # fmt: skip
    return results


def _on_gpu(_: int, *args: Any) -> list[Any]:
    from ep_comm.backends.nodes.backend import NodesBackend

    virtual_ranks._connect(1)
    streams = virtual_ranks._streams(0, 3 * header.EP_MAX_PEERS + 2)
    # What waits for the whole GPU would wait for the kernel that carries.
    with mock.patch.object(torch.cuda, "synchronize", _synchronize_stream):
        return all_ranks("cuda", NodesBackend, streams, *args)


class Carrier:
    """Carries messages out, from `start` to `stop`.

    Attributes:
        queue: Address of the messages; 0 where messages are stores.
    """

    def __init__(
        self, device: str, stream: torch.cuda.Stream, delay_us: int, early_flags: bool
    ) -> None:
        size = ctypes.sizeof(header.NetworkQueue)
        self._tensor = torch.zeros(size, dtype=torch.uint8, device=device)
        self._stream = stream
        self.queue = self._tensor.data_ptr()
        self._args = header.NetworkCarryArgs(queue=self.queue, delay_ns=1000 * delay_us, seed=1)
        if early_flags:
            self._set("early_flags")
        torch.cuda.synchronize()

    def _set(self, name: str) -> None:
        offset = getattr(header.NetworkQueue, name).offset
        self._tensor[offset : offset + 4].view(torch.int32).fill_(1)

    def start(self) -> None:
        """Launch the kernel that carries: from here on nothing may be allocated anew."""
        native = _native.load()
        assert native is not None
        native.launch("ep_network_carry", self._args, self._stream.cuda_stream)

    def stop(self) -> None:
        self._set("stop")
        self._stream.synchronize()


def all_ranks(
    device: str,
    base: type,
    streams: list[torch.cuda.Stream],
    num_nodes: int,
    ranks_per_node: int,
    function: Callable[..., Any],
    config: EPConfig,
    args: tuple,
    carried: bool,
    network_us: int,
    early_flags: bool,
    delay_us: int,
    in_step: bool,
    num_sms: int | None,
    make_memory: Callable[[int], Any] | None = None,
) -> list[Any]:
    """Run a function on all ranks, on backends of the kind `base`; see `run_virtual_nodes`.

    `make_memory` gives the `NodesMemory` of a rank, where it is to be another one.
    """
    from ep_comm.backends.nodes.memory import NodesMemory, nodes_offsets
    from ep_comm.backends.nodes.peers import Place
    from ep_comm.backends.nvlink.farewell import Farewell

    num_ranks = num_nodes * ranks_per_node
    carrier = Carrier(device, streams.pop(), network_us, early_flags) if carried else None
    start = threading.Barrier(num_ranks, carrier.start if carrier else None)
    barrier = threading.Barrier(num_ranks)
    meet = barrier.wait if in_step else lambda: None
    native = _native.load()
    assert native is not None
    offsets = nodes_offsets(native, config, num_nodes, ranks_per_node)

    def memory_of_all(size: int) -> list[torch.Tensor]:
        return [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(num_ranks)]

    memory, network = memory_of_all(offsets.total), memory_of_all(max(1, offsets.network_total))
    flags_of = [tensor[offsets.farewells :][: 4 * num_ranks].view(torch.int32) for tensor in memory]

    class VirtualBackend(base):
        @staticmethod
        def _new_stream(priority: int) -> torch.cuda.Stream:
            return streams.pop()

    def memory_of(rank: int) -> NodesMemory:
        place = Place(rank, ranks_per_node, num_nodes)
        return NodesMemory(
            place,
            memory[rank],
            [memory[other].data_ptr() for other in place.neighbours],
            network[rank],
            [tensor.data_ptr() for tensor in network],
            config.timeout_s,
            (memory, network),
            Farewell(rank, flags_of),
            carrier.queue if carrier else 0,
        )

    def run(rank: int) -> Any:
        torch.cuda.set_device(0)
        try:
            with torch.cuda.stream(streams.pop()):
                own = (make_memory or memory_of)(rank)
                # From here on nothing may be allocated anew: that waits for kernels that run.
                reserve = [
                    torch.empty(size, dtype=torch.uint8, device=device)
                    for size in virtual_ranks._RESERVE
                ]
                del reserve
                backend = VirtualBackend(own, config)
                backend.inject_delays(1000 * delay_us)
                buffer = VirtualBuffer(backend, config, meet)
                buffer.set_num_sms(num_sms or sms_of_a_rank(num_ranks, 1))
                start.wait()
                result = function(rank, buffer, *args)
                cases.wait_for_stream()
                buffer.destroy()
                return result
        except BaseException:
            start.abort()
            barrier.abort()
            raise

    torch.cuda.synchronize()
    with (
        torch.cuda.stream(streams.pop()),
        mock.patch.object(cases, "before_host_waits", meet),
        ThreadPoolExecutor(num_ranks) as pool,
    ):
        futures = [pool.submit(run, rank) for rank in range(num_ranks)]
        errors = [future.exception() for future in futures]
        if carrier:
            carrier.stop()
    for error in sorted(filter(None, errors), key=lambda e: isinstance(e, BrokenBarrierError)):
        raise error  # the cause first
    return [future.result() for future in futures]


def _synchronize_stream(device: Any = None) -> None:
    torch.cuda.current_stream().synchronize()


def check_wire_bytes(case: Case, topk_idx: list, rank: int, got: dict) -> None:
    """One copy of a token to each node over the network, and one to each rank inside."""
    size, per_rank = case.node_size, case.experts_per_rank
    node, local = divmod(rank, size)
    ranks = range(case.num_ranks)

    def rows(source: int, first: int, count: int) -> int:
        """Tokens of `source` with an expert on one of these ranks."""
        return sum(
            any(local_experts(topk, r, per_rank) for r in range(first, first + count))
            for topk in topk_idx[source]
        )

    for other in ranks:
        sent = returned = 0
        if other != rank and other // size == node:
            sources = [r for r in ranks if r % size == local]
            sent = sum(rows(source, other, 1) for source in sources)
            owners = [r for r in ranks if r % size == other % size]
            returned = sum(rows(owner, rank, 1) for owner in owners)
        elif other != rank and other % size == local:
            sent = rows(rank, other - local, size)
            returned = rows(other, rank - local, size)
        assert got["dispatch_wire_bytes"][other] == sent * case.row_bytes, (rank, other)
        assert got["combine_wire_bytes"][other] == returned * case.row_bytes, (rank, other)


def sums_of_few(rank: int, buffer: Buffer, case: Case, rounds: int) -> list[np.ndarray]:
    """Combines of which most have nothing for other nodes, and of those two in a row."""
    num_tokens, num_topk = case.tokens[rank], case.num_topk
    x = to_torch(case.rows(rank, num_tokens, salt=2), case.device)

    def dispatched(owner: int) -> tuple:
        experts = case.experts_per_rank * owner + torch.arange(num_topk, device=x.device)
        out = buffer.dispatch(x, experts.expand(num_tokens, num_topk).contiguous())
        return out.recv_x, out.handle

    stays, goes = dispatched(rank), dispatched((rank + case.node_size) % case.num_ranks)
    outs = []
    for _ in range(rounds):
        outs += [buffer.combine(*each).combined_x for each in (stays, stays, goes)]
    buffer.synchronize()
    return [to_numpy(out) for out in outs]


def check_sums_of_two(case: Case, results: list[list[np.ndarray]]) -> None:
    """A token's sum is its row as often as it has experts, two here: exact."""
    for rank, outs in enumerate(results):
        x = to_torch(case.rows(rank, case.tokens[rank], salt=2))
        want = to_numpy((x.float() + x.float()).bfloat16())
        for i, out in enumerate(outs):
            assert_same(out, want, f"operation {i} on rank {rank}")
