"""Expert-parallel communication for Mixture-of-Experts models.

`Buffer` dispatches tokens to the ranks of their experts and combines the results; `EPConfig` sizes
it. `ep_comm.megatron` puts it under Megatron-Core's MoE layers.

Who imports whom, from the top floor down; a floor imports only floors below it (pyproject.toml has
the contract, ``lint-imports`` checks it)::

    cli        the ep-comm command
    compare    training with different dispatchers, compared; report, the page of a run
    bench      measurements of operations and whole steps; plan, a model of them on a cluster
    pretrain   the training application of examples/pretrain_moe.py
    megatron   the dispatcher for Megatron-Core, and the launcher; deep_ep, DeepEP's interface
    buffer     the public calls
    ops        torch ops with autograd; low_latency, the public calls for decoding; record_calls,
               those for statistics
    handle     where the rows of a dispatch went, for its combine and its backward
    session    a buffer's backend, its usable state, one operation at a time
    fault_file what a rank leaves on disk when a buffer fails
    backends   reference (torch.distributed), nvlink (our kernels), nodes (the same between nodes)
    checks     of what callers pass
    routing    who is sent what; fp8 and fp8_low_latency, the formats of the wire
    config     sizes and settings of a buffer
    network    settings of the network between nodes, and what a host has for it
    job, telemetry, topology, tracing
    events, blank (tensors without content), errors, lazy, markdown, numeric, version, _native
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ep_comm.lazy import lazy
from ep_comm.version import __version__

if TYPE_CHECKING:
    from ep_comm.buffer import Buffer
    from ep_comm.config import EPConfig
    from ep_comm.errors import (
        EPArgumentError,
        EPError,
        EPExpertOverflowError,
        EPLostRankError,
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
    from ep_comm.low_latency.handle import (
        LowLatencyCombineOutput,
        LowLatencyDispatchOutput,
        LowLatencyHandle,
    )
    from ep_comm.network.settings import NetworkSettings

# Imported when they are first asked for: torch takes seconds, and ``ep-comm --help`` does without.
_LAZY = {
    "Buffer": "buffer",
    "CombineOutput": "handle",
    "DispatchHandle": "handle",
    "DispatchOutput": "handle",
    "EPArgumentError": "errors",
    "EPConfig": "config",
    "EPError": "errors",
    "EPExpertOverflowError": "errors",
    "EPLostRankError": "errors",
    "EPMismatchError": "errors",
    "EPOverflowError": "errors",
    "EPRoutingError": "errors",
    "EPStateError": "errors",
    "EPTimeoutError": "errors",
    "EPTooManyTokensError": "errors",
    "EPUnsupportedError": "errors",
    "EventOverlap": "events",
    "LowLatencyCombineOutput": "low_latency.handle",
    "LowLatencyDispatchOutput": "low_latency.handle",
    "LowLatencyHandle": "low_latency.handle",
    "NetworkSettings": "network.settings",
}

__all__ = [
    "Buffer",
    "CombineOutput",
    "DispatchHandle",
    "DispatchOutput",
    "EPArgumentError",
    "EPConfig",
    "EPError",
    "EPExpertOverflowError",
    "EPLostRankError",
    "EPMismatchError",
    "EPOverflowError",
    "EPRoutingError",
    "EPStateError",
    "EPTimeoutError",
    "EPTooManyTokensError",
    "EPUnsupportedError",
    "EventOverlap",
    "LowLatencyCombineOutput",
    "LowLatencyDispatchOutput",
    "LowLatencyHandle",
    "NetworkSettings",
    "__version__",
]

__getattr__, __dir__ = lazy(__name__, _LAZY, __all__)
