"""Floating-point operations of a training step, and how many a GPU can do."""

from __future__ import annotations

from ep_comm.pretrain.config import PretrainConfig

# Dense BF16 tensor-core peaks in TFLOP/s, from NVIDIA's data sheets, by part of the GPU's name.
_PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "GB200": 2500.0,
    "B200": 2250.0,
}


def peak_tflops(gpu_name: str) -> float | None:
    """Return a GPU's dense BF16 peak in TFLOP/s; None where it is not known."""
    return next((peak for name, peak in _PEAK_TFLOPS.items() if name in gpu_name), None)


def flops_per_token(config: PretrainConfig, padded_vocab_size: int) -> float:
    """Return the operations that a token costs, forward and backward.

    These are the GEMMs of attention, routed and shared experts and output layer, and the products
    of attention below its diagonal. Multiplication and addition count as two; the backward pass
    is twice the forward pass. Recomputation does not count.
    """
    head_size = config.kv_channels or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * head_size
    keys = (config.num_query_groups or config.num_attention_heads) * head_size
    hidden, length = config.hidden_size, config.seq_length
    attention = hidden * (2 * queries + 2 * keys) + queries * length  # of 2 products, one half
    expert_sizes = config.moe_router_topk * config.moe_ffn_hidden_size + (
        config.moe_shared_expert_intermediate_size or 0
    )
    experts = 3 * hidden * expert_sizes  # gate, up and down
    multiplications = config.num_layers * (attention + experts) + hidden * padded_vocab_size
    return 3.0 * 2.0 * multiplications
