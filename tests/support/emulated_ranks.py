"""Ranks of one host without a GPU: the NVLink backend, its kernels and copies run on the CPU.

As emulated_nodes.py, without a network.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any
from unittest import mock

import torch
from emulated_nodes import Emulated, _Stream, emulated_cuda
from virtual_ranks import VirtualBuffer

from ep_comm import EPConfig
from ep_comm._native import header
from ep_comm.backends.nvlink import backend as nvlink
from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.nvlink.copy_engine import token_words
from ep_comm.backends.nvlink.farewell import Farewell
from ep_comm.backends.nvlink.memory import PeerMemory, clear, farewell_flags


class _EmulatedBackend(Emulated, NVLinkBackend):
    pass


def _offsets(config: EPConfig, num_ranks: int) -> header.BufferOffsets:
    """Return where what operations need stands: g++ takes no header of csrc's own layout."""
    tokens, row_bytes = config.max_tokens_per_rank, config.hidden * config.dtype.itemsize
    region_bytes = tokens * (row_bytes + 4 * config.num_topk + 256) // 128 * 128
    sizes = dict(
        farewells=4 * num_ranks,
        plan_flags=4 * num_ranks,
        dispatch_credits=4 * num_ranks,
        plan_headers=64 * num_ranks,
        dispatch_flags=8 * num_ranks * tokens,
        plan_idx=4 * num_ranks * tokens * config.num_topk,
        dispatch_slots=num_ranks * region_bytes,
        combine_credits=4 * num_ranks,
        combine_flags=4 * num_ranks * tokens,
        combine_weights=4 * num_ranks * tokens * config.num_topk,
        combine_rows=num_ranks * tokens * row_bytes,
        zeros=row_bytes,
        plan_token_bits=4 * token_words(tokens, num_ranks),
        copy_flags=2 * 2 * 4 * num_ranks * header.EP_COPY_FLAGS,
        copy_marks=2 * 4 * num_ranks,
    )
    offsets = header.BufferOffsets(max_chunks=tokens, region_bytes=region_bytes)
    end = 0
    for name, size in sizes.items():
        setattr(offsets, name, end)
        end += -(-size // 256) * 256
    offsets.low_latency_dispatch = offsets.total = end  # no slots of it, so nothing is all ones
    return offsets


def run_emulated_ranks(
    library: Path,
    num_ranks: int,
    function: Callable[..., Any],
    config: EPConfig,
    *args: Any,
    delay_us: int = 0,
    num_sms: int = 4,
) -> list[Any]:
    """As `run_virtual_ranks`, with the kernels of `library`."""
    with emulated_cuda(library) as native:
        native.delay_copies(delay_us)
        all_streams = [_Stream(native) for _ in range(5 * num_ranks)]
        streams = list(all_streams)
        offsets = _offsets(config, num_ranks)
        memory = [torch.empty(offsets.total, dtype=torch.uint8) for _ in range(num_ranks)]
        for tensor in memory:
            clear(tensor, offsets)
        flags_of = [farewell_flags(tensor, offsets, num_ranks) for tensor in memory]
        addresses = [tensor.data_ptr() for tensor in memory]
        barrier = Barrier(num_ranks)

        class Backend(_EmulatedBackend):
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
                    buffer = VirtualBuffer(backend, config)
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

        known = mock.patch.object(nvlink, "buffer_offsets", lambda *_: offsets)
        with known, ThreadPoolExecutor(num_ranks) as pool:
            futures = [pool.submit(run, rank) for rank in range(num_ranks)]
            errors = [future.exception() for future in futures]
    for error in sorted(filter(None, errors), key=lambda e: isinstance(e, BrokenBarrierError)):
        raise error  # the cause first
    return [future.result() for future in futures]
