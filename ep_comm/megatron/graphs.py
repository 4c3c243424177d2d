"""Whether what runs now is part of a CUDA graph of Megatron's, and no training."""

from __future__ import annotations

from megatron.core.transformer.cuda_graphs import is_graph_capturing

from ep_comm.events import is_captured


def is_for_a_graph() -> bool:
    """Return whether a CUDA graph is captured, or warmed up for, which made-up inputs do."""
    return is_captured() or is_graph_capturing()
