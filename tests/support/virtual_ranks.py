"""Ranks of the NVLink backend that are threads of one process and share a GPU, or a few.

Each has its own streams and its own part of the SMs; their "symmetric memory" is that of the GPUs.
So one GPU tests the kernels of up to eight ranks, and sees what a sanitizer can only see there; two
have NVLink between four ranks and four::

    outputs = run_virtual_ranks(3, my_function, config, argument)

calls ``my_function(rank, buffer, argument)`` in three threads.
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
import torch
import torch.distributed as dist
from ranks import run_ranks

from ep_comm import (
    Buffer,
    CombineOutput,
    DispatchOutput,
    EPConfig,
    LowLatencyCombineOutput,
    LowLatencyDispatchOutput,
    _native,
)
from ep_comm.job.roster import Roster
from ep_comm.session import Session
from ep_comm.telemetry.records import Records


class VirtualBuffer(Buffer):
    """A buffer of a rank without a process group; `meet` is called before operations and waits.

    Where ranks are masked, they agree in `store`.
    """

    def __init__(
        self,
        backend: Any,
        config: EPConfig,
        meet: Callable[[], object] = lambda: None,
        store: dist.Store | None = None,
    ) -> None:
        self.group = None
        self.config = config
        self.rank, self.num_ranks = backend.rank, backend.num_ranks
        self.num_local_experts = backend.num_local_experts
        self.passed_over = {}
        self._session = Session(backend, config)
        self._roster = Roster(
            store or dist.HashStore(), "virtual", self.rank, self.num_ranks, config.timeout_s
        )
        self._meet = meet

    def dispatch(self, *args: Any, **kwargs: Any) -> DispatchOutput:
        self._meet()
        return super().dispatch(*args, **kwargs)

    def combine(self, *args: Any, **kwargs: Any) -> CombineOutput:
        self._meet()
        return super().combine(*args, **kwargs)

    def low_latency_dispatch(self, *args: Any, **kwargs: Any) -> LowLatencyDispatchOutput:
        self._meet()
        return super().low_latency_dispatch(*args, **kwargs)

    def low_latency_combine(self, *args: Any, **kwargs: Any) -> LowLatencyCombineOutput:
        self._meet()
        return super().low_latency_combine(*args, **kwargs)

    def synchronize(self) -> None:
        self._meet()
        super().synchronize()

    @property
    def records(self) -> Records:
        self._meet()  # reading them waits
        return super().records


def run_virtual_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    config: EPConfig,
    *args: Any,
    num_gpus: int = 1,
    delay_us: int = 0,
    in_step: bool = False,
    timeout_s: float = 120.0,
) -> list[Any]:
    """Run ``function(rank, buffer, *args)`` on `num_ranks` ranks; results in rank order.

    Rank r has GPU r modulo `num_gpus`. With `delay_us` every wait and every signal is late by up to
    that. With `in_step` ranks meet before every operation and before the host waits: under a
    sanitizer a thread that waits for its stream holds up the launches of the others, and what it
    waits for may need them.
    """
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        (results,) = run_ranks(
            1, _all_ranks, num_ranks, num_gpus, function, config, args, delay_us, in_step,
            pool="virtual", timeout_s=timeout_s,
        )  # fmt: skip
    return results


def sms_of_a_rank(num_ranks: int, num_gpus: int) -> int:
    """So few that a dispatch and a combine of every rank find room at once."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return sms // (2 * -(-num_ranks // num_gpus))


# For the driver, which reads it when the process starts to use CUDA.
_ENVIRONMENT = {
    # A rank's kernel must not queue up behind another rank's that waits for it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # Loading a kernel waits for those that run, and they may wait for the one who loads.
    "CUDA_MODULE_LOADING": "EAGER",
}
_RESERVE = [2**19] * 32 + [2**26]
_own_streams: dict[int, list[torch.cuda.Stream]] = {}


