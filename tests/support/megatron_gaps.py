"""What Megatron-Core cannot do on a CPU with gloo, but does on GPUs: just enough of it for tests.

Nothing here concerns ep_comm; without it Megatron's own alltoall does not run in these settings.
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.distributed as dist


@functools.cache
def fill() -> None:
    """Change Megatron and torch.distributed in this process; call it after `cpu.enable`."""
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = False  # 0.16 takes its own wrappers for Transformer Engine
    _let_torch_norms_be_sequence_parallel()
    _let_gloo_move_unequal_parts()


def _let_torch_norms_be_sequence_parallel() -> None:
    """Without Transformer Engine or Apex, Megatron has torch's norms, and refuses them there.

    They lack one thing: the mark for the gradients that are to be summed over the TP ranks.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    def new(cls, config, *args, **kwargs):
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = original(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new


def _let_gloo_move_unequal_parts() -> None:
    """alltoall with expert tensor parallelism gathers, and reduce-scatters, unequal parts."""
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def any_all_gather(parts, mine, group=None, **kwargs):
        if len({part.shape for part in parts}) == 1:
            return all_gather(parts, mine, group=group, **kwargs)
        parts[dist.get_rank(group)].copy_(mine)
        for rank, part in enumerate(parts):
            dist.broadcast(part, group_src=rank, group=group)

    def any_reduce_scatter(output, parts, group=None, **kwargs):
        if len({part.shape for part in parts}) == 1:
            return reduce_scatter(output, parts, group=group, **kwargs)
        for rank, part in enumerate(parts):
            total = part.clone()
            dist.all_reduce(total, group=group)
            if rank == dist.get_rank(group):
                output.copy_(total)

    dist.all_gather, dist.reduce_scatter = any_all_gather, any_reduce_scatter


def delay_weight_gradients(chunk: torch.nn.Module) -> None:
    """Let routed experts of Megatron's own linear layers delay their weight gradients.

    Transformer Engine's layers do, all of them. Others of Megatron's are asked for it in vain here.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from ep_comm.megatron.wgrad import DelayedWeightGradient

    for name, module in chunk.named_modules():
        if not isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            continue
        if ".experts." in name:
            DelayedWeightGradient(module)
        else:
            module.backward_dw = lambda: None


@functools.cache
def attention() -> type[torch.nn.Module]:
    """Megatron's own attention, with context parallelism and with the heads of MLA.

    Only Transformer Engine's has these; this one gathers all keys and values.
    """
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Attention(DotProductAttention):
        def __init__(
            self, config, *args, pg_collection, k_channels=None, v_channels=None, **kwargs
        ):
            plain = copy.copy(config)
            plain.context_parallel_size = 1
            plain.kv_channels = v_channels or config.kv_channels
            super().__init__(plain, *args, pg_collection=pg_collection, **kwargs)
            self.cp_group = pg_collection.cp

        def forward(self, query, key, value, attention_mask, **kwargs):
            key, value = (
                gather_from_sequence_parallel_region(tensor, group=self.cp_group)
                for tensor in (key, value)
            )
            return super().forward(query, key, value, attention_mask, **kwargs)

    return Attention
