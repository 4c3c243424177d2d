"""ep_comm under Megatron-Core's MoE layers (`ep_comm.megatron.versions` has the range).

Own training loops::

    from ep_comm.megatron import EPOptions, check_model, use_ep_comm

    spec = use_ep_comm(get_gpt_layer_local_spec(...), EPOptions())
    config = TransformerConfig(..., moe_token_dispatcher_type="alltoall")
    model = GPTModel(config, spec, ...)
    check_model([model])

Frameworks with an entry point of their own call ``install(EPOptions())`` before they build the
model. On a machine without a GPU call ``ep_comm.megatron.cpu.enable()`` before importing Megatron;
for that reason nothing here imports it until it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ep_comm.lazy import lazy

if TYPE_CHECKING:
    from ep_comm.megatron.buffers import destroy_buffers, synchronize_buffers
    from ep_comm.megatron.capture import RoutingCapture
    from ep_comm.megatron.dispatcher import EPCommTokenDispatcher
    from ep_comm.megatron.layer import check_model, install, use_ep_comm
    from ep_comm.megatron.meter import MoEMeter
    from ep_comm.megatron.options import EPOptions
    from ep_comm.megatron.overflow import check_overflow
    from ep_comm.megatron.wgrad import check_weight_gradients

_LAZY = {
    "EPCommTokenDispatcher": "dispatcher",
    "EPOptions": "options",
    "MoEMeter": "meter",
    "RoutingCapture": "capture",
    "check_model": "layer",
    "check_overflow": "overflow",
    "check_weight_gradients": "wgrad",
    "destroy_buffers": "buffers",
    "install": "layer",
    "synchronize_buffers": "buffers",
    "use_ep_comm": "layer",
}

__all__ = [
    "EPCommTokenDispatcher",
    "EPOptions",
    "MoEMeter",
    "RoutingCapture",
    "check_model",
    "check_overflow",
    "check_weight_gradients",
    "destroy_buffers",
    "install",
    "synchronize_buffers",
    "use_ep_comm",
]

__getattr__, __dir__ = lazy(__name__, _LAZY, __all__)
