"""Buffers of MoE layers: when they are made, and made anew."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from megatron_cases import PADDED
from megatron_model import Setup, make_config, make_model, parallel_state
from ranks import run_ranks

pytest.importorskip("megatron.core")


def buffers_of_a_layer(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron import EPOptions, destroy_buffers
    from ep_comm.megatron.layer import moe_layers

    parallel_state(Setup())
    destroy_buffers()
    config = make_config(Setup(), EPOptions())
    _, layer = next(iter(moe_layers(make_model(Setup(), config, EPOptions()))))
    tokens = 5 + 3 * rank
    layer(torch.randn(tokens, 1, config.hidden_size))
    buffer = layer.token_dispatcher.buffer
    assert buffer.config.max_tokens_per_rank == 8  # of the rank with most
    layer(torch.randn(tokens, 1, config.hidden_size))
    assert layer.token_dispatcher.buffer is buffer
    destroy_buffers()
    layer(torch.randn(tokens, 1, config.hidden_size))
    assert layer.token_dispatcher.buffer is not buffer and layer.token_dispatcher.buffer.is_usable


def test_a_buffer_holds_the_first_tokens_of_all_ranks_and_is_made_anew():
    run_ranks(2, buffers_of_a_layer, pool="megatron")


def tokens_ahead_of_their_routing(rank: int) -> None:
    """What is begun before the router is what is dispatched behind it. (No copy engine is here.)"""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm import Buffer, EPConfig
    from ep_comm.megatron import EPOptions, buffers, destroy_buffers
    from ep_comm.megatron.layer import moe_layers

    parallel_state(Setup())
    destroy_buffers()
    wires, seen = [], []
    dispatch = Buffer.dispatch

    def without_copies(**sizes) -> EPConfig:
        wires.append(sizes["wire"])
        return EPConfig(**{**sizes, "wire": "sm"})

    def note(what: str, x: torch.Tensor) -> None:
        seen.append((what, x.data_ptr(), tuple(x.shape), x.dtype, x._version))

    def noted_dispatch(self, x, **how):
        note("dispatch", x)
        return dispatch(self, x, **how)

    with (
        mock.patch.object(buffers, "EPConfig", without_copies),
        mock.patch.object(Buffer, "begin_dispatch", lambda self, x, **how: note("begin", x)),
        mock.patch.object(Buffer, "dispatch", noted_dispatch),
    ):
        for copies in (True, False):
            destroy_buffers()
            options = EPOptions(copy_engines=copies)
            config = make_config(Setup(), options)
            _, layer = next(iter(moe_layers(make_model(Setup(), config, options))))
            hidden = torch.randn(5, 1, config.hidden_size).requires_grad_()
            layer(hidden)
            begun = [each for what, *each in seen if what == "begin"]
            dispatched = [each for what, *each in seen if what == "dispatch"]
            assert begun == (dispatched if copies else [])
            seen.clear()
            if copies:
                layer(torch.randn(6, 1, config.hidden_size))  # more than there is room for
                assert [what for what, *_ in seen] == ["dispatch"] * 2
                layer.config.overlap_moe_expert_parallel_comm = True
                layer.router(hidden)
                layer.config.overlap_moe_expert_parallel_comm = False
                layer.router(hidden.transpose(0, 2).contiguous().transpose(0, 2))
                assert len(seen) == 2  # neither is begun
                layer.router(hidden)
                assert seen[-1][0] == "begin"
                seen.clear()
        assert set(wires[:2]) == {"copy-engine"} and wires[-1] == "sm"
    destroy_buffers()


def test_tokens_are_begun_before_their_router():
    run_ranks(2, tokens_ahead_of_their_routing, pool="megatron")


def batches_that_grow(rank: int) -> None:
    """A longer batch makes a larger buffer; what went through the smaller one has its gradients."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron import EPOptions, MoEMeter, destroy_buffers, synchronize_buffers
    from ep_comm.megatron.layer import moe_layers

    parallel_state(Setup())
    destroy_buffers()
    config = make_config(Setup(), EPOptions())
    model = make_model(Setup(), config, EPOptions())
    layer, other = [layer for _, layer in moe_layers(model)][:2]
    meter = MoEMeter(model)

    def inputs(tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * tokens + rank)
        return torch.randn(tokens, 1, config.hidden_size, generator=generator).requires_grad_()

    def gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y.square().sum(), x)[0]

    small, large = inputs(4), inputs(6 + 20 * rank)
    through_small = layer(small)[0]
    assert layer.token_dispatcher.buffer.config.max_tokens_per_rank == 4
    through_large = layer(large)[0]
    assert layer.token_dispatcher.buffer.config.max_tokens_per_rank == 26
    assert other(large)[0].shape == large.shape  # a layer that has seen none of it
    assert other.token_dispatcher.buffer is layer.token_dispatcher.buffer
    got = [gradient(small, through_small), gradient(large, through_large)]
    assert meter.step()["ep/wire-mib"] > 0
    want = [gradient(x, layer(x)[0]) for x in (small, large)]  # all through the larger one
    assert all(map(torch.equal, got, want))
    layer(inputs(27))
    assert layer.token_dispatcher.buffer.config.max_tokens_per_rank == 32  # a quarter more
    synchronize_buffers()
    destroy_buffers()
    layer(small)
    assert len(layer.token_dispatcher.buffers) == 1


def test_a_longer_batch_makes_a_larger_buffer():
    run_ranks(2, batches_that_grow, pool="megatron")


def padded_batches_that_grow(rank: int) -> None:
    """No rank hears of the others' tokens in time: as many on each, a longer batch is seen here."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.errors import EPTooManyTokensError
    from ep_comm.megatron import EPOptions, destroy_buffers
    from ep_comm.megatron.layer import moe_layers

    setup = Setup(config=PADDED)
    parallel_state(setup)
    destroy_buffers()
    for most, rooms in ((None, [8, 8, 17]), (8, [8, 8, None])):
        options = EPOptions(max_tokens_per_rank=most)
        config = make_config(setup, options)
        _, layer = next(iter(moe_layers(make_model(setup, config, options))))
        for tokens, room in zip((8, 5, 17), rooms, strict=True):
            hidden = torch.randn(tokens, 1, config.hidden_size)
            if room is None:
                with pytest.raises(EPTooManyTokensError):
                    layer(hidden)
                continue
            layer(hidden)
            dispatcher = layer.token_dispatcher
            assert dispatcher.buffer.config.max_tokens_per_rank == room
            capacity = -(-tokens * config.moe_router_topk // config.num_moe_experts)
            assert dispatcher.handle.padded_tokens_per_expert.tolist() == [2 * capacity] * 4
            assert dispatcher.tokens_per_expert.sum() <= 8 * capacity


def test_a_longer_padded_batch_makes_a_larger_buffer():
    run_ranks(2, padded_batches_that_grow, pool="megatron")
