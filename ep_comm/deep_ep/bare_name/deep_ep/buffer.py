"""`ep_comm.deep_ep.buffer` under the name ``deep_ep.buffer``."""

from ep_comm.deep_ep.buffer import Buffer
from ep_comm.deep_ep.config import Config
from ep_comm.deep_ep.utils import EventHandle, EventOverlap

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap"]
