"""DeepEP's interface over this library: code that imports ``deep_ep`` runs unchanged.

It stands in for DeepEP under that name on request only (`path`, `install`)::

    PYTHONPATH="$(python -m ep_comm.deep_ep --path):$PYTHONPATH" python program.py

``docs/deep_ep.md`` in the repository says what is the same, what differs and what is refused. Names
of DeepEP V2 and of its other branches are not there: who looks for one finds that it is missing.
"""

import torch

from ep_comm.deep_ep.buffer import Buffer
from ep_comm.deep_ep.config import Config
from ep_comm.deep_ep.naming import install, path
from ep_comm.deep_ep.utils import EventHandle, EventOverlap

topk_idx_t = torch.int64  # what callers cast to; int32 is taken too

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "install", "path", "topk_idx_t"]
