"""`ep_comm.deep_ep.utils` under the name ``deep_ep.utils``."""

from ep_comm.deep_ep.utils import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
