"""NVSHMEM's part of our library, without NVSHMEM: PEs of one process, heaps of host memory."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

from ep_comm.errors import EPStateError

HEAP_BYTES = 1 << 24


class FakePes:
    """What the PEs of one world share.

    Args:
        num_pes: How many; all of them take part in what is collective, or it fails.
    """

    def __init__(self, num_pes: int = 1) -> None:
        self.heaps = [torch.full((HEAP_BYTES,), 7, dtype=torch.uint8) for _ in range(num_pes)]
        self.all = threading.Barrier(num_pes)
        self.calls: list[tuple] = []


class FakeNvshmem:
    """One PE's library.

    Attributes:
        up: Its place in a world that something else has initialised, or None.
        fails: Text of an error by name of a call, for those that are to fail.
    """

    def __init__(self, pes: FakePes | None = None, pe: int = 0, native: Any = None) -> None:
        self.version = "3.4.5"
        self.up: tuple[int, int] | None = None
        self.fails: dict[str, str] = {}
        self.pes, self.pe, self._native = pes or FakePes(), pe, native
        self._taken = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)  # kernels

    def _call(self, name: str, *args: Any) -> None:
        self.pes.calls.append((name, self.pe, *args))
        if name in self.fails:
            raise EPStateError(f"libep_comm_nvshmem: {self.fails[name]}")

    @property
    def calls(self) -> list[str]:
        return [call[0] for call in self.pes.calls if call[1] == self.pe]

    def is_up(self) -> bool:
        return self.up is not None

    def world(self) -> tuple[int, int]:
        assert self.up is not None
        return self.up

    def new_id(self) -> bytes:
        self._call("new_id")
        return b"an id with \0 in it"

    def initialize(self, unique_id: bytes | None, rank: int, num_ranks: int) -> None:
        self._call("initialize", unique_id, rank, num_ranks)

    def allocate(self, num_bytes: int) -> int:
        self._call("allocate", num_bytes)
        self.pes.all.wait(20)
        start = self._taken
        self._taken += -(-num_bytes // 256) * 256
        if self._taken > HEAP_BYTES:
            raise EPStateError("libep_comm_nvshmem: nvshmem_align: out of memory")
        return self.pes.heaps[self.pe].data_ptr() + start

    def free(self, memory: int) -> None:
        self._call("free", memory)
        self.pes.all.wait(20)

    def raise_flag(self, flag: int, value: int, pe: int, stream: int) -> None:
        self._call("raise_flag", value, pe)
        offset = flag - self.pes.heaps[self.pe].data_ptr()
        address = self.pes.heaps[pe].data_ptr() + offset
        ctypes.c_int64.from_address(address).value = value


def host_tensor_at(address: int, num_bytes: int) -> torch.Tensor:
    """`ep_comm.network.world.tensor_at`, of host memory."""
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
