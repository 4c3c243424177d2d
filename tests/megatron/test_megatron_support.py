"""What of Megatron's configurations and of machines is refused, or warned of, by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from megatron_cases import WIDE, set_graphed_modules
from megatron_model import Setup, make_config
from ranks import run_ranks

pytest.importorskip("megatron.core")


BLOCKWISE = {"fp8": "e4m3", "fp8_recipe": "blockwise"}


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
