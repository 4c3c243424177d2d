"""Megatron-Core models with our dispatcher against the same models with alltoall, on CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import queue
import time
import warnings
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron_model import (
    Setup,
    assert_close_runs,
    assert_same_bits,
    make_config,
    make_model,
    parallel_state,
    train,
)
from ranks import RankFailure, run_ranks, stop_pool

import ep_comm
from ep_comm import EPMismatchError, EPTimeoutError

pytest.importorskip("megatron.core")


@pytest.fixture(scope="module", autouse=True)
def megatron_processes():
    """Megatron's many groups have threads that poll: not beside the tests of other modules."""
    yield
    stop_pool("megatron")


SHARED = (("moe_shared_expert_intermediate_size", 40),)


def padded(factor: float) -> tuple[tuple[str, object], ...]:
    """``--moe-pad-expert-input-to-capacity`` with ``--moe-expert-capacity-factor``."""
    return (
        ("moe_expert_capacity_factor", factor),
        ("moe_pad_expert_input_to_capacity", True),
    )


PADDED = padded(1.0)
RECOMPUTE_FULL = (
    ("recompute_granularity", "full"),
    ("recompute_method", "uniform"),
    ("recompute_num_layers", 1),
)
FEATURES = {
    "aux_loss": Setup(),
    "allgather_too": Setup(),
    "seq_aux_loss": Setup(config=(("moe_router_load_balancing_type", "seq_aux_loss"),)),
    "expert_bias": Setup(
        config=(
            ("moe_router_load_balancing_type", "none"),
            ("moe_router_enable_expert_bias", True),
            ("moe_router_score_function", "sigmoid"),
        )
    ),
    "group_limited": Setup(
        config=(("moe_router_num_groups", 4), ("moe_router_group_topk", 2)),
    ),
    "shared_experts": Setup(config=SHARED),
    "shared_experts_overlapped": Setup(config=(*SHARED, ("moe_shared_expert_overlap", True))),
    "token_dropping": Setup(config=(("moe_expert_capacity_factor", 0.7),)),
    "padded_to_capacity": Setup(config=PADDED),
    "padded_beyond_all_tokens": Setup(config=padded(3.9)),
    "padded_by_position": Setup(config=(*PADDED, ("moe_token_drop_policy", "position"))),
    "padded_shared_experts": Setup(
        config=(*PADDED, *SHARED, ("moe_shared_expert_overlap", True)), microbatches=2
    ),
    "bf16_router_probs": Setup(config=(("moe_router_dtype", None),), bf16=True),
    "fp16": Setup(fp16=True),
    "recompute_moe": Setup(
        config=(("recompute_granularity", "selective"), ("recompute_modules", ["moe"]))
    ),
    "recompute_full": Setup(config=RECOMPUTE_FULL),
    "gradient_accumulation": Setup(microbatches=3),
    "distributed_optimizer": Setup(dist_opt=True, overlap_grad_reduce=True),
    "dense_first_layer": Setup(dense_first=True),
    "mla": Setup(
        config=(
            *(("q_lora_rank", 16), ("kv_lora_rank", 16), ("rope_type", "rope")),
            *(("qk_head_dim", 8), ("qk_pos_emb_head_dim", 8), ("v_head_dim", 8)),
            ("multi_latent_attention", True),
        )
    ),
    "mtp": Setup(config=(("mtp_num_layers", 1),)),
    "mtp_recomputed": Setup(config=(("mtp_num_layers", 1), *RECOMPUTE_FULL)),
    "capacity_factor": Setup(options=(("capacity_factor", 3.9),)),
    "capacity_factor_recomputed": Setup(config=RECOMPUTE_FULL, options=(("capacity_factor", 3.9),)),
    "fp8_aligned_padding": Setup(options=(("expert_alignment", 16),)),
    "ep_1": Setup(ep=1),
}
CLOSE = dict(rtol=2e-5, atol=2e-6)
CLOSE_BF16 = dict(rtol=5e-2, atol=5e-3)
CLOSE_FP16 = dict(rtol=1e-2, atol=1e-3)


def run(setup: Setup, num_ranks: int = 2) -> list[dict]:
    return run_ranks(num_ranks, train, setup, pool="megatron")


