"""The limit: what the links between the GPUs carry, by plain bulk pushes of whole rows."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ep_comm import _native
from ep_comm._native import header
from ep_comm.bench.timing import Stopwatch
from ep_comm.job.exits import UserError

REQUIRED_GB_PER_S = 320.0
_SMS = (16, 32)
_NUM_ROWS = 4096  # 59 MB to each peer, beyond what any L2 keeps
_LAUNCHES = 10
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What the links carried in this run.

    Attributes:
        gb_per_s_by_sms: 10^9 bytes a second that left each GPU, of the slowest one, by SMs used.
    """

    gb_per_s_by_sms: dict[int, float]

    @property
    def gb_per_s(self) -> float:
        """The highest of all SM counts."""
        return max(self.gb_per_s_by_sms.values())

    @property
    def is_void(self) -> bool:
        """Whether something held the links up, so that no figure of the run counts."""
        return self.gb_per_s < REQUIRED_GB_PER_S

    def describe(self) -> str:
        """Return it for a headline; of a void run, that it is void and why."""
        if not self.is_void:
            return f"limit {self.gb_per_s:.0f} GB/s"
        return (
            f"VOID: the links carried {self.gb_per_s:.1f} GB/s, below the "
            f"{REQUIRED_GB_PER_S:.0f} that a run needs"
        )

    def document(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "gb_per_s": self.gb_per_s,
            "required_gb_per_s": REQUIRED_GB_PER_S,
            "gb_per_s_by_sms": self.gb_per_s_by_sms,
        }

    def floor_us(self, wire_bytes: float) -> float:
        """Return the least time in which that many bytes leave a GPU, in µs."""
        return wire_bytes / self.gb_per_s / 1e3


def measure_limit(watch: Stopwatch) -> Limit:
    """Push rows from every GPU to every other one. Collective over the default group.

    Raises:
        UserError: The CUDA library is not there.
    """
    native = usable_library(watch.device)
    num_ranks, row_bytes = dist.get_world_size(), header.EP_PROBE_ROW_BYTES
    wire_bytes = (num_ranks - 1) * _NUM_ROWS * row_bytes
    source = torch.zeros(_NUM_ROWS * row_bytes, dtype=torch.uint8, device=watch.device)
    keep, peers = symmetric_memory(wire_bytes, watch.device)
    args = header.ProbeArgs(
        peers=peers,
        source=source.data_ptr(),
        num_rows=_NUM_ROWS,
    )
    stream = torch.cuda.current_stream(watch.device).cuda_stream

    def push(_: int) -> None:
        native.launch("ep_probe", args, stream)

    rates = {}
    for num_sms in _SMS:
        args.num_blocks = num_sms
        watch.back_to_back(push, 2)  # warm
        times_us = [watch.back_to_back(push, _LAUNCHES) for _ in range(_REPEATS)]
        rates[num_sms] = wire_bytes / min(watch.slowest(times_us)) / 1e3
    dist.barrier()  # nobody frees what another one still writes to
    del keep
    return Limit(gb_per_s_by_sms=rates)


def usable_library(device: torch.device) -> _native.NativeLibrary:
    """Return the CUDA library with its kernels loaded.

    Raises:
        UserError: It is not there, or has no code for this GPU.
    """
    native = _native.load_for(device)
    if native is None:
        reason = _native.unusable_reason(device.index)
        raise UserError(f"the CUDA library cannot be used: {reason}")
    native.load_kernels()
    return native


def symmetric_memory(num_bytes: int, device: torch.device) -> tuple[object, header.Peers]:
    """Make memory, all zero, that every rank of the default group can write to. Collective.

    Returns:
        What has to live as long as anybody may write; and where the ranks' memory is mapped here,
        for kernels that need nothing else of their peers.
    """
    # Imported here: it is not in every build of torch.
    import torch.distributed._symmetric_memory as torch_symmetric_memory

    memory = torch_symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    memory.zero_()
    world = dist.group.WORLD
    assert world is not None  # the job was joined
    mapped = torch_symmetric_memory.rendezvous(memory, world)
    peers = header.Peers(
        memory=(ctypes.c_void_p * header.EP_MAX_PEERS)(*mapped.buffer_ptrs),
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
    )
    torch.cuda.synchronize(device)
    dist.barrier()  # it is zero everywhere before anybody writes
    return (memory, mapped), peers
