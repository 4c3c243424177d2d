"""Put our dispatcher into Megatron-Core's MoE layers.

`MoELayer.__init__` knows its own dispatchers only. So the layer is built with "alltoall", and the
dispatcher is replaced afterwards: ``MoELayer.__init__`` is wrapped in place, for the layers whose
spec says so (`use_ep_comm`), or for every MoE layer of the process (`install`), which also reaches
layers that no spec of the caller's names, such as those of multi-token prediction. A subclass would
not do: Megatron-Core 0.16 passes process groups to `MoELayer` itself only.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from ep_comm.errors import EPArgumentError, EPStateError, name_settings
from ep_comm.megatron.dispatcher import EPCommTokenDispatcher
from ep_comm.megatron.experts import GroupedExperts
from ep_comm.megatron.fp8_direct import feed_directly
from ep_comm.megatron.options import EPOptions
from ep_comm.megatron.schedule import keep_inputs
from ep_comm.megatron.support import FSDP, check_supported
from ep_comm.megatron.wgrad import delay_weight_gradients, with_delayed_wgrad

_installed: EPOptions | None = None
_original_init = MoELayer.__init__


@functools.wraps(_original_init)
def _init(self: MoELayer, *args: Any, ep_options: EPOptions | None = None, **kwargs: Any) -> None:
    """Build a MoE layer, with our options from its spec or from `install` where there are any."""
    options = ep_options or _installed
    if options is None:
        _original_init(self, *args, **kwargs)
    else:
        _build(self, options, args, kwargs)


MoELayer.__init__ = _init
name_settings("EPOptions({}=...)".format)  # until a tool with flags says otherwise


def use_ep_comm(spec: Any, options: EPOptions | None = None) -> Any:
    """Make the MoE layers of a spec use our dispatcher.

    Args:
        spec: A layer's ``ModuleSpec``, or the ``TransformerBlockSubmodules`` (or its
            ``ModuleSpec``) of a block. Left unchanged; dense layers stay as they are, and the block
            of a pipeline stage may have no others.
        options: Defaults to ``EPOptions()``.

    Returns:
        A copy of the spec. A process that unpickles it imports this module first.

    Raises:
        EPArgumentError: The spec is of a layer without experts.
    """
    options = options or EPOptions()
    spec = copy.deepcopy(spec)
    block = spec if hasattr(spec, "layer_specs") else spec.submodules
    if hasattr(block, "layer_specs"):
        for layer in block.layer_specs:
            _use_in_layer(layer, options)
    elif not _use_in_layer(spec, options):
        raise EPArgumentError(f"the spec has no MoE layer to put ep_comm into: {spec}")
    return spec


def _use_in_layer(layer_spec: Any, options: EPOptions) -> bool:
    """Change one layer's spec in place; return False if it is no MoE layer."""
    submodules = layer_spec.submodules
    mlp = submodules.mlp
    if isinstance(mlp, ModuleSpec) and mlp.module is MoELayer:  # megatron-core up to 0.17
        mlp.params = {**mlp.params, "ep_options": options}
    elif isinstance(mlp, functools.partial) and mlp.func is MoELayer:  # from 0.18 on
        submodules.mlp = functools.partial(mlp, ep_options=options)
    else:
        return False
    return True


def install(options: EPOptions | None = None) -> None:
    """Make every MoE layer that this process builds from now on use our dispatcher.

    With `EPOptions.overlap_wgrad`, `DistributedDataParallel` is built with ``delay_wgrad_compute``.

    Raises:
        EPStateError: Installed before with other options.
    """
    global _installed
    options = options or EPOptions()
    if _installed is not None:
        if _installed != options:
            raise EPStateError(f"ep_comm is installed with {_installed}, not with {options}")
        return
    _installed = options
    if options.overlap_wgrad:
        _delay_wgrad_in_ddp()


def complete(**settings: Any) -> EPOptions:
    """Fill in what the installed options leave at None, and return them.

    Call it before a model is built.
    """
    global _installed
    assert _installed is not None  # `install` came first
    left = {name: value for name, value in settings.items() if getattr(_installed, name) is None}
    _installed = dataclasses.replace(_installed, **left)
    return _installed


def check_model(model_chunks: Iterable[nn.Module]) -> int:
    """Check that every MoE layer of this rank has our dispatcher, and return their number.

    A pipeline stage may have none; a whole model must have some.

    Raises:
        EPStateError: Names the layers that do not, or says that there is none.
        EPUnsupportedError: The model is wrapped in FSDP.
    """
    model_chunks = list(model_chunks)
    for chunk in model_chunks:
        if isinstance(chunk, _BaseDataParallel) and not isinstance(chunk, DistributedDataParallel):
            raise FSDP.error(type(chunk).__name__)
    layers = required_moe_layers(model_chunks)
    others = [
        f"{name} ({type(layer.token_dispatcher).__name__})"
        for name, layer in layers
        if not isinstance(layer.token_dispatcher, EPCommTokenDispatcher)
    ]
    if others:
        raise EPStateError(f"MoE layers without ep_comm's dispatcher: {', '.join(others)}")
    return len(layers)