@pytest.mark.parametrize("feature", FEATURES)
def test_trains_like_alltoall(feature):
    setup = FEATURES[feature]
    stock = "allgather" if feature == "allgather_too" else "alltoall"
    ours = run(setup)
    assert ours[0]["losses"][-1] < ours[0]["losses"][0]
    assert (ours[0]["metrics"]["ep/wire-mib"] > 0) == (setup.ep > 1)
    theirs = run(dataclasses.replace(setup, dispatcher=stock))
    assert_close_runs(
        ours, theirs, CLOSE_BF16 if setup.bf16 else CLOSE_FP16 if setup.fp16 else CLOSE
    )


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("factor", [0.7, 1.25])
def test_padding_to_capacity_changes_no_bit(factor, bf16):
    """Neither for alltoall nor for ours. Two summands a token: so both are the same, too."""
    dropped = Setup(config=(("moe_expert_capacity_factor", factor),), bf16=bf16, steps=2)
    filled = dataclasses.replace(dropped, config=padded(factor))
    theirs = run(dataclasses.replace(filled, dispatcher="alltoall"))
    assert_same_bits(run(dataclasses.replace(dropped, dispatcher="alltoall")), theirs)
    ours = run(filled)
    assert_same_bits(run(dropped), ours)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("overlap_grad_reduce", [False, True])
@pytest.mark.parametrize(
    "feature", ["aux_loss", "gradient_accumulation", "recompute_moe", "padded_to_capacity"]
)
def test_overlapped_weight_gradients_are_the_same_bits(feature, overlap_grad_reduce):
    setup = dataclasses.replace(FEATURES[feature], overlap_grad_reduce=overlap_grad_reduce)
    plain = run(setup)
    overlapped = run(dataclasses.replace(setup, options=(("overlap_wgrad", True),)))
    assert_same_bits(plain, overlapped)


