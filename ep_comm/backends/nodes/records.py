"""Records of operations between nodes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import torch

from ep_comm._native import header
from ep_comm.backends.nodes.peers import Place
from ep_comm.telemetry.device import DeviceRecorder


class NodesRecorder(DeviceRecorder):
    """See `DeviceRecorder`. Rows go to the ranks of the own node, relayed ones too, and the rail.

    Args:
        place: This rank's.
        device: The GPU.
        synchronize: Waits for all operations.
    """

    def __init__(self, place: Place, device: torch.device, synchronize: Callable[[], None]) -> None:
        needed = 8 * (header.EP_NODES_RECORD_WAITS + 2 * place.num_ranks)
        size = max(needed, ctypes.sizeof(header.Record))
        super().__init__(place.rank, place.num_ranks, device, synchronize, size)
        self._ranks = [place.rank_of(peer) for peer in range(place.num_ranks)]

    def _by_rank(self, raw: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        first, count = header.EP_NODES_RECORD_WAITS, self._num_ranks
        numbers = np.frombuffer(raw, np.int64)
        waits, rows = numbers[first : first + count], numbers[first + count : first + 2 * count]
        order = np.argsort(self._ranks)
        return tuple(rows[order].tolist()), tuple(waits[order].tolist())
