"""Received FP8 rows as the input of the experts' first GEMM: every bit as dequantised ones give.

Transformer Engine needs a GPU. Here Megatron's own `TEGroupedMLP` runs on layers that stand in for
its (te_stand_in.py); tests/megatron/test_fp8_direct_gpu.py has the same with itself.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import te_stand_in
import torch
from megatron_model import Setup, make_config, parallel_state
from ranks import run_ranks, stop_pool

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.core") is None
    or importlib.util.find_spec("transformer_engine") is not None,
    reason="needs megatron-core, and no Transformer Engine beside the one that stands in",
)

HIDDEN, FFN, TOKENS = 256, 128, 90
CONFIG = (("hidden_size", HIDDEN), ("moe_ffn_hidden_size", FFN), ("moe_router_topk", 3))
SETUP = Setup(bf16=True, config=CONFIG)


@pytest.fixture(scope="module", autouse=True)
def processes():
    yield
    stop_pool("megatron-fp8")


def run(function: Any, *args: Any) -> list:
    return run_ranks(2, function, *args, pool="megatron-fp8")


def make_layer(options: dict, **config: Any) -> Any:
    """A MoE layer with FP8 experts, with the same weights for the same rank."""
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

    from ep_comm.megatron import EPOptions, layer  # noqa: F401  (it lets a layer take our options)

    class Experts(TEGroupedMLP):
        def __init__(self, num_local_experts, config, pg_collection=None, **_):
            linears = MLPSubmodules(
                linear_fc1=te_stand_in.GroupedLinear, linear_fc2=te_stand_in.GroupedLinear
            )
            super().__init__(num_local_experts, config, linears, pg_collection)

    settings = make_config(SETUP, None)
    fp8_experts = dict(fp8="e4m3", fp8_recipe="blockwise", moe_grouped_gemm=True)
    for name, value in {**fp8_experts, **config}.items():  # Megatron refuses some without TE
        setattr(settings, name, value)
    torch.manual_seed(3)
    return MoELayer(
        settings, MoESubmodules(experts=Experts), ep_options=EPOptions(**options)
    ).bfloat16()


def layer_step(rank: int, direct: bool, case: dict) -> dict[str, torch.Tensor]:
    """Output and all gradients of one layer, whose expert 5 gets no token."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron import destroy_buffers

    parallel_state(SETUP)
    with te_stand_in.installed():
        layer = make_layer(
            dict(fp8_dispatch=True, fp8_direct=direct, **case.get("options", {})),
            **case.get("config", {}),
        )
        experts = layer.experts
        with torch.no_grad():
            left_out = range(4, 8) if case.get("skewed") else [5]
            for expert in left_out:
                layer.router.weight[expert] = 0
                layer.router.weight[expert, 0] = -4096
        if case.get("frozen"):
            experts.requires_grad_(False)
        for weight in experts.parameters():
            weight.main_grad = torch.zeros(weight.shape)
        generator = torch.Generator().manual_seed(rank)
        spread = 2.0 ** torch.randint(-9, 9, (TOKENS, 1, HIDDEN // 4), generator=generator)
        hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator)
        hidden = hidden * spread.repeat_interleave(4, -1)
        hidden[..., 0] = 4
        hidden = hidden.bfloat16().requires_grad_()
        grad = torch.randn(TOKENS, 1, HIDDEN, generator=generator).bfloat16()
        with torch.no_grad():
            alone, _ = layer(hidden)
        for _ in range(case.get("passes", 1)):  # as micro-batches: gradients add up
            if case.get("recompute"):
                output = torch.utils.checkpoint.checkpoint(
                    lambda x: layer(x)[0], hidden, use_reentrant=True
                )
            else:
                output, _ = layer(hidden)
            output.backward(grad)
        assert torch.equal(output, alone)
        counts = layer.token_dispatcher.tokens_per_expert.tolist()
        assert rank == 0 or not any(counts[expert - 4] for expert in left_out)
        assert experts.linear_fc1.times_written_out == 0
        takes = direct and case.get("options", {}).get("fp8_grad_dispatch", False)
        is_quantised = [each.num_calls > 0 for each in experts.linear_fc2.of_gradient]
        assert is_quantised == [not takes] * len(is_quantised)
        tensors = dict(output=output.detach(), hidden=hidden.grad)
        for name, weight in layer.named_parameters():
            if weight.requires_grad:
                fused = hasattr(weight, "main_grad") and case.get("fused")
                tensors[name] = weight.main_grad if fused else weight.grad
        destroy_buffers()
    return tensors


CASES: dict[str, dict] = {
    "plain": {},
    "two-passes": dict(passes=2),
    "delayed": dict(options=dict(overlap_wgrad=True)),
    "fused": dict(fused=True, passes=2, config=dict(gradient_accumulation_fusion=True)),
    "fused-delayed": dict(
        fused=True,
        passes=2,
        config=dict(gradient_accumulation_fusion=True),
        options=dict(overlap_wgrad=True),
    ),
    "frozen-experts": dict(frozen=True),
    "recomputed": dict(recompute=True),
    "padded": dict(options=dict(capacity_factor=4.0)),
    "all-to-one-rank": dict(skewed=True),
}


CASES |= {
    f"{name}-fp8-gradients": {
        **case,
        "options": {**case.get("options", {}), "fp8_grad_dispatch": True},
    }
    for name, case in CASES.items()
}


@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_that_of_dequantised_rows(case):
    plain = run(layer_step, False, CASES[case])
    direct = run(layer_step, True, CASES[case])
    for want, got in zip(plain, direct, strict=True):
        assert want.keys() == got.keys() and want["output"].isfinite().all()
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), name
    gradients = [tensor for each in direct for name, tensor in each.items() if "linear_fc1" in name]
    assert CASES[case].get("frozen") or sum(bool(each.any()) for each in gradients) > 3


