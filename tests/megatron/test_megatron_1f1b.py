"""Our dispatcher under Megatron's 1F1B overlap, against its plain schedule and against alltoall's.

Alltoall's 1F1B gives the bits of its plain schedule in all of these, so ours has to. Weight
gradients of the routed experts are delayed as Transformer Engine's are (`megatron_gaps`).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from matrix import few_of
from megatron_cases import PADDED, SHARED
from megatron_model import Setup, assert_same_bits, make_config, make_model, parallel_state, train
from ranks import run_ranks

pytest.importorskip("megatron.core")


OVERLAP = (("overlap_moe_expert_parallel_comm", True),)
DELAYED = (*OVERLAP, ("delay_wgrad_compute", True))
LAYERS = (("num_layers", 4),)
MTP = (("mtp_num_layers", 1),)
SPLIT_LAYERS = dict(pp=2, vpp=2, microbatches=4)


def steps(**sizes) -> Setup:
    """Megatron wants BF16 for it."""
    return Setup(**{"bf16": True, "steps": 2, "microbatches": 3, **sizes})


# Ranks, and what is trained; all with several experts a rank.
CASES = {
    "several_experts": (2, steps()),
    "one_microbatch": (2, steps(microbatches=1)),
    "shared_experts": (2, steps(config=SHARED)),
    "dense_first_layer": (2, steps(dense_first=True)),
    "token_dropping": (2, steps(config=PADDED[:1])),
    "padded_to_capacity": (2, steps(config=PADDED)),
    "distributed_optimizer": (2, steps(dist_opt=True, overlap_grad_reduce=True)),
    "frozen_router": (2, steps(frozen="router")),
    "frozen_experts": (2, steps(frozen=r"\.experts\.")),
    "ep4": (4, steps(ep=4)),
    "tp2_ep2": (4, steps(tp=2)),
    "tp2_etp2_ep2": (4, steps(tp=2, etp=2)),
    "cp2_ep4": (4, steps(cp=2, ep=4)),
    "vpp2_pp2_ep2": (4, steps(config=LAYERS, **SPLIT_LAYERS)),
    "vpp2_pp2_ep2_mtp": (4, steps(config=(*LAYERS, *MTP), **SPLIT_LAYERS)),
    "vpp2_pp2_ep2_mtp_padded": (4, steps(config=(*LAYERS, *MTP, *PADDED), **SPLIT_LAYERS)),
}
KEPT = (
    *("several_experts", "shared_experts", "dense_first_layer", "padded_to_capacity"),
    *("distributed_optimizer", "tp2_ep2", "vpp2_pp2_ep2_mtp"),
)


def run(num_ranks: int, setup: Setup, *more: tuple[str, object]) -> list[dict]:
    setup = dataclasses.replace(setup, config=(*setup.config, *more))
    return run_ranks(num_ranks, train, setup, pool="megatron")


@pytest.mark.parametrize("case", few_of(CASES, *KEPT))
def test_the_plain_schedules_bits(case):
    num_ranks, ours = CASES[case]
    stock = dataclasses.replace(ours, dispatcher="alltoall")
    assert_same_bits(run(num_ranks, stock, *DELAYED), run(num_ranks, stock))
    plain = run(num_ranks, ours)
    assert plain[-1]["losses"][-1] < plain[-1]["losses"][0]
    for overlap in (OVERLAP, DELAYED):
        assert_same_bits(run(num_ranks, ours, *overlap), plain)


def test_one_expert_a_rank():
    """alltoall frees there what its expert has saved, in megatron-core 0.16 at least."""
    ours = steps(config=(("num_moe_experts", 2),))
    assert_same_bits(run(2, ours, *DELAYED), run(2, ours))


def memory_in_use(rank: int) -> None:
    """What one of the two streams made is kept from reuse while the other one reads it."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron import EPOptions
    from ep_comm.megatron.layer import moe_layers

    noted: set[int] = set()
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: noted.add(tensor.data_ptr())
    )
    for more, expected in (((), False), (OVERLAP, True)):
        setup = steps(config=more)
        parallel_state(setup)
        _, layer = next(iter(moe_layers(make_model(setup, make_config(setup, None), EPOptions()))))
        dispatcher = layer.token_dispatcher
        hidden = torch.randn(16, 2, 32).bfloat16()
        probs, routing_map = layer.route(hidden)
        tokens, probs = layer.preprocess(hidden, probs, routing_map)
        routing = dispatcher._routing_map.data_ptr()
        rows, row_probs = layer.dispatch(tokens, probs)
        noted_of_dispatch = routing in noted
        layer.routed_experts_compute(rows, row_probs)
        assert noted_of_dispatch is expected
        assert ({rows.data_ptr(), row_probs.data_ptr()} <= noted) is expected
    monkeypatch.undo()


def test_memory_of_two_streams():
    run_ranks(2, memory_in_use, pool="megatron")


def operations_sms(rank: int) -> None:
    """The buffer is told that computation runs beside, and what the user says."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm import Buffer
    from ep_comm.megatron import EPOptions, destroy_buffers
    from ep_comm.megatron.layer import moe_layers

    asked: list[int | bool | None] = []
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(Buffer, "set_num_sms", lambda buffer, num_sms: asked.append(num_sms))
    monkeypatch.setattr(Buffer, "set_overlapped", lambda buffer, is_on: asked.append(is_on))
    for more, num_sms in (((), None), (OVERLAP, None), (OVERLAP, 40)):
        setup = steps(config=more)
        parallel_state(setup)
        options = EPOptions(num_sms=num_sms)
        model = make_model(setup, make_config(setup, options), options)
        for _, layer in moe_layers(model):
            layer(torch.randn(16, 2, 32).bfloat16())
    monkeypatch.undo()
    destroy_buffers()
    assert asked == [None, False, None, True, 40, True]


def test_operations_leave_sms_to_computation():
    run_ranks(2, operations_sms, fresh=True, pool="megatron")
