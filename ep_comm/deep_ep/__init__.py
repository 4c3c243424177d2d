"""DeepEP's interface over this library: code that imports ``deep_ep`` runs unchanged.

It stands in for DeepEP under that name on request only (`path`, `install`)::

    PYTHONPATH="$(python -m ep_comm.deep_ep --path):$PYTHONPATH" python program.py

`Buffer` is DeepEP V1's, `ElasticBuffer` the expert-parallel part of V2's. ``docs/deep_ep.md`` in
the repository says what is the same, what differs and what is refused. Names of DeepEP's other
branches are not there: who looks for one finds that it is missing.
"""

import torch

from ep_comm.deep_ep.buffer import Buffer
from ep_comm.deep_ep.config import Config
from ep_comm.deep_ep.elastic import ElasticBuffer
from ep_comm.deep_ep.elastic_handle import EPHandle
from ep_comm.deep_ep.naming import install, path
from ep_comm.deep_ep.utils import EventHandle, EventOverlap

topk_idx_t = torch.int64  # what callers cast to; int32 is taken too

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "install",
    "path",
    "topk_idx_t",
]