def moe_layers(model_chunks: Iterable[nn.Module]) -> Iterable[tuple[str, MoELayer]]:
    """Yield the name and the module of every MoE layer."""
    for chunk in model_chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, MoELayer):
                yield name, module


def required_moe_layers(model_chunks: Sequence[nn.Module]) -> list[tuple[str, MoELayer]]:
    """Return what `moe_layers` yields. A stage of a pipeline may have none, a whole model must.

    Raises:
        EPStateError: The model has no MoE layer.
    """
    layers = list(moe_layers(model_chunks))
    configs = [getattr(chunk, "config", None) for chunk in model_chunks]
    is_stage = any(getattr(config, "pipeline_model_parallel_size", 1) > 1 for config in configs)
    if not layers and not is_stage:
        raise EPStateError("the model has no MoE layer")
    return layers


def _build(layer: MoELayer, options: EPOptions, args: tuple, kwargs: dict) -> None:
    """Run Megatron's constructor on `layer` and put our dispatcher in."""
    arguments = inspect.signature(_original_init).bind(layer, *args, **kwargs).arguments
    arguments.pop("self")
    config = arguments["config"]
    check_supported(config, options)
    pg_collection = arguments.get("pg_collection")
    if pg_collection is None:
        pg_collection = arguments["pg_collection"] = get_default_pg_collection()
    if options.device_counts:
        arguments["submodules"] = _with_grouped_experts(arguments["submodules"])
    elif options.overlap_wgrad:
        arguments["submodules"] = _with_delayed_experts(arguments["submodules"])
    _original_init(layer, **arguments)
    if options.fp8_direct:
        # Megatron's 1F1B cuts off what says where gradients can go.
        is_cut = layer.config.overlap_moe_expert_parallel_comm
        feed_directly(layer.experts, gradients=options.fp8_grad_dispatch and not is_cut)
    during_backward = delay_weight_gradients(layer.experts) if options.overlap_wgrad else None
    layer.token_dispatcher = EPCommTokenDispatcher(
        layer.num_local_experts,
        layer.local_expert_indices,
        config=layer.config,
        pg_collection=pg_collection,
        options=options,
        during_backward=during_backward,
    )
    if options.copy_engines:
        dispatcher = layer.token_dispatcher
        layer.router.register_forward_pre_hook(lambda _, inputs: dispatcher.begin_ahead(inputs[0]))
    if config.overlap_moe_expert_parallel_comm:
        keep_inputs()
    if layer.use_shared_expert and layer.shared_expert_overlap:
        layer.token_dispatcher.set_shared_experts(layer.shared_experts)


def _with_grouped_experts(submodules: Any) -> Any:
    """Return MoE submodules whose routed experts take token counts on the device."""
    submodules = copy.copy(submodules)
    submodules.experts = GroupedExperts
    return submodules


def _with_delayed_experts(submodules: Any) -> Any:
    """Return MoE submodules whose routed experts are built to delay their weight gradients."""
    submodules = copy.copy(submodules)
    experts = submodules.experts
    if isinstance(experts, ModuleSpec):
        submodules.experts = ModuleSpec(
            module=_delayed_class(experts.module),
            params=experts.params,
            submodules=experts.submodules,
        )
    elif isinstance(experts, type):
        submodules.experts = _delayed_class(experts)
    else:
        submodules.experts = _with_delayed_config(experts)
    return submodules


def _with_delayed_config(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return a builder of experts that gives ``build(num_local_experts, config)`` a new config."""

    @functools.wraps(build)
    def build_delayed(num_local_experts: int, config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        return build(num_local_experts, with_delayed_wgrad(config), *args, **kwargs)

    return build_delayed


@functools.cache
def _delayed_class(experts: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass that changes the config on its way in: some specs accept classes only."""

    def __init__(self, num_local_experts: int, config: Any, *args: Any, **kwargs: Any) -> None:
        experts.__init__(self, num_local_experts, with_delayed_wgrad(config), *args, **kwargs)

    return type(experts.__name__, (experts,), {"__init__": __init__})


def _delay_wgrad_in_ddp() -> None:
    """Make every `DistributedDataParallel` leave delayed gradients to their modules."""
    original = DistributedDataParallel.__init__

    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        ddp_config = bound.arguments["ddp_config"]
        bound.arguments["ddp_config"] = dataclasses.replace(ddp_config, delay_wgrad_compute=True)
        original(*bound.args, **bound.kwargs)

    DistributedDataParallel.__init__ = init
