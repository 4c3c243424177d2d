"""MoE layers and models with our dispatcher: what is wrong with them is named, in time."""

from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron_model import Setup, make_config, make_model, parallel_state
from ranks import run_ranks

from ep_comm import EPMismatchError, EPTimeoutError

pytest.importorskip("megatron.core")


def models_that_are_not_right(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from ep_comm.errors import EPArgumentError, EPStateError, EPUnsupportedError
    from ep_comm.megatron import EPOptions, check_model, check_weight_gradients, use_ep_comm
    from ep_comm.megatron.wgrad import delay_weight_gradients

    with pytest.raises(EPArgumentError, match="no MoE layer"):
        use_ep_comm(get_gpt_layer_local_spec())
    with pytest.raises(EPStateError, match="no MoE layer"):
        check_model([torch.nn.Linear(2, 2)])
    with pytest.raises(EPUnsupportedError, match=r"\(weight of Linear\): nothing delays"):
        delay_weight_gradients(torch.nn.Linear(2, 2))
    for bad in (
        dict(timeout_s=-1),
        dict(expert_alignment=0),
        dict(max_tokens_per_rank=-5),
        dict(max_tokens_per_rank=True),
        dict(overlap_wgrad="no"),
    ):
        with pytest.raises(EPArgumentError, match=next(iter(bad))):
            EPOptions(**bad)

    parallel_state(Setup())
    stock = make_model(Setup(dispatcher="alltoall"), make_config(Setup(), None), EPOptions())
    with pytest.raises(EPStateError, match=r"decoder.layers.0.mlp \(MoEAlltoAllTokenDispatcher\)"):
        check_model(stock)

    options = EPOptions(overlap_wgrad=True)
    ours = make_model(Setup(), make_config(Setup(), None), options)
    assert check_model(ours) == 2
    linear = next(m for m in ours[0].modules() if hasattr(m, "ep_comm_wgrad"))
    x = torch.ones(3, linear.weight.shape[1], requires_grad=True)
    linear(x)[0].sum().backward()
    with pytest.raises(EPStateError, match="never computed: .*linear_fc1 \\(1\\)"):
        check_weight_gradients(ours)
    linear.backward_dw()
    check_weight_gradients(ours)


def test_what_is_wrong_with_a_model_is_named():
    run_ranks(2, models_that_are_not_right, pool="megatron")


def groups_of_the_caller(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection

    from ep_comm.megatron import EPOptions, use_ep_comm
    from ep_comm.megatron.layer import moe_layers

    parallel_state(Setup())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.tp_ep = dist.new_group([0, 1])
    config = make_config(Setup(), None)
    spec = use_ep_comm(get_gpt_layer_local_spec(num_experts=config.num_moe_experts), EPOptions())
    model = GPTModel(config, spec, 64, 16, pg_collection=groups)
    for _, layer in moe_layers([model]):
        assert layer.token_dispatcher.tp_ep_group is groups.tp_ep


def test_layers_have_the_process_groups_of_their_model():
    run_ranks(2, groups_of_the_caller, pool="megatron")


def other_dispatcher_on_a_rank(rank: int) -> str | None:
    """The rank that has another dispatcher is named in time, and so is one with other settings."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron import EPOptions
    from ep_comm.megatron.layer import moe_layers

    parallel_state(Setup())
    start = time.monotonic()
    with pytest.raises(EPMismatchError, match="find the most tokens"):
        options = EPOptions(timeout_s=9.0, max_tokens_per_rank=64 if rank else None)
        config = make_config(Setup(), options)
        _, layer = next(iter(moe_layers(make_model(Setup(), config, options))))
        layer(torch.randn(4, 1, config.hidden_size))
    assert time.monotonic() - start < 9
    if rank == 1:
        dist.barrier()
        return None
    options = EPOptions(timeout_s=2.0)
    config = make_config(Setup(), options)
    _, layer = next(iter(moe_layers(make_model(Setup(), config, options))))
    with pytest.raises(EPTimeoutError) as caught:
        layer(torch.randn(4, 1, config.hidden_size))
    dist.barrier()
    return str(caught.value)


def test_a_rank_with_another_dispatcher_is_named():
    message = run_ranks(2, other_dispatcher_on_a_rank, fresh=True, pool="megatron")[0]
    assert "rank 0 waited 2 s for rank 1 (phase: find the most tokens of a rank)" in message


def bounds_of_waits(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron import EPOptions
    from ep_comm.megatron.buffers import _default_timeout
    from ep_comm.megatron.layer import moe_layers

    parallel_state(Setup())

    def bound(seconds: float, **options: float) -> float:
        config = make_config(Setup(), None)
        model = make_model(Setup(), config, EPOptions(**options))
        _, layer = next(iter(moe_layers(model)))
        group = dist.new_group([0, 1], timeout=timedelta(seconds=seconds))
        layer.token_dispatcher._layer_buffers._group = group
        layer(torch.randn(4, 1, config.hidden_size))
        return layer.token_dispatcher.buffer.config.timeout_s

    assert bound(50) == 25
    assert bound(1800) == 300
    assert bound(50, timeout_s=40) == 40
    for untold in (dist.ProcessGroup(0, 1), SimpleNamespace(_get_backend=lambda device: object())):
        assert _default_timeout(untold, torch.device("cpu")) == 300
    late = EPTimeoutError(op="plan", phase="x", rank=0, late_ranks=(1,), epoch=1, timeout_s=2.0)
    assert "raise EPOptions(timeout_s=...) if" in str(late)


def test_waits_are_bounded_by_half_of_the_groups_timeout():
    run_ranks(2, bounds_of_waits, pool="megatron")