FROZEN = {
    "router": r"router",
    "all_but_experts": r"^(?!.*experts)",  # the first dispatch has no backward
    "all_but_the_last_experts": r"^(?!.*layers\.1\.mlp\.experts)",
    "experts": r"experts",
    "one_expert": r"local_experts\.1\.",
    "all_but_one_expert": r"^(?!.*local_experts\.1\.)",
    "first_linear_layers": r"linear_fc1",
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_overlapped_weight_gradients_where_parts_are_frozen(frozen):
    setup = Setup(frozen=FROZEN[frozen], microbatches=2, overlap_grad_reduce=True)
    ours = run(dataclasses.replace(setup, options=(("overlap_wgrad", True),)))
    assert ours[0]["gradients"]
    assert_close_runs(ours, run(dataclasses.replace(setup, dispatcher="alltoall")), CLOSE)


def test_overlapped_weight_gradients_where_parts_are_frozen_and_recomputed():
    """Megatron's recomputation needs something trainable before it, as with alltoall."""
    setup = Setup(frozen=r"^(?!.*(experts|embedding))", config=RECOMPUTE_FULL)
    ours = run(dataclasses.replace(setup, options=(("overlap_wgrad", True),)))
    assert_close_runs(ours, run(dataclasses.replace(setup, dispatcher="alltoall")), CLOSE)


WIDE = (("hidden_size", 128),)
BLOCKWISE = {"fp8": "e4m3", "fp8_recipe": "blockwise"}


def test_fp8_gradients_are_those_of_a_quantised_dispatch():
    """Only what goes back through the experts differs: the loss of the first step does not."""
    plain = run(Setup(config=WIDE, steps=1))
    in_fp8 = run(Setup(config=WIDE, steps=1, options=(("fp8_grad_dispatch", True),)))
    for a, b in zip(plain, in_fp8, strict=True):
        assert a["losses"] == b["losses"]
        ratio = b["metrics"]["ep/wire-mib"] / a["metrics"]["ep/wire-mib"]
        # Of four legs in FP32 one carries 1 byte an element, and 4 a block of 128. Legs are not
        # quite equal: two carry the rows of a rank's own tokens, two those that it received.
        assert ratio == pytest.approx((3 + (1 + 4 / 128) / 4) / 4, rel=0.03)
        different = 0
        for name, gradient in a["gradients"].items():
            error = np.abs(b["gradients"][name] - gradient).max()
            different += error > 0
            assert error <= 0.1 * np.abs(gradient).max(), name
        assert different > 0


def test_repeats_itself_bitwise_on_four_ranks():
    setup = Setup(ep=4)
    assert_same_bits(run(setup, 4), run(setup, 4))


def test_metrics_are_those_of_the_step():
    ours = run(Setup())[0]
    metrics = ours["metrics"]
    stock = run(Setup(dispatcher="alltoall"))[0]["metrics"]
    assert ours["metrics_of_nothing"] == {
        "ep/dispatch-ms": 0, "ep/combine-ms": 0, "ep/expert-ms": 0,
        "ep/imbalance-rank": 1, "ep/imbalance-expert": 1, "ep/wire-mib": 0,
        "ep/dispatch-ms-p99": 0, "ep/combine-ms-p99": 0, "ep/wait-share": 0, "ep/exposed-ms": 0,
        "ep/slowest-rank": -1,
    }  # fmt: skip
    for name in ("ep/dispatch-ms", "ep/combine-ms", "ep/expert-ms"):
        assert 0 < metrics[name] < 5000 and 0 < stock[name] < 5000
    assert 1 <= metrics["ep/imbalance-rank"] <= 2
    assert metrics["ep/imbalance-rank"] <= metrics["ep/imbalance-expert"] <= 8
    assert metrics["ep/imbalance-expert"] == pytest.approx(stock["ep/imbalance-expert"], rel=0.05)
    ours_alone = metrics.keys() - stock.keys()
    assert ours_alone == {
        "ep/wire-mib", "ep/dispatch-ms-p99", "ep/combine-ms-p99", "ep/wait-share",
        "ep/exposed-ms", "ep/slowest-rank",
    }  # fmt: skip
    for op in ("dispatch", "combine"):
        assert 0 < metrics[f"ep/{op}-ms-p99"] < 5000
    assert 0 < metrics["ep/wait-share"] <= 1 and metrics["ep/slowest-rank"] in range(2)
    assert metrics["ep/exposed-ms"] > metrics["ep/dispatch-ms-p99"]


def install_and_train(rank: int, setup: Setup) -> dict:
    from ep_comm.errors import EPStateError

    result = train(rank, setup)
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from ep_comm.megatron import EPOptions, install
    from ep_comm.megatron.layer import complete

    install(EPOptions(**dict(setup.options)))  # again: nothing happens
    with pytest.raises(EPStateError, match="is installed with"):
        install(EPOptions(timeout_s=1))
    completed = complete(max_tokens_per_rank=5, overlap_wgrad=False)
    assert completed == EPOptions(overlap_wgrad=True, max_tokens_per_rank=5)
    assert MoELayer.__init__.__wrapped__ is not None
    return result


def test_install_reaches_every_layer():
    """Both ways in train the same model; `install` also sets DDP up for the overlap."""
    options = (("overlap_wgrad", True),)
    setup = Setup(options=options, through_install=True, dense_first=True)
    installed = run_ranks(2, install_and_train, setup, fresh=True)
    spec = run(dataclasses.replace(setup, through_install=False))
    assert installed[0]["losses"] == spec[0]["losses"]


OLD_GPU = "--ep-fp8-dispatch, --ep-fp8-grad-dispatch or --fp8-format on a GPU without FP8"
OTHER_SCALES = (
    "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 with --ep-fp8-dispatch, --ep-fp8-grad-dispatch or "
    "--fp8-recipe blockwise: it asks"
)
DIRECT = {"fp8_dispatch": True, "fp8_direct": True}
DIRECT_EXPERTS = {
    **BLOCKWISE,
    **{"hidden_size": 512, "moe_grouped_gemm": True, "params_dtype": torch.bfloat16},
}
NO_FP8_EXPERTS = "--ep-fp8-direct without FP8 experts of Transformer Engine's"
OTHER_ROWS = (
    "--ep-fp8-direct with what changes the experts' input, or computes some layers otherwise"
)
# (changes of the TransformerConfig and of the machine, our options, the message from its subject)
REFUSED = [
    ({"moe_token_dispatcher_type": "allgather"}, {}, "set moe_token_dispatcher_type='alltoall'"),
    ({"moe_token_dispatcher_type": "ep_comm"}, {}, "set moe_token_dispatcher_type='alltoall'"),
    ({}, {"fp8_dispatch": True}, "FP8 dispatch scales blocks of 128 elements: hidden 32 is"),
    ({}, {"fp8_grad_dispatch": True}, "FP8 dispatch scales blocks of 128 elements: hidden 32 is"),
    ({"hidden_size": 640, "gpu": (9, 0)}, {"fp8_dispatch": True}, "FP8 over NVLink needs hidden"),
    ({"hidden_size": 128, "scales": "1"}, {"fp8_dispatch": True}, OTHER_SCALES),
    ({**BLOCKWISE, "scales": "1"}, {}, OTHER_SCALES),
    (
        {**BLOCKWISE, "te": "2.2.1"}, {},
        "--fp8-recipe blockwise with an old Transformer Engine (this is 2.2.1): it needs 2.3",
    ),
    (
        {"moe_grouped_gemm": True, "te": "1.13"}, {"overlap_wgrad": True},
        "--ep-overlap-wgrad with --moe-grouped-gemm and an old Transformer Engine (this is 1.13)",
    ),
    (
        {**BLOCKWISE, "gpu": (8, 0)}, {},
        f"{OLD_GPU} (--fp8-format on GPU, compute capability 8.0): FP8 begins with",
    ),
    (
        {"hidden_size": 512, "gpu": (8, 6)}, {"fp8_grad_dispatch": True},
        f"{OLD_GPU} (--ep-fp8-grad-dispatch on GPU, compute capability 8.6)",
    ),
    ({"fp16": True}, {"fp8_dispatch": True}, "--fp16 with FP8 on the wire (--ep-fp8-dispatch): "),
    (
        {"params_dtype": torch.float64}, {},
        "parameters or autocast that are not BF16, FP16 or FP32 (params_dtype=torch.float64)",
    ),
    (
        {"enable_autocast": True, "autocast_dtype": torch.float64}, {},
        "parameters or autocast that are not BF16, FP16 or FP32 (autocast_dtype=torch.float64)",
    ),
    (
        {"moe_router_topk": 40}, {},
        "--moe-router-topk x --expert-tensor-parallel-size above 32 (40 x 1)",
    ),
    (
        {"expert_tensor_parallel_size": 32}, {},
        "--moe-router-topk x --expert-tensor-parallel-size above 32 (2 x 32)",
    ),
    (
        {"num_moe_experts": 5000}, {},
        "--num-experts x --expert-tensor-parallel-size above 4096 (5000 x 1)",
    ),
    (
        {"overlap_moe_expert_parallel_comm": True}, {"overlap_wgrad": True},
        "--ep-overlap-wgrad with --overlap-moe-expert-parallel-comm (the 1F1B overlap): --delay-w",
    ),
    (
        {"overlap_dispatch_backward_with_experts_wgrad": True}, {},
        "--overlap-dispatch-backward-with-experts-wgrad: take",
    ),
    (
        {"cuda_graph_impl": "transformer_engine", "graphed": ["moe"]}, {},
        "CUDA graphs over the MoE layer (moe): ",
    ),
    ({"cuda_graph_impl": "local"}, {}, "CUDA graphs over the MoE layer (layer): "),
    (
        {"cuda_graph_impl": "local", "graphed": ["full_iteration"]}, {},
        "CUDA graphs over the MoE layer (full_iteration): ",
    ),
    (
        {
            **{"cuda_graph_impl": "transformer_engine", "graphed": ["moe"]},
            **{"moe_expert_capacity_factor": 1, "moe_pad_expert_input_to_capacity": True},
        },
        {"overlap_wgrad": True},
        "CUDA graphs of 'moe' with --ep-overlap-wgrad: gradients",
    ),
    (
        {"cuda_graph_impl": "transformer_engine", "graphed": ["moe_router"]},
        {"copy_engines": True},
        "CUDA graphs of 'moe_router' and 'moe_preprocess' with --ep-copy-engines (moe_router): row",
    ),
    (
        {"cuda_graph_impl": "local", "graphed": ["moe_router", "moe_preprocess"]}, {},
        "CUDA graphs of 'moe_preprocess' with cuda_graph_impl='local': take",
    ),
    (
        {
            "cuda_graph_impl": "transformer_engine", "moe_expert_capacity_factor": 1,
            "graphed": ["moe_router", "moe_preprocess"],
        }, {},
        "CUDA graphs of 'moe_preprocess' with --moe-expert-capacity-factor (1): take --ep-cap",
    ),
    (
        {"moe_expert_capacity_factor": 0.5}, {"capacity_factor": 2},
        "--ep-capacity-factor with --moe-expert-capacity-factor (0.5): take one",
    ),
    ({}, {"device_counts": True}, "--ep-device-counts without --ep-capacity-factor: somebody"),
    (
        {**BLOCKWISE}, {"device_counts": True, "capacity_factor": 1},
        "--ep-device-counts with FP8 experts (--fp8-format) (e4m3): on Hopper",
    ),
    (
        {"expert_tensor_parallel_size": 2}, {"device_counts": True, "capacity_factor": 1},
        "--ep-device-counts with --fp16, --expert-tensor-parallel-size, --add-bias-linear, or an "
        "activation beside SwiGLU's (--expert-tensor-parallel-size 2): leave",
    ),
    (
        {"overlap_moe_expert_parallel_comm": True}, {"device_counts": True, "capacity_factor": 1},
        "--ep-device-counts with --ep-overlap-wgrad or Megatron's 1F1B overlap: these",
    ),
    (
        {"no_grouped_mm": True}, {"device_counts": True, "capacity_factor": 1},
        "--ep-device-counts with a torch that has no grouped GEMM: it needs torch 2.8",
    ),
    (
        {**DIRECT_EXPERTS}, {"fp8_direct": True},
        "--ep-fp8-direct without --ep-fp8-dispatch: no rows",
    ),
    ({**DIRECT_EXPERTS, "fp8": None}, DIRECT, f"{NO_FP8_EXPERTS} (no --fp8-format): take --bf16"),
    (
        {**DIRECT_EXPERTS, "fp8_recipe": "delayed"}, DIRECT,
        f"{NO_FP8_EXPERTS} (--fp8-recipe delayed)",
    ),
    (
        {**DIRECT_EXPERTS, "moe_grouped_gemm": False}, DIRECT,
        f"{NO_FP8_EXPERTS} (no --moe-grouped-gemm)",
    ),
    (
        {**DIRECT_EXPERTS, "params_dtype": torch.float32}, DIRECT,
        f"{NO_FP8_EXPERTS} (params_dtype=torch.float32)",
    ),
    (
        {**DIRECT_EXPERTS}, {**DIRECT, "expert_alignment": 8},
        f"{OTHER_ROWS} (--ep-expert-alignment 8): leave",
    ),
    (
        {**DIRECT_EXPERTS, "first_last_layers_bf16": True}, DIRECT,
        f"{OTHER_ROWS} (first_last_layers_bf16): leave",
    ),
    (
        {
            **DIRECT_EXPERTS,
            **{"fine_grained_activation_offloading": True, "offload_modules": ["expert_fc1"]},
        },
        DIRECT,
        f"{OTHER_ROWS} (expert_fc1 in offload_modules): leave",
    ),
    (
        {**DIRECT_EXPERTS, "te": "2.19.1"}, DIRECT,
        "--ep-fp8-direct with an old Transformer Engine (this is 2.19.1): it needs 2.20",
    ),
    ({}, {"overflow": "warn"}, "--ep-overflow without --ep-capacity-factor: nothing"),
    ({"moe_latent_size": 16}, {}, "--moe-latent-size (16)"),
    ({"fp4": "e2m1"}, {}, "--fp4-format (e2m1)"),
    ({"transformer_impl": "inference_optimized"}, {}, "transformer_impl='inference_optimized'"),
]  # fmt: skip


def test_every_refusal_is_tested():
    from ep_comm.megatron.support import BY_CONFIG

    messages = [message for _, _, message in REFUSED]
    for refusal in BY_CONFIG:
        assert any(message.startswith(refusal.what) for message in messages), refusal.what


@pytest.mark.parametrize(("config", "options", "message"), REFUSED)
def test_what_is_not_there_is_refused_by_name(config, options, message):
    (answer,) = run_ranks(1, check_options, config, options, pool="megatron")
    assert answer.startswith((message, f"ep_comm does not support {message}"))


def check_options(rank: int, config: dict, options: dict) -> str:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.errors import EPError
    from ep_comm.megatron import EPOptions
    from ep_comm.megatron.support import check_supported

    transformer_config = make_config(Setup(ep=1), None)
    config = dict(config)
    monkeypatch = pytest.MonkeyPatch()
    pretend(monkeypatch, config.pop("scales", "0"), config.pop("te", None), config.pop("gpu", None))
    if config.pop("no_grouped_mm", False):
        monkeypatch.delattr(torch, "_grouped_mm")
        monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    if "cuda_graph_impl" in config:
        set_graphed_modules(transformer_config, config.pop("graphed", []))
    for name, value in config.items():  # after construction: Megatron refuses some by itself
        setattr(transformer_config, name, value)
    with pytest.raises(EPError) as caught:
        check_supported(transformer_config, EPOptions(**options))
    monkeypatch.undo()
    return str(caught.value)


def pretend(
    monkeypatch: pytest.MonkeyPatch, scales: str, te: str | None, gpu: tuple[int, int] | None
) -> None:
    """That this machine has such a Transformer Engine and such a GPU."""
    from ep_comm.megatron import support

    def version(package: str) -> str:
        if te is None:
            raise support.importlib.metadata.PackageNotFoundError(package)
        return te

    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", scales)
    monkeypatch.setattr(support.importlib.metadata, "version", version)
    if gpu is not None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")


@pytest.mark.parametrize(
    ("recipe", "warned"), [("blockwise", 0), ("delayed", 1), ("tensorwise", 1)]
)
def test_recipes_that_are_not_exact_with_fp8_dispatch(recipe, warned):
    (messages,) = run_ranks(1, warnings_of, recipe, pool="megatron")
    assert len(messages) == warned  # of two layers
    for message in messages:
        assert message.startswith(f"--ep-fp8-dispatch with --fp8-recipe {recipe}: ")
        assert "With --fp8-recipe blockwise they are" in message


def warnings_of(rank: int, recipe: str) -> list[str]:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron import EPOptions
    from ep_comm.megatron.support import check_supported

    config = make_config(Setup(ep=1, config=WIDE), None)
    config.fp8, config.fp8_recipe = "e4m3", recipe  # Megatron refuses them without TE
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            check_supported(config, EPOptions(fp8_dispatch=True))
    return [str(each.message) for each in caught if "--ep-fp8" in str(each.message)]


def forget_loss_scale() -> None:
    """Megatron keeps one of another shape from a backward pass outside of its schedules."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def set_graphed_modules(config, names: list[str]) -> None:
    """``--cuda-graph-modules``, or ``--cuda-graph-scope`` up to megatron-core 0.18."""
    from megatron.core.transformer import enums

    if hasattr(config, "cuda_graph_modules"):
        config.cuda_graph_modules = [enums.CudaGraphModule[name] for name in names]
    else:
        config.cuda_graph_scope = [enums.CudaGraphScope[name] for name in names]


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


def test_overlap_without_ddps_part_is_refused():
    with pytest.raises(RankFailure, match="delay_wgrad_compute=True"):
        run_ranks(2, train_with_plain_ddp, fresh=True)


def train_with_plain_ddp(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from megatron.core.distributed import DistributedDataParallelConfig

    original = DistributedDataParallelConfig.__init__

    def forget(self, *args, **kwargs):
        original(self, *args, **{**kwargs, "delay_wgrad_compute": False})

    DistributedDataParallelConfig.__init__ = forget
    train(rank, Setup(options=(("overlap_wgrad", True),)))


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


class DelayingLinear(torch.nn.Module):
    """Hands out and keeps its gradient's memory as Transformer Engine's delaying layers do."""

    fuse_wgrad_accumulation = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 2))
        self.weight.skip_backward_post_hook = True
        self.wgrad_store = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _DelayingFunction.apply(x, self.weight, self.wgrad_store)


class _DelayingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, store):
        ctx.save_for_backward(weight)
        ctx.store = store
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        ctx.store.append(torch.full_like(weight, torch.nan))  # not computed yet
        return grad @ weight, ctx.store[-1], None


def unfinished_gradients_are_left_alone(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron.wgrad import delay_weight_gradients

    experts = torch.nn.Sequential(DelayingLinear(), torch.nn.ReLU())
    x = torch.ones(4, 2, requires_grad=True)
    layer = experts[0]
    experts(x).sum().backward()
    assert layer.weight.grad.isnan().all(), "autograd copied it"
    delay_weight_gradients(experts)
    addresses = set()
    for _ in range(2):
        layer.weight.grad = None
        experts(x).sum().backward()
        addresses.add(layer.weight.grad.data_ptr())
    assert len(addresses) == 1, "autograd copied the placeholder"
    assert addresses.isdisjoint(grad.data_ptr() for grad in layer.wgrad_store)
    assert x.grad.eq(9).all()


def test_autograd_copies_no_unfinished_gradients():
    run_ranks(1, unfinished_gradients_are_left_alone, pool="megatron")


class StoringLinear(torch.nn.Module):
    """Keeps a queue of delayed gradients; some of Transformer Engine's raise where it is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, 2))
        self.wgrad_store = SimpleNamespace(context=queue.Queue())

    def backward_dw(self) -> None:
        self.wgrad_store.context.get_nowait()


def only_owed_gradients_are_computed(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron.wgrad import delay_weight_gradients

    frozen, trained = StoringLinear(), StoringLinear()
    compute = delay_weight_gradients(torch.nn.Sequential(frozen, trained))
    trained.wgrad_store.context.put("operands")
    compute()
    assert trained.wgrad_store.context.empty()


def test_frozen_layers_are_asked_for_no_gradient():
    run_ranks(1, only_owed_gradients_are_computed, pool="megatron")


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


def tokens_ahead_of_their_routing(rank: int) -> None:
    """What is begun before the router is what is dispatched behind it. (No copy engine is here.)"""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm import Buffer, EPConfig
    from ep_comm.megatron import EPOptions, destroy_buffers, dispatcher
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
        mock.patch.object(dispatcher, "EPConfig", without_copies),
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


def test_a_longer_padded_batch_makes_a_larger_buffer():
    run_ranks(2, padded_batches_that_grow, pool="megatron")


def test_a_longer_batch_makes_a_larger_buffer():
    run_ranks(2, batches_that_grow, pool="megatron")


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
    message = run_ranks(2, other_dispatcher_on_a_rank, fresh=True)[0]
    assert "rank 0 waited 2 s for rank 1 (phase: find the most tokens of a rank)" in message


def bounds_of_waits(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from ep_comm.megatron import EPOptions
    from ep_comm.megatron.dispatcher import _default_timeout
    from ep_comm.megatron.layer import moe_layers

    parallel_state(Setup())

    def bound(seconds: float, **options: float) -> float:
        config = make_config(Setup(), None)
        model = make_model(Setup(), config, EPOptions(**options))
        _, layer = next(iter(moe_layers(model)))
        group = dist.new_group([0, 1], timeout=timedelta(seconds=seconds))
        layer.token_dispatcher.tp_ep_group = group
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


def test_a_buffer_holds_the_first_tokens_of_all_ranks_and_is_made_anew():
    run_ranks(2, buffers_of_a_layer, pool="megatron")


def test_what_is_wrong_with_a_model_is_named():
    run_ranks(2, models_that_are_not_right, pool="megatron")


def printed_while_training(rank: int) -> str:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    ep_comm.megatron.destroy_buffers()  # of earlier tests: a new one prints the line
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train(rank, Setup(steps=2))
    return output.getvalue()


def printed_where_overlap_does_not_pay(rank: int) -> str:
    setup = Setup(steps=2, options=(("overlap_wgrad", True),))
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    ep_comm.megatron.destroy_buffers()
    output = io.StringIO()
    loss = "it would cost 201 µs"
    with (
        contextlib.redirect_stdout(output),
        mock.patch.object(ep_comm.Buffer, "overlap_loss", lambda *_: loss),
    ):
        train(rank, setup)
    return output.getvalue()


def test_the_line_says_where_overlap_does_not_pay():
    first, _ = run_ranks(2, printed_where_overlap_does_not_pay, pool="megatron")
    assert "wgrad overlap (a combine is not run beside GEMMs: it would cost 201 µs)" in first


def test_one_line_at_start_up_says_what_is_used():
    first, other = run_ranks(2, printed_while_training, pool="megatron")
    assert other == ""
    (line,) = first.splitlines()
    assert line.startswith(f"ep_comm {ep_comm.__version__}: reference over gloo, EP 2, 8 experts")
    for part in (
        "32 tokens of 32 a rank",
        "wire float32 out, float32 back, gradients float32 out, float32 back",
        "buffer 0 bytes",
        "off: nvlink backend (the group has no NCCL backend",
        "FP8 dispatch (not asked for)",
        "FP8 gradient dispatch (not asked for)",
        "FP8 direct (not asked for)",
        "wgrad overlap (not asked for)",
    ):
        assert part in line
