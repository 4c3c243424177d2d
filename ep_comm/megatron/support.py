"""What the Megatron integration refuses by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ep_comm._native.header import EP_MAX_EXPERTS, EP_MAX_TOPK
from ep_comm.checks import ROW_DTYPES
from ep_comm.errors import EPArgumentError, EPUnsupportedError
from ep_comm.megatron.fp8_support import check_fp8, check_transformer_engine
from ep_comm.megatron.options import EPOptions

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def check_supported(config: TransformerConfig, options: EPOptions) -> None:
    """Raise for what this version cannot do, before anything is built.

    Raises:
        EPUnsupportedError: A Megatron feature that does not work with this dispatcher yet.
        EPArgumentError: A setting that contradicts another one.
    """
    for flag, value, why in _refused(config):
        if value:
            raise EPUnsupportedError(
                f"--moe-token-dispatcher deepep does not support {flag} yet{why}"
            )
    if config.moe_token_dispatcher_type != "alltoall":
        raise EPArgumentError(
            "set moe_token_dispatcher_type='alltoall' in the TransformerConfig (Megatron "
            "validates other features against it, and ep_comm then replaces the dispatcher); "
            f"got {config.moe_token_dispatcher_type!r}"
        )
    check_fp8(config, options)
    check_transformer_engine(config, options)


def check_one_node(ranks: Sequence[int]) -> None:
    """Raise where the GPUs that share a layer's experts are not on one node.

    `ranks` are the global ranks of the group.
    Nodes are known from LOCAL_WORLD_SIZE, which torchrun and our launcher set; without it nothing
    is checked, and the start-up line names the reference backend. On CPU that one works anywhere.

    Raises:
        EPUnsupportedError: Names the flag.
    """
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if not ranks_per_node or not torch.cuda.is_available():
        return
    num_nodes = len({rank // ranks_per_node for rank in ranks})
    if num_nodes > 1:
        raise EPUnsupportedError(
            f"--expert-model-parallel-size is too large: the {len(ranks)} ranks that share a "
            f"layer's experts would span {num_nodes} nodes of {ranks_per_node} ranks, and ep_comm "
            "does not work between nodes yet"
        )


def _refused(config: TransformerConfig) -> list[tuple[str, object, str]]:
    """(flag, whether it is set, reason). docs/megatron.md lists the same."""
    shards = config.expert_tensor_parallel_size or 1
    sharded = f" with --expert-tensor-parallel-size {shards}" if shards > 1 else ""
    limit = ": their product is at most" if shards > 1 else ": at most"
    graphed = _graphed_modules(config)
    types = ": tokens travel as BF16 or FP32, so take --bf16"
    return [
        ("--fp16", config.fp16, types),
        (f"params_dtype={config.params_dtype}", config.params_dtype not in ROW_DTYPES, types),
        (
            f"autocast_dtype={config.autocast_dtype}",
            config.enable_autocast and config.autocast_dtype not in ROW_DTYPES,
            types,
        ),
        *(
            (f"{flag} {value}{sharded}", value * shards > maximum, f"{limit} {maximum}")
            for flag, value, maximum in (
                ("--moe-router-topk", config.moe_router_topk, EP_MAX_TOPK),
                ("--num-experts", config.num_moe_experts, EP_MAX_EXPERTS),
            )
        ),
        (
            "--moe-pad-expert-input-to-capacity",
            config.moe_pad_expert_input_to_capacity,
            ": dropless routing and dropping without padding work",
        ),
        (
            "--overlap-moe-expert-parallel-comm (the 1F1B overlap)",
            getattr(config, "overlap_moe_expert_parallel_comm", False),
            ": EPOptions(overlap_wgrad=True) hides the backward combine without it",
        ),
        (
            "--overlap-dispatch-backward-with-experts-wgrad",
            getattr(config, "overlap_dispatch_backward_with_experts_wgrad", False),
            ": use EPOptions(overlap_wgrad=True) instead",
        ),
        (
            "--delay-wgrad-compute for the whole model",
            config.delay_wgrad_compute,
            ": EPOptions(overlap_wgrad=True) delays the routed experts' alone",
        ),
        (
            "CUDA graphs over the MoE layer",
            graphed is not None and (not graphed or graphed & {"full_iteration", "moe"}),
            ": token counts are host values; 'attn', 'mlp' and 'moe_router' are left to Megatron",
        ),
        (
            "CUDA graphs of 'moe_preprocess'",
            graphed is not None and "moe_preprocess" in graphed,
            ": leave it out, and take cuda_graph_impl='transformer_engine' for 'moe_router' alone",
        ),
        ("--moe-latent-size", getattr(config, "moe_latent_size", None), ""),
        ("--fp4-format", getattr(config, "fp4", None), ""),
        (
            "transformer_impl='inference_optimized'",
            getattr(config, "transformer_impl", None) == "inference_optimized",
            "",
        ),
    ]


def _graphed_modules(config: TransformerConfig) -> set[str] | None:
    """Names of the modules under CUDA graphs; empty for all of the model, None without graphs."""
    if getattr(config, "cuda_graph_impl", "none") == "none":
        return None
    modules = getattr(config, "cuda_graph_modules", None)  # megatron-core 0.19; before: scope
    return {module.name for module in modules or getattr(config, "cuda_graph_scope", None) or ()}
