"""MoE layers behind Megatron's CUDA graphs, without the graphs."""

from __future__ import annotations

import pytest
import torch
from megatron_cases import PADDED, SHARED, forget_loss_scale, set_graphed_modules
from megatron_model import Setup, make_config, make_model, parallel_state
from ranks import run_ranks

pytest.importorskip("megatron.core")


def resume_behind_graphed_router(rank: int) -> None:
    """What Megatron does to replay a graph of the router, without the graph."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from megatron.core.transformer.moe import moe_utils

    from ep_comm.megatron import EPOptions
    from ep_comm.megatron.layer import moe_layers
    from ep_comm.megatron.support import check_supported

    setup = Setup(config=SHARED)
    parallel_state(setup)
    config = make_config(setup, None)
    _, layer = next(iter(moe_layers(make_model(setup, config, EPOptions()))))
    hidden = torch.randn(16, 2, 32)
    expected, _ = layer(hidden)

    config.cuda_graph_impl = "transformer_engine"
    set_graphed_modules(config, ["attn", "moe_router"])
    check_supported(config, EPOptions())
    is_capturing, moe_utils.is_graph_capturing = moe_utils.is_graph_capturing, lambda: True
    try:
        hidden, probs, routing_map, shared = layer(hidden)
    finally:
        moe_utils.is_graph_capturing = is_capturing
    layer.cudagraph_tensor_store.set(
        hidden_states=hidden, probs=probs, routing_map=routing_map, shared_expert_output=shared
    )
    output, _ = layer(hidden)
    assert torch.equal(output, expected)


def test_goes_on_behind_a_graphed_router():
    run_ranks(2, resume_behind_graphed_router, pool="megatron")


def resume_behind_graphed_preprocessing(rank: int, setup: Setup) -> None:
    """What Megatron does to replay a graph of router and preprocessing, without the graph.

    Between capture and replay the layer runs by itself, on another number of tokens: as in an
    evaluation, which Megatron does not capture.
    """
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from megatron.core.transformer.moe import moe_utils

    from ep_comm.megatron import EPOptions, destroy_buffers
    from ep_comm.megatron.layer import moe_layers
    from ep_comm.megatron.support import check_supported

    parallel_state(setup)
    destroy_buffers()
    options = EPOptions(**dict(setup.options))
    config = make_config(setup, options)
    _, layer = next(iter(moe_layers(make_model(setup, config, options))))
    hidden = torch.randn(16, 2, 32)

    def gradients(run) -> list[torch.Tensor]:
        for parameter in layer.parameters():
            parameter.main_grad.zero_()
        x = hidden.clone().requires_grad_()
        output = run(x)
        output.square().sum().backward()
        return [output.detach(), x.grad, *(p.main_grad.clone() for p in layer.parameters())]

    def resumed(x: torch.Tensor) -> torch.Tensor:
        dispatcher = layer.token_dispatcher
        is_capturing, moe_utils.is_graph_capturing = moe_utils.is_graph_capturing, lambda: True
        try:
            graph_hidden, probs, *outputs = layer(x)
        finally:
            moe_utils.is_graph_capturing = is_capturing
        with torch.no_grad():
            layer(hidden[:5])
        is_shared = config.moe_shared_expert_intermediate_size is not None
        shared = outputs.pop() if is_shared and not config.moe_shared_expert_overlap else None
        for name, tensor in zip(dispatcher.valid_cudagraph_attrs, outputs, strict=True):
            *owners, attribute = name.split(".")
            owner = dispatcher
            for each in owners:
                owner = getattr(owner, each)
            setattr(owner, attribute, tensor)
        layer.cudagraph_tensor_store.set(
            hidden_states=graph_hidden, probs=probs, shared_expert_output=shared
        )
        output, _ = layer(x)
        layer.cudagraph_tensor_store.clear()
        return output

    expected = gradients(lambda x: layer(x)[0])
    config.cuda_graph_impl = "transformer_engine"
    set_graphed_modules(config, ["attn", "moe_router", "moe_preprocess"])
    check_supported(config, options)
    for _ in range(2):
        for got, want in zip(gradients(resumed), expected, strict=True):
            assert torch.equal(got, want)
    forget_loss_scale()


@pytest.mark.parametrize(
    "setup",
    [
        Setup(),
        Setup(config=SHARED),
        Setup(config=(*SHARED, ("moe_shared_expert_overlap", True))),
        Setup(options=(("capacity_factor", 4.0),)),
    ],
    ids=["plain", "shared", "shared-overlapped", "capacity-factor"],
)
def test_goes_on_behind_graphed_preprocessing(setup):
    run_ranks(2, resume_behind_graphed_preprocessing, setup, pool="megatron")


def test_graphs_of_a_padded_layer_are_left_to_megatron():
    run_ranks(1, padded_graphs, pool="megatron")


def padded_graphs(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron import EPOptions
    from ep_comm.megatron.support import check_supported

    config = make_config(Setup(ep=1, config=PADDED), None)
    config.cuda_graph_impl = "transformer_engine"
    set_graphed_modules(config, ["attn", "moe"])
    check_supported(config, EPOptions())
