"""`ep_comm.deep_ep` under the name ``deep_ep``."""

from ep_comm.deep_ep import (
    Buffer,
    Config,
    ElasticBuffer,
    EPHandle,
    EventHandle,
    EventOverlap,
    topk_idx_t,
)
from ep_comm.deep_ep.naming import warn_where_it_hides_another

warn_where_it_hides_another()

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "topk_idx_t",
]
