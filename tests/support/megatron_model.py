"""A tiny Megatron GPT with MoE layers, built and trained for a few steps inside one rank."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import megatron_gaps
import numpy as np
import torch
import torch.distributed as dist

import ep_comm.megatron.cpu

VOCAB, SEQ, BATCH = 64, 16, 2

_parallel_sizes: dict[str, int] = {}  # what this process's groups are for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """One training run; `config` overrides the TransformerConfig, `options` are EPOptions.

    `tp` above 1 means sequence parallelism too, as Megatron wants it for MoE. `vpp` is the number
    of model chunks a pipeline stage. `te` takes Transformer Engine's modules, on GPUs; `fused` has
    them accumulate gradients as the example does. `frozen` matches the names of parameters that are
    not trained.
    """

    dispatcher: str = "deepep"
    config: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    ep: int = 2
    tp: int = 1
    etp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    steps: int = 4
    microbatches: int = 1
    bf16: bool = False
    fp16: bool = False
    dist_opt: bool = False
    overlap_grad_reduce: bool = False
    dense_first: bool = False
    through_install: bool = False
    te: bool = False
    fused: bool = False
    frozen: str | None = None
    seq: int = SEQ
    lr: float = 1e-2


def train(rank: int, setup: Setup) -> dict[str, Any]:
    """Train and return losses, the gradients of the last step, and what the meter saw.

    Losses are those of the last pipeline stage, and empty on the others.
    """
    warnings.filterwarnings("ignore")
    if ep_comm.megatron.cpu.enable():
        megatron_gaps.fill()

    from megatron.core import parallel_state as ps
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from ep_comm.megatron import EPOptions, MoEMeter, check_model, check_weight_gradients

    parallel_state(setup)
    options = EPOptions(**dict(setup.options))
    config = make_config(setup, finalize_model_grads)
    model = make_model(setup, config, options)
    num_moe_layers = check_model(model) if setup.dispatcher == "deepep" else None
    meter = MoEMeter(model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=setup.lr,
            clip_grad=1.0,
            bf16=setup.bf16,
            fp16=setup.fp16,
            loss_scale=128.0,  # of FP16
            params_dtype=config.params_dtype,
            use_distributed_optimizer=setup.dist_opt,
        ),
        model,
    )
    if setup.fp16:
        config.grad_scale_func = optimizer.scale_loss
    if setup.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync if setup.vpp > 1 else no_sync[0]

    def forward_step(iterator, chunk, return_schedule_plan=False):
        run = chunk.build_schedule_plan if return_schedule_plan else chunk
        output = run(*next(iterator))

        def loss_func(losses):
            loss = losses.float().mean()
            mean = loss.detach().clone()
            dist.all_reduce(mean, group=ps.get_data_parallel_group(with_context_parallel=True))
            world = ps.get_data_parallel_world_size(with_context_parallel=True)
            return loss, {"loss": mean / world}

        return output, partial(loss_func)

    iterators = [batches(setup) for _ in model]
    losses, metrics, balance = [], {}, ()
    for _ in range(setup.steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if setup.vpp > 1 else iterators[0],
            model=model,
            num_microbatches=setup.microbatches,
            seq_length=setup.seq,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        if results:
            losses.append(float(torch.stack([result["loss"] for result in results]).mean()))
        check_weight_gradients(model)
        gradients = {
            f"{i}.{name}": p.main_grad.clone()
            for i, chunk in enumerate(model)
            for name, p in chunk.named_parameters()
            if p.requires_grad
        }
        metrics, balance = meter.step(), meter.balance
        optimizer.step()
    return dict(
        metrics_of_nothing=meter.step(),
        losses=losses,
        gradients={name: grad.float().cpu().numpy() for name, grad in gradients.items()},
        metrics=metrics,
        balance=balance,
        num_moe_layers=num_moe_layers,
    )


def batches(setup: Setup) -> Iterator[tuple]:
    """(tokens, positions, attention mask, _, labels) of this rank, without end.

    Equal on the ranks of a data-parallel replica, but for the part of the sequence that a
    context-parallel rank has.
    """
    from megatron.core import parallel_state as ps

    generator = torch.Generator().manual_seed(11 + ps.get_data_parallel_rank())
    mine = torch.arange(setup.seq).chunk(setup.cp)[ps.get_context_parallel_rank()]
    masked = (torch.arange(setup.seq)[None] > mine[:, None])[None, None].cuda()
    positions = mine[None].expand(BATCH, -1).cuda()
    for _ in itertools.count():
        first = torch.randint(0, VOCAB, (BATCH, 1), generator=generator)
        tokens = (first + torch.arange(setup.seq + 1)) % VOCAB
        labels = tokens[:, mine + 1].contiguous()
        yield tokens[:, mine].cuda(), positions, masked, None, labels.cuda()


def parallel_state(setup: Setup) -> None:
    """Megatron's process groups, micro-batches and seeds."""
    from megatron.core import parallel_state as ps
    from megatron.core.num_microbatches_calculator import (
        init_num_microbatches_calculator,
        unset_num_microbatches_calculator,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from ep_comm.megatron import destroy_buffers

    global _parallel_sizes
    sizes = dict(
        expert_model_parallel_size=setup.ep,
        tensor_model_parallel_size=setup.tp,
        expert_tensor_parallel_size=setup.etp,
        pipeline_model_parallel_size=setup.pp,
        virtual_pipeline_model_parallel_size=setup.vpp if setup.vpp > 1 else None,
        context_parallel_size=setup.cp,
    )
    if sizes != _parallel_sizes:  # each new set of gloo groups leaves its threads behind
        destroy_buffers()
        ps.destroy_model_parallel()
        ps.initialize_model_parallel(**sizes)
        _parallel_sizes = sizes
    forget_logged_losses()
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(0, None, setup.microbatches * BATCH, BATCH, 1)
    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5)


