"""A tiny Megatron GPT with MoE layers, built and trained for a few steps inside one rank."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
import torch.distributed as dist

import ep_comm.megatron.cpu

VOCAB, SEQ, BATCH = 64, 16, 2

_expert_parallel_size: int | None = None  # what this process's groups are for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """One training run; `config` overrides the TransformerConfig, `options` are EPOptions."""

    dispatcher: str = "deepep"
    config: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    ep: int = 2
    steps: int = 4
    microbatches: int = 1
    bf16: bool = False
    dist_opt: bool = False
    overlap_grad_reduce: bool = False
    dense_first: bool = False
    through_install: bool = False


def train(rank: int, setup: Setup) -> dict[str, Any]:
    """Train and return losses, the gradients of the last step, and what the meter saw."""
    warnings.filterwarnings("ignore")
    ep_comm.megatron.cpu.enable()
    from functools import partial

    from megatron.core import parallel_state as ps
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from ep_comm.megatron import EPOptions, MoEMeter, check_model, check_weight_gradients

    parallel_state(setup)
    options = EPOptions(**dict(setup.options))
    config = make_config(setup, finalize_model_grads)
    model = make_model(setup, config, options)
    if setup.dispatcher == "deepep":
        check_model([model])
    meter = MoEMeter([model])
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            clip_grad=1.0,
            bf16=setup.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=setup.dist_opt,
        ),
        [model],
    )
    generator = torch.Generator().manual_seed(11 + ps.get_data_parallel_rank())
    mask = torch.triu(torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool), 1)
    positions = torch.arange(SEQ)[None].expand(BATCH, SEQ)

    def forward_step(_, chunk):
        tokens = torch.randint(0, VOCAB, (BATCH, 1), generator=generator) + torch.arange(SEQ + 1)
        tokens = tokens % VOCAB
        output = chunk(tokens[:, :-1], positions, mask, labels=tokens[:, 1:].contiguous())

        def loss_func(losses):
            loss = losses.float().mean()
            mean = loss.detach().clone()
            dist.all_reduce(mean, group=ps.get_data_parallel_group())
            return loss, {"loss": mean / ps.get_data_parallel_world_size()}

        return output, partial(loss_func)

    losses, metrics = [], {}
    for _ in range(setup.steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[model],
            num_microbatches=setup.microbatches,
            seq_length=SEQ,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        losses.append(float(torch.stack([result["loss"] for result in results]).mean()))
        check_weight_gradients([model])
        gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}
        metrics = meter.step()
        optimizer.step()
    return dict(
        losses=losses,
        gradients={name: grad.float().numpy() for name, grad in gradients.items()},
        metrics=metrics,
    )


def parallel_state(setup: Setup) -> None:
    """Megatron's process groups, micro-batches and seeds."""
    from megatron.core import parallel_state as ps
    from megatron.core.num_microbatches_calculator import (
        init_num_microbatches_calculator,
        unset_num_microbatches_calculator,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from ep_comm.megatron import destroy_buffers

    global _expert_parallel_size
    if setup.ep != _expert_parallel_size:  # each new set of gloo groups leaves its threads behind
        destroy_buffers()
        ps.destroy_model_parallel()
        ps.initialize_model_parallel(expert_model_parallel_size=setup.ep)
        _expert_parallel_size = setup.ep
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(0, None, setup.microbatches * BATCH, BATCH, 1)
    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5)


def make_config(setup: Setup, finalize_model_grads):
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if setup.bf16 else torch.float32
    settings = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=48,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=48,
        moe_token_dispatcher_type=(
            "alltoall" if setup.dispatcher == "deepep" else setup.dispatcher
        ),
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        expert_model_parallel_size=setup.ep,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bf16=setup.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        finalize_model_grads_func=finalize_model_grads,
    )
    if setup.dense_first:
        settings["moe_layer_freq"] = [0, 1]
    return TransformerConfig(**{**settings, **dict(setup.config)})


def make_model(setup: Setup, config, options):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )

    from ep_comm.megatron import install, use_ep_comm

    if setup.dense_first:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    else:
        spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    if setup.through_install:
        install(options)
    elif setup.dispatcher == "deepep":
        spec = use_ep_comm(spec, options)
    model = GPTModel(config, spec, VOCAB, SEQ, share_embeddings_and_output_weights=False)
    if setup.bf16:
        model = model.bfloat16()
    delay = options.overlap_wgrad and not setup.through_install
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=setup.dist_opt,
            overlap_grad_reduce=setup.overlap_grad_reduce,
            bucket_size=4096 if setup.overlap_grad_reduce else None,
            delay_wgrad_compute=delay,
        ),
        model,
    )