def _streams(gpu: int, count: int) -> list[torch.cuda.Stream]:
    """Streams without torch's pool: that one has more than a GPU has queues for, and in a queue
    everything waits behind a kernel that waits for another rank."""
    own = _own_streams.setdefault(gpu, [])
    with torch.cuda.device(gpu):
        while len(own) < count:
            address = ctypes.c_void_p()
            torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(address))
            own.append(torch.cuda.ExternalStream(address.value))
    return own[:count]


def _connect(num_gpus: int) -> None:
    """Each GPU may write to the others' memory from now on: torch sees to it for its own copies.

    And it has room for stacks: CUDA makes it for the first kernel that needs one, an index here,
    and that kernel waits for all that run.
    """
    for gpu in range(num_gpus):
        torch.ones(2, device=f"cuda:{gpu}")[torch.zeros(1, dtype=torch.int64, device=f"cuda:{gpu}")]
        for peer in range(num_gpus):
            torch.ones(1, device=f"cuda:{gpu}").to(f"cuda:{peer}")
    for gpu in range(num_gpus):
        torch.cuda.synchronize(gpu)


def _all_ranks(
    _: int,
    num_ranks: int,
    num_gpus: int,
    function: Callable[..., Any],
    config: EPConfig,
    args: tuple,
    delay_us: int,
    in_step: bool,
) -> list[Any]:
    _connect(num_gpus)
    from ep_comm.backends.nvlink.backend import NVLinkBackend
    from ep_comm.backends.nvlink.farewell import Farewell
    from ep_comm.backends.nvlink.memory import PeerMemory, buffer_offsets, clear, farewell_flags

    ranks_per_gpu = -(-num_ranks // num_gpus)
    per_rank = 5 if config.wire == "copy-engine" else 3
    streams = [_streams(gpu, per_rank * ranks_per_gpu) for gpu in range(num_gpus)]
    barrier, store = threading.Barrier(num_ranks), dist.HashStore()
    meet = barrier.wait if in_step else lambda: None
    offsets = buffer_offsets(_native.load(), config, num_ranks)
    memory = [
        torch.empty(offsets.total, dtype=torch.uint8, device=f"cuda:{rank % num_gpus}")
        for rank in range(num_ranks)
    ]
    for tensor in memory:
        clear(tensor, offsets)
    addresses = [tensor.data_ptr() for tensor in memory]
    flags_of = [farewell_flags(tensor, offsets, num_ranks) for tensor in memory]

    class VirtualBackend(NVLinkBackend):
        @staticmethod
        def _new_stream(priority: int) -> torch.cuda.Stream:
            return streams[torch.cuda.current_device()].pop()

    def run(rank: int) -> Any:
        gpu = rank % num_gpus
        torch.cuda.set_device(gpu)
        try:
            with torch.cuda.stream(streams[gpu].pop()):
                farewell = Farewell(rank, flags_of)
                own = PeerMemory(rank, memory[rank], addresses, config.timeout_s, memory, farewell)
                # From here on nothing may be allocated anew: that too waits for kernels that run.
                reserve = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in _RESERVE]
                del reserve
                backend = VirtualBackend(own, config)
                backend.inject_delays(1000 * delay_us)
                buffer = VirtualBuffer(backend, config, meet, store)
                buffer.set_num_sms(sms_of_a_rank(num_ranks, num_gpus))
                barrier.wait()
                result = function(rank, buffer, *args)
                cases.wait_for_stream()
                buffer.destroy()
                return result
        except BaseException:
            barrier.abort()
            raise

    for gpu in range(num_gpus):
        torch.cuda.synchronize(gpu)
    with (
        mock.patch.object(cases, "before_host_waits", meet),
        ThreadPoolExecutor(num_ranks) as pool,
    ):
        futures = [pool.submit(run, rank) for rank in range(num_ranks)]
        errors = [future.exception() for future in futures]
    for error in sorted(filter(None, errors), key=lambda e: isinstance(e, BrokenBarrierError)):
        raise error  # the cause first
    return [future.result() for future in futures]
