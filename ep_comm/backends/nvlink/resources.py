"""What the parts of a backend have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ep_comm._native import NativeLibrary, header
from ep_comm.backends.nvlink.memory import PeerMemory
from ep_comm.backends.nvlink.streams import Streams
from ep_comm.config import EPConfig
from ep_comm.telemetry.device import DeviceRecorder


class Resources(NamedTuple):
    """Passed to each part that launches kernels or copies.

    Attributes:
        native: The CUDA library.
        memory: This rank's.
        offsets: Where things stand in the memory of every rank.
        config: The buffer's.
        device: The GPU.
        streams: Where operations run.
        recorder: Gives each operation its record.
    """

    native: NativeLibrary
    memory: PeerMemory
    offsets: header.BufferOffsets
    config: EPConfig
    device: torch.device
    streams: Streams
    recorder: DeviceRecorder
