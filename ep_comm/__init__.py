"""Expert-parallel communication for Mixture-of-Experts models.

`Buffer` dispatches tokens to the ranks of their experts and combines the results; `EPConfig` sizes
it. `ep_comm.megatron` puts it under Megatron-Core's MoE layers.
"""

from ep_comm.buffer import Buffer
from ep_comm.config import EPConfig
from ep_comm.errors import (
    EPArgumentError,
    EPError,
    EPMismatchError,
    EPOverflowError,
    EPRoutingError,
    EPStateError,
    EPTimeoutError,
    EPTooManyTokensError,
    EPUnsupportedError,
)
from ep_comm.events import EventOverlap
from ep_comm.handle import CombineOutput, DispatchHandle, DispatchOutput

__all__ = [
    "Buffer",
    "CombineOutput",
    "DispatchHandle",
    "DispatchOutput",
    "EPArgumentError",
    "EPConfig",
    "EPError",
    "EPMismatchError",
    "EPOverflowError",
    "EPRoutingError",
    "EPStateError",
    "EPTimeoutError",
    "EPTooManyTokensError",
    "EPUnsupportedError",
    "EventOverlap",
    "__version__",
]

__version__ = "0.1.0"
