"""Ranks of the NVLink backend that are threads of one process and share one GPU.

Each has its own streams and its own part of the SMs; their "symmetric memory" is the GPU's own. So
one GPU tests the kernels of up to eight ranks, and sees what a sanitizer can only see there::

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

import torch
from ranks import run_ranks

from ep_comm import Buffer, EPConfig


class VirtualBuffer(Buffer):
    """A buffer of a rank without a process group."""

    def __init__(self, backend: Any, config: EPConfig) -> None:
        self.group = None
        self.config = config
        self.rank, self.num_ranks = backend.rank, backend.num_ranks
        self.num_local_experts = backend.num_local_experts
        self.passed_over = {}
        self._unusable = None
        self._backend = backend


def run_virtual_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    config: EPConfig,
    *args: Any,
    delay_us: int = 0,
    timeout_s: float = 120.0,
) -> list[Any]:
    """Run ``function(rank, buffer, *args)`` on `num_ranks` ranks of GPU 0; results in rank order.

    With `delay_us` every wait and every signal is late by up to that.
    """
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        (results,) = run_ranks(
            1, _all_ranks, num_ranks, function, config, args, delay_us, pool="virtual",
            timeout_s=timeout_s,
        )  # fmt: skip
    return results


# For the driver, which reads it when the process starts to use CUDA.
_ENVIRONMENT = {
    # A rank's kernel must not queue up behind another rank's that waits for it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # Loading a kernel waits for those that run, and they may wait for the one who loads.
    "CUDA_MODULE_LOADING": "EAGER",
}
_RESERVE = [2**19] * 32 + [2**26]
_own_streams: list[torch.cuda.Stream] = []


def _streams(count: int) -> list[torch.cuda.Stream]:
    """Streams without torch's pool: that one has more than a GPU has queues for, and in a queue
    everything waits behind a kernel that waits for another rank."""
    while len(_own_streams) < count:
        address = ctypes.c_void_p()
        torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(address))
        _own_streams.append(torch.cuda.ExternalStream(address.value))
    return _own_streams[:count]


def _all_ranks(
    _: int,
    num_ranks: int,
    function: Callable[..., Any],
    config: EPConfig,
    args: tuple,
    delay_us: int,
) -> list[Any]:
    torch.zeros(1, device="cuda")
    from ep_comm.backends.nvlink import NVLinkBackend
    from ep_comm.backends.nvlink_memory import NodeMemory, Offsets

    streams = _streams(3 * num_ranks)
    barrier = threading.Barrier(num_ranks)
    num_bytes = Offsets(config, num_ranks).total
    memory = [torch.zeros(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(num_ranks)]
    addresses = [tensor.data_ptr() for tensor in memory]
    # A dispatch and a combine of every rank find room at once.
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count // (2 * num_ranks)

    class VirtualBackend(NVLinkBackend):
        @staticmethod
        def _new_stream(priority: int) -> torch.cuda.Stream:
            return streams.pop()

    def run(rank: int) -> Any:
        try:
            with torch.cuda.stream(streams.pop()):
                node = NodeMemory(
                    rank, memory[rank], addresses, config.timeout_s, memory, barrier.wait
                )
                # From here on nothing may be allocated anew: that too waits for kernels that run.
                reserve = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in _RESERVE]
                del reserve
                backend = VirtualBackend(node, config)
                backend.inject_delays(1000 * delay_us)
                buffer = VirtualBuffer(backend, config)
                buffer.set_num_sms(num_sms)
                barrier.wait()
                result = function(rank, buffer, *args)
                torch.cuda.current_stream().synchronize()
                buffer.destroy()
                return result
        except BaseException:
            barrier.abort()
            raise

    torch.cuda.synchronize()
    with ThreadPoolExecutor(num_ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(num_ranks)]
        errors = [future.exception() for future in futures]
    for error in sorted(filter(None, errors), key=lambda e: isinstance(e, BrokenBarrierError)):
        raise error  # the cause first
    return [future.result() for future in futures]
