"""What no operation can beat, measured in the same run: a word's way, and the rate of pushes."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

import torch
import torch.distributed as dist

from ep_comm._native import header
from ep_comm.bench.low_latency.inputs import InputSet
from ep_comm.bench.ops.probe import Limit, symmetric_memory, usable_library
from ep_comm.bench.timing import Stopwatch
from ep_comm.fp8 import BLOCK
from ep_comm.job.exits import UserError
from ep_comm.job.start import agree

_ROUND_TRIPS = 1000
_LAUNCHES = 5
_TIMEOUT_S = 10.0
_WORD_BYTES = 16
_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Floors:
    """What the links carried in this run.

    Attributes:
        limit: The rate of pushes.
        one_way_us: How long 16 bytes take from one GPU to another.
    """

    limit: Limit
    one_way_us: float

    def us(self, wire_bytes: float, hops: int = 1) -> float:
        """Return the least time of so many bytes over the busiest link, in µs.

        Args:
            wire_bytes: Out of, or into, one GPU.
            hops: Ways that have to be gone one after the other.
        """
        return hops * self.one_way_us + self.limit.floor_us(wire_bytes)


def measure_one_way(watch: Stopwatch) -> float:
    """Return the µs of 16 bytes from one GPU to another. Collective over the default group.

    Ranks 0 and 1, 2 and 3, ... send a word back and forth: half of a round trip. Of several
    launches the fastest counts, of several pairs the slowest. An odd last rank looks on.

    Raises:
        UserError: A partner did not answer, or the CUDA library is not there.
    """
    native = usable_library(watch.device)
    keep, peers = symmetric_memory(_WORD_BYTES, watch.device)
    rank, partner = dist.get_rank(), dist.get_rank() ^ 1
    fault_memory = torch.zeros(256, dtype=torch.uint8, pin_memory=True)
    fault = header.Fault.from_address(fault_memory.data_ptr())
    abort = torch.zeros(1, dtype=torch.int32, device=watch.device)
    elapsed_ns = torch.zeros(_LAUNCHES, dtype=torch.int64, device=watch.device)
    peers.fault, peers.abort = fault_memory.data_ptr(), abort.data_ptr()
    peers.timeout_ns = int(_TIMEOUT_S * 1e9)
    stream = torch.cuda.current_stream(watch.device).cuda_stream
    if partner < dist.get_world_size():
        for i, elapsed in enumerate(elapsed_ns):
            args = header.PingArgs(
                peers=peers,
                elapsed_ns=elapsed.data_ptr(),
                partner=partner,
                first=1 + i * (1 + _ROUND_TRIPS),
                num_round_trips=_ROUND_TRIPS,
            )
            native.launch("ep_ping", args, stream)
    torch.cuda.synchronize(watch.device)
    dist.barrier()  # nobody frees what another one still writes to
    del keep

    def check() -> None:
        if fault.code != header.EP_FAULT_NONE:
            raise UserError(
                f"rank {rank} waited {_TIMEOUT_S:g} s for 16 bytes from rank {partner}: ep-comm "
                "doctor says how their GPUs are connected"
            )

    agree(check)
    (fastest_ns,) = watch.slowest([float(elapsed_ns.min())])
    return fastest_ns / _ROUND_TRIPS / 2 / 1e3


@dataclass(frozen=True, kw_only=True)
class WireBytes:
    """Bytes over the busiest link, out of or into one GPU; means of the input sets.

    Attributes:
        dispatch: Rows, with their scales, once a token and rank.
        combine: Partial rows, the same.
    """

    dispatch: float
    combine: float

    @classmethod
    def of_inputs(cls, inputs: list[InputSet], hidden: int, fp8: bool) -> WireBytes:
        """Count the copies of these sets."""
        busiest = mean(
            int(torch.maximum(given.copies_to_rank.sum(0), given.copies_to_rank.sum(1)).max())
            for given in inputs
        )
        row_bytes = hidden + hidden // BLOCK * _SCALE_BYTES if fp8 else 2 * hidden
        return cls(dispatch=busiest * row_bytes, combine=busiest * 2 * hidden)
