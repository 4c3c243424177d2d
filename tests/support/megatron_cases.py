"""Small Megatron models for tests: their features, and how close two runs have to be."""

from __future__ import annotations

from megatron_model import Setup, train
from ranks import run_ranks

WIDE = (("hidden_size", 128),)
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