def refusals(rank: int) -> None:
    """What would compute with something else than the rows that came says so."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm import fp8
    from ep_comm.errors import EPStateError, EPUnsupportedError
    from ep_comm.megatron import destroy_buffers
    from ep_comm.megatron.fp8_direct import FP8Rows, attach, feed_directly

    parallel_state(SETUP)
    with te_stand_in.installed(), torch.no_grad():
        with pytest.raises(EPUnsupportedError, match="beside Megatron's TEGroupedMLP.*Sequential"):
            feed_directly(torch.nn.Sequential(), gradients=False)
        other = make_layer(dict(fp8_dispatch=True)).experts
        other.linear_fc1.save_original_input = True
        with pytest.raises(EPUnsupportedError, match=r"grouped tensors in it \(save_original"):
            feed_directly(other, gradients=False)

        layer = make_layer(dict(fp8_dispatch=True, fp8_direct=True))
        linear = layer.experts.linear_fc1
        ends = torch.tensor([0, 16, 16, 48, 48], dtype=torch.int32)
        data, scales = fp8.quantize(torch.randn(48, HIDDEN))
        rows = FP8Rows(data, fp8.join_scales(scales, ends.tolist()), ends)
        edge = torch.full((48, HIDDEN), torch.nan, dtype=torch.bfloat16)
        with pytest.raises(EPStateError, match="other rows than the dispatch has handed over"):
            linear(edge, [16, 0, 32, 0])
        attach(edge, rows)
        assert linear(edge, [16, 0, 32, 0])[0].isfinite().all()
        with pytest.raises(EPStateError, match="other rows"):  # they are taken once
            linear(edge, [16, 0, 32, 0])

        manager = te_stand_in.FP8GlobalStateManager
        for setting, value, message in (
            ("enabled", False, "got no FP8"),
            ("recipe.is_block", False, "got Recipe"),
            ("recipe.backward_override", "high_precision", "backward_override='high_precision'"),
        ):
            owner, _, name = setting.rpartition(".")
            target = getattr(manager, owner) if owner else manager
            attach(edge, rows)
            with pytest.MonkeyPatch.context() as patch, pytest.raises(EPStateError, match=message):
                patch.setattr(target, name, value)
                linear(edge, [16, 0, 32, 0])

        with pytest.MonkeyPatch.context() as patch:  # a version with another way to quantise
            patch.setattr(
                te_stand_in,
                "split_quantize",
                lambda values, splits, _: [
                    te_stand_in.Float8BlockQuantizer(1)(part) for part in values.split(splits)
                ],
            )
            attach(edge, rows)
            with pytest.raises(EPStateError, match="taken the FP8 rows of 0 experts of 4"):
                linear(edge, [16, 0, 32, 0])
        destroy_buffers()


def test_other_rows_are_not_computed_with_unnoticed():
    run(refusals)


def gradient_refusals(rank: int) -> None:
    """As `refusals`, of the gradient of the last layer's output."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm import fp8
    from ep_comm.errors import EPStateError
    from ep_comm.megatron import destroy_buffers
    from ep_comm.megatron.fp8_direct import FP8Rows, gradient_of

    parallel_state(SETUP)
    with te_stand_in.installed():
        options = dict(fp8_dispatch=True, fp8_direct=True, fp8_grad_dispatch=True)
        linear = make_layer(options).experts.linear_fc2
        ends = torch.tensor([0, 16, 16, 48, 48], dtype=torch.int32)
        data, scales = fp8.quantize(torch.randn(48, HIDDEN))
        rows = FP8Rows(data, fp8.join_scales(scales, ends.tolist()), ends)
        inputs = torch.randn(48, FFN).bfloat16()

        def call(puts: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            leaf = inputs.clone().requires_grad_()
            output, _ = linear(leaf, [16, 0, 32, 0])
            instead = torch.full_like(output, torch.nan)
            gradient = gradient_of(output)
            assert gradient_of(output) is None  # it is taken once
            if puts:
                gradient.put(rows, instead)
            return output, instead, leaf

        output, instead, leaf = call()
        output.backward(instead)
        assert leaf.grad.isfinite().all() and leaf.grad.any()

        output, instead, _ = call()
        with pytest.raises(EPStateError, match="another one than combine's backward"):
            output.backward(instead + 1)

        output, _, leaf = call(puts=False)  # an ordinary gradient
        output.backward(torch.ones_like(output))
        assert leaf.grad.isfinite().all() and leaf.grad.any()

        with pytest.MonkeyPatch.context() as patch:
            output, instead, _ = call()
            patch.setattr(
                te_stand_in,
                "split_quantize",
                lambda values, splits, _: [
                    te_stand_in.Float8BlockQuantizer(1)(part) for part in values.split(splits)
                ],
            )
            with pytest.raises(EPStateError, match="FP8 gradient of 0 experts of 4"):
                output.backward(instead)

        with torch.no_grad():
            leaf = inputs.clone().requires_grad_()
            assert gradient_of(linear(leaf, [16, 0, 32, 0])[0]) is None
        frozen, _ = linear(inputs, [16, 0, 32, 0])
        assert gradient_of(frozen) is None  # nobody could notice
        destroy_buffers()


def test_another_gradient_is_not_computed_with_unnoticed():
    run(gradient_refusals)
