"""Our layers under Megatron's 1F1B overlap (``--overlap-moe-expert-parallel-comm``).

There a layer is five nodes: attention with router and `dispatch_preprocess`, `token_dispatch`,
experts, `token_combine`, and the rest. While one micro-batch goes forward through a layer another
one goes backward, so that the communication of either runs beside the other's computation, on a
stream of its own. Between nodes tensors are detached: what has a gradient goes from one of the
dispatcher's methods to the next as an argument.

Some nodes free the memory of their inputs once they have run. Megatron goes by its own alltoall,
which copies a layer's rows before it sends them, and once more when they have come. Ours does
neither: dispatch reads what the router keeps for its backward pass, and the experts keep for theirs
what dispatch wrote. So of our layers only combine frees its input, which nobody else has.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.models.common.model_chunk_schedule_plan import TransformerLayerSchedulePlan

from ep_comm.megatron.dispatcher import EPCommTokenDispatcher

_KEPT = ("moe_dispatch", "mlp")  # nodes whose inputs somebody still needs


@functools.cache
def keep_inputs() -> None:
    """Let the nodes of our layers, those of multi-token prediction among them, keep their inputs.

    Of other layers nothing changes.
    """
    original = TransformerLayerSchedulePlan._build_callable_nodes

    @functools.wraps(original)
    def build(self: TransformerLayerSchedulePlan, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if isinstance(_dispatcher_of(self.layer), EPCommTokenDispatcher):
            for node in _KEPT:
                getattr(self, node).free_input = False

    TransformerLayerSchedulePlan._build_callable_nodes = build


def _dispatcher_of(layer: Any) -> Any:
    """Return the dispatcher of a layer; None of a dense one."""
    for inner in ("mtp_model_layer", "transformer_layer"):  # megatron-core from 0.18 on; before
        layer = getattr(layer, inner, layer)
    return getattr(layer.mlp, "token_dispatcher", None)
