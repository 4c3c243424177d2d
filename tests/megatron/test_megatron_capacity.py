"""A capacity factor of experts: what fits, what is dropped, counts on the device."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from megatron_cases import forget_loss_scale, run
from megatron_model import Setup, assert_same_bits, make_config, make_model, parallel_state
from ranks import run_ranks
from torch import nn

pytest.importorskip("megatron.core")


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_capacity_factor_with_room_for_all_changes_no_bit(bf16):
    usual = Setup(bf16=bf16, steps=2)
    roomy = run(dataclasses.replace(usual, options=(("capacity_factor", 4),)))
    assert_same_bits(run(usual), roomy)
    for result in roomy:
        assert result["metrics"]["ep/dropped-share"] == 0
        assert 1 <= result["metrics"]["ep/capacity-needed"] <= 4


def test_a_tight_capacity_factor_drops_and_trains():
    results = run(Setup(options=(("capacity_factor", 1.0),)))
    losses, metrics = results[0]["losses"], results[0]["metrics"]
    assert losses[-1] < losses[0]
    assert 0 < metrics["ep/dropped-share"] < 0.5 and metrics["ep/capacity-needed"] > 1
    assert all(result["metrics"] == metrics for result in results)


def grouped_like_sequential(rank: int) -> None:
    """The layer of Megatron's experts with their weights, row by row; an expert without tokens."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron import EPOptions, check_overflow, destroy_buffers
    from ep_comm.megatron.layer import moe_layers

    setup = Setup()
    parallel_state(setup)
    destroy_buffers()
    results = []
    for options in (EPOptions(), EPOptions(capacity_factor=4.0, device_counts=True)):
        model = make_model(setup, make_config(setup, options), options)
        _, layer = next(iter(moe_layers(model)))
        experts = layer.experts
        if not results:
            first, router = experts, layer.router.weight.data
        else:
            layer.router.weight.data.copy_(router)
            for e, theirs in enumerate(first.local_experts):
                experts.weight1.data[e] = theirs.linear_fc1.weight.data.t()
                experts.weight2.data[e] = theirs.linear_fc2.weight.data.t()
        generator = torch.Generator().manual_seed(rank)
        hidden = torch.randn(3, 1, 32, generator=generator).repeat(8, 1, 1).requires_grad_()
        output, _ = layer(hidden)
        output.square().sum().backward()
        if not results:
            weights = [
                torch.stack(
                    [getattr(each, name).weight.main_grad.t() for each in first.local_experts]
                )
                for name in ("linear_fc1", "linear_fc2")
            ]
            assert 0 in layer.token_dispatcher.tokens_per_expert.tolist()
        else:
            weights = [experts.weight1.main_grad, experts.weight2.main_grad]
            keys = experts.sharded_state_dict("experts.")
            assert keys["experts.weight1"].global_shape[0] == 8
            check_overflow(model)
        results.append((output.detach(), hidden.grad, layer.router.weight.main_grad, *weights))
    forget_loss_scale()
    for got, want in zip(*results, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_experts_with_counts_on_the_device_are_megatrons():
    run_ranks(2, grouped_like_sequential, pool="megatron")


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_counts_on_the_device_train(factor):
    results = run(Setup(options=(("capacity_factor", factor), ("device_counts", True))))
    losses, metrics = results[0]["losses"], results[0]["metrics"]
    assert losses[-1] < losses[0]
    assert (metrics["ep/dropped-share"] > 0) == (factor == 1.0)


def overflowing(rank: int, how: str | None) -> tuple[str, list[int], int, float]:
    """A layer of two whose experts have too few rows; what the check says, and what came."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.errors import EPExpertOverflowError
    from ep_comm.megatron import EPOptions, check_overflow, destroy_buffers
    from ep_comm.megatron.layer import moe_layers

    setup = Setup()
    parallel_state(setup)
    destroy_buffers()
    options = EPOptions(capacity_factor=1.25, overflow=how)
    model = make_model(setup, make_config(setup, options), options)
    _, (_, layer) = moe_layers(model)
    dispatcher = layer.token_dispatcher
    config = dispatcher.config
    generator = torch.Generator().manual_seed(rank)  # of few kinds of tokens: some experts are full
    hidden = torch.randn(3, 1, config.hidden_size, generator=generator).repeat(8, 1, 1)
    check_overflow(model)  # nothing has been dispatched
    layer(hidden)
    came = dispatcher.overflow.counted[1].tolist()
    share = 2 * 24 * config.moe_router_topk / config.num_moe_experts
    rows = -int(-1.25 * share // 1)
    assert dispatcher.handle.padded_tokens_per_expert.tolist() == [rows] * len(came)
    kept = [min(tokens, rows) for tokens in came]
    assert dispatcher.tokens_per_expert.tolist() == kept
    assert dispatcher.overflow.counted[0].tolist() == [
        tokens - fit for tokens, fit in zip(came, kept, strict=True)
    ]
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("ep_comm").addHandler(handler)
    if how == "error" and max(came) > rows:
        with pytest.raises(EPExpertOverflowError) as caught:
            check_overflow(model)
        said.append(str(caught.value))
    for _ in range(3):  # what was said is not said again
        check_overflow(model)
    logging.getLogger("ep_comm").removeHandler(handler)
    return "\n".join(said), came, rows, share


def test_counts_that_begin_in_inference_mode_go_on_outside():
    from ep_comm.megatron.overflow import ExpertOverflow, take_all

    overflow = ExpertOverflow(1.0, num_local_experts=2, first_expert=0, rank=0)
    overflow.set_room(num_tokens=4, num_topk=1, num_experts=2, alignment=1)
    with torch.inference_mode():
        stats = overflow.stats(torch.device("cpu"))
    stats += torch.tensor([[1, 0], [3, 1]], dtype=torch.int32)
    assert take_all([overflow]) == [(1, 1.5)]
    assert stats.tolist() == [[1, 0], [0, 0]]


def layer_with_room(number: int) -> nn.Module:
    """Stands for an MoE layer with two experts of two rows each, which has dispatched nothing."""
    from ep_comm.megatron import EPOptions
    from ep_comm.megatron.overflow import ExpertOverflow

    overflow = ExpertOverflow(1.0, num_local_experts=2, first_expert=0, rank=0)
    overflow.set_room(num_tokens=4, num_topk=1, num_experts=2, alignment=1)
    layer = nn.Module()
    layer.layer_number = number
    layer.token_dispatcher = SimpleNamespace(overflow=overflow, options=EPOptions())
    return layer


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_layer_that_begins_to_count_between_two_steps(late, caplog):
    """What others had counted by then is not said of it, and of them it is said once."""
    from ep_comm.megatron import check_overflow

    layers = [layer_with_room(number) for number in (1, 2, 3)]
    model = [nn.ModuleList(layers)]
    cpu = torch.device("cpu")
    for layer in layers:
        if layer is not layers[late]:
            stats = layer.token_dispatcher.overflow.stats(cpu)
            stats += torch.tensor([[0, 1], [0, 3]], dtype=torch.int32)
    check_overflow(model)
    layers[late].token_dispatcher.overflow.stats(cpu)
    for _ in range(3):
        check_overflow(model)
    full = [number for number in (1, 2, 3) if number != late + 1]
    assert [message.split(",")[0] for message in caplog.messages] == [
        f"layer {number}" for number in full
    ]


@pytest.mark.parametrize("how", [None, "error"])
def test_an_overflow_is_named(how):
    all_said = run_ranks(2, overflowing, how, pool="megatron")
    assert any(said for said, *_ in all_said)
    for rank, (said, came, rows, share) in enumerate(all_said):
        most = max(came)
        expert = came.index(most) + rank * len(came)
        wanted = (
            f"layer 2, rank {rank}: {most} rows came to expert {expert}, which has {rows}; the "
            f"others were dropped. Raise EPOptions(capacity_factor=...) ({most / share:.2f} would "
            "have had room for all), or balance the router."
        )
        assert said == (wanted if most > rows else "")