def forget_logged_losses() -> None:
    """Megatron collects each layer's balancing loss, for as many layers as the first model had."""
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):  # 0.19
        moe_utils.get_moe_metrics_tracker().metrics.clear()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()


def make_config(setup: Setup, finalize_model_grads):
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    dtype = torch.float16 if setup.fp16 else torch.bfloat16 if setup.bf16 else torch.float32
    if setup.te:  # with Megatron's deterministic mode it wants this one too
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
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
        tensor_model_parallel_size=setup.tp,
        sequence_parallel=setup.tp > 1,
        expert_tensor_parallel_size=setup.etp,
        pipeline_model_parallel_size=setup.pp,
        virtual_pipeline_model_parallel_size=setup.vpp if setup.vpp > 1 else None,
        # In one batch of messages two stages would take each other's gradients for activations.
        overlap_p2p_comm=setup.vpp > 1,
        batch_p2p_comm=setup.vpp == 1,
        context_parallel_size=setup.cp,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not setup.te,
        moe_grouped_gemm=setup.te,
        deterministic_mode=setup.te,
        gradient_accumulation_fusion=False,
        bf16=setup.bf16,
        fp16=setup.fp16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        finalize_model_grads_func=finalize_model_grads,
    )
    if setup.dense_first:
        settings["moe_layer_freq"] = [0, 1]
    settings.update(setup.config)
    config_class = MLATransformerConfig if "q_lora_rank" in settings else TransformerConfig
    return config_class(**settings)


def make_model(setup: Setup, config, options) -> list:
    """The model chunks of this rank."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from ep_comm.megatron import install

    if setup.through_install:
        install(options)
    ours = options.overlap_wgrad and not setup.through_install
    megatrons = getattr(config, "overlap_dispatch_backward_with_experts_wgrad", False)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=setup.dist_opt,
        overlap_grad_reduce=setup.overlap_grad_reduce,
        bucket_size=4096 if setup.overlap_grad_reduce else None,
        fp8_param_gather=config.fp8_param,
        grad_reduce_in_fp32=setup.te,
        delay_wgrad_compute=ours or megatrons or config.delay_wgrad_compute,
    )
    chunks = []
    for i in range(setup.vpp):
        chunk = gpt_model(setup, config, options, i if setup.vpp > 1 else None)
        if setup.fused:
            from ep_comm.pretrain.model import fuse_accumulation

            fuse_accumulation(chunk)
        if setup.te:
            chunk.cuda()  # DDP would bring along only what is trainable
        elif config.delay_wgrad_compute:
            megatron_gaps.delay_weight_gradients(chunk)
        for name, parameter in chunk.named_parameters():
            if setup.frozen and re.search(setup.frozen, name):
                parameter.requires_grad_(False)
        if setup.bf16 or setup.fp16:
            chunk = chunk.to(config.params_dtype)
        chunks.append(DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0))
    return chunks


def gpt_model(setup: Setup, config, options, vp_stage: int | None):
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
        get_gpt_mtp_block_spec,
    )

    from ep_comm.megatron import use_ep_comm

    if setup.te:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=True
        )
    elif setup.dense_first:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=False,
            multi_latent_attention=config.multi_latent_attention,
        )
    if not setup.te and (setup.cp > 1 or config.multi_latent_attention):
        spec.submodules.self_attention.submodules.core_attention = megatron_gaps.attention()
    if setup.dispatcher == "deepep" and not setup.through_install:
        spec = use_ep_comm(spec, options)
    mtp_block_spec = None
    if config.mtp_num_layers:
        mtp_block_spec = get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=setup.te, vp_stage=vp_stage
        )
    return GPTModel(
        config,
        spec,
        VOCAB,
        setup.seq,
        pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp_block_spec,
        vp_stage=vp_stage,
    )


def assert_close_runs(ours: list[dict], stock: list[dict], tolerance: dict) -> None:
    """Losses and gradients of all ranks; gradients relative to the largest of each parameter.

    Names every gradient that is too far off, by how much its worst element is, and by how much all
    of it (Euclidean norms).
    """
    far = []
    for rank, (mine, theirs) in enumerate(zip(ours, stock, strict=True)):
        np.testing.assert_allclose(mine["losses"], theirs["losses"], **tolerance)
        assert mine["gradients"].keys() == theirs["gradients"].keys()
        for name, gradient in mine["gradients"].items():
            wanted = theirs["gradients"][name]
            scale = max(float(np.abs(wanted).max(initial=0.0)), 1e-6)
            if not np.allclose(gradient / scale, wanted / scale, **tolerance):
                off = gradient - wanted
                worst = np.abs(off).max() / scale
                norm = np.linalg.norm(off) / max(np.linalg.norm(wanted), 1e-6)
                far.append(f"rank {rank}: {name}: worst element {worst:.2e}, norm {norm:.2e}")
    assert not far, "\n".join([f"off by more than {tolerance}:", *far])


def assert_same_bits(first: list[dict], second: list[dict]) -> None:
    """Losses and gradients of all ranks."""
    for a, b in zip(first, second, strict=True):
        assert a["losses"] == b["losses"]
        assert a["gradients"].keys() == b["gradients"].keys()
        for name, gradient in a["gradients"].items():
            assert np.array_equal(gradient, b["gradients"][name]), name
