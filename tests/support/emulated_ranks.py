"""Ranks of one host without a GPU: the NVLink backend, its kernels and copies run on the CPU.

As emulated_nodes.py, without a network.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import torch
import torch.distributed as dist
from emulated_nodes import Emulated, _Stream, emulated_cuda
from virtual_ranks import VirtualBuffer

from ep_comm import EPConfig
from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.nvlink.farewell import Farewell
from ep_comm.backends.nvlink.memory import PeerMemory, buffer_offsets, clear, farewell_flags


def run_emulated_ranks(
    library: Path,
    num_ranks: int,
    function: Callable[..., Any],
    config: EPConfig,
    *args: Any,
    delay_us: int = 0,
    num_sms: int = 4,
    unwaited: bool = False,
    torn: bool = False,
) -> list[Any]:
    """As `run_virtual_ranks`, with the kernels of `library`.

    With `unwaited` the host does not wait for low-latency operations. With `torn` their words of 16
    bytes come in two halves: a control, in which nothing can be right.
    """
    with emulated_cuda(library) as native:
        native.unwaited = unwaited
        native.delay(delay_us)
        native.tear_words(torn)
        all_streams = [_Stream(native) for _ in range(5 * num_ranks)]
        streams = list(all_streams)
        offsets = buffer_offsets(native, config, num_ranks)
        memory = [torch.empty(offsets.total, dtype=torch.uint8) for _ in range(num_ranks)]
        for tensor in memory:
            clear(tensor, offsets)
        flags_of = [farewell_flags(tensor, offsets, num_ranks) for tensor in memory]
        addresses = [tensor.data_ptr() for tensor in memory]
        barrier, store = Barrier(num_ranks), dist.HashStore()

        class Backend(Emulated, NVLinkBackend):
            @staticmethod
            def _new_stream(priority: int) -> torch.cuda.Stream:
                return streams.pop()

        def run(rank: int) -> Any:
            try:
                with torch.cuda.stream(streams.pop()):
                    farewell = Farewell(rank, flags_of)
                    own = PeerMemory(
                        rank, memory[rank], addresses, config.timeout_s, memory, farewell
                    )
                    backend = Backend(own, config)
                    backend.inject_delays(1000 * delay_us)
                    buffer = VirtualBuffer(backend, config, store=store)
                    buffer.set_num_sms(num_sms)
                    barrier.wait()
                    try:
                        result = function(rank, buffer, *args)
                    finally:
                        for stream in all_streams:  # torch frees memory of the CPU at once
                            stream.synchronize()
                    barrier.wait()  # none writes to another any more
                    return result
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(num_ranks) as pool:
            futures = [pool.submit(run, rank) for rank in range(num_ranks)]
            errors = [future.exception() for future in futures]
    for error in sorted(filter(None, errors), key=lambda e: isinstance(e, BrokenBarrierError)):
        raise error  # the cause first
    return [future.result() for future in futures]
