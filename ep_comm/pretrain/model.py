"""The model, its optimizer and its learning-rate schedule, built from Megatron-Core's parts."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any, TypeVar

import megatron.core
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import is_te_min_version

from ep_comm import megatron as ep_megatron
from ep_comm.errors import name_settings
from ep_comm.job.exits import UserError
from ep_comm.job.start import agree
from ep_comm.megatron.layer import moe_layers
from ep_comm.megatron.names import STOCK
from ep_comm.megatron.options import flag_of
from ep_comm.numeric import round_up
from ep_comm.pretrain.config import PretrainConfig
from ep_comm.pretrain.graphs import LayerGraphs, graph_settings, hooks_for_graphs

C = TypeVar("C")

NEEDS_TRANSFORMER_ENGINE = (
    *("moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion"),
    *("fp8_format", "fp8_param_gather", "moe_router_padding_for_fp8"),
    *("gradient_accumulation_fusion", "delay_wgrad_compute"),
    "cuda_graph_modules",
)


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What a step changes, and a checkpoint holds."""

    config: TransformerConfig
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    graphs: LayerGraphs


def build(config: PretrainConfig, vocab_size: int, device: torch.device) -> Trainee:
    """Build everything on this rank, with the same weights for the same seed.

    A further call in the same process uses the process groups of the first one.

    Raises:
        UserError: Megatron-Core or ep_comm refuses the configuration.
    """
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=config.expert_model_parallel_size
        )
    torch.manual_seed(config.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(
        config.seed, te_rng_tracker=bool(config.cuda_graph_modules), force_reset_rng=True
    )

    transformer_config = agree(lambda: _transformer_config(config))
    spec = agree(lambda: _layer_spec(config))
    model = agree(lambda: _gpt_model(config, transformer_config, spec, vocab_size, device))
    optimizer = get_megatron_optimizer(
        _configuration(
            OptimizerConfig,
            config,
            params_dtype=transformer_config.params_dtype,
            fp8_recipe=config.fp8_recipe if config.fp8_format else None,
        ),
        [model],
    )
    transformer_config.finalize_model_grads_func = finalize_model_grads
    transformer_config.grad_scale_func = optimizer.scale_loss
    if config.overlap_grad_reduce:
        # Only the last microbatch's gradients are reduced.
        transformer_config.no_sync_func = model.no_sync
    return Trainee(
        config=transformer_config,
        model=model,
        optimizer=optimizer,
        scheduler=_scheduler(config, optimizer),
        graphs=LayerGraphs(config, model, optimizer),
    )


def slow_backend(trainee: Trainee) -> str | None:
    """Return why ep_comm has only its reference backend on a machine with GPUs.

    None if it has a faster one, or no dispatch has made a buffer yet.
    """
    if not torch.cuda.is_available():
        return None
    for _, layer in moe_layers([trainee.model]):
        buffer = getattr(layer.token_dispatcher, "buffer", None)
        if buffer is not None and buffer.passed_over:
            reasons = "; ".join(f"{name}: {why}" for name, why in buffer.passed_over.items())
            return (
                f"ep_comm runs on its reference backend, which is slow ({reasons}). "
                "ep-comm doctor says what this machine has"
            )
    return None


def padded_vocab_size(vocab_size: int) -> int:
    """Return the rows of the output layer: whole tiles for its GEMM."""
    return round_up(vocab_size, 128)


def gather_parameters(trainee: Trainee) -> None:
    """Complete the parameters after a step, for whoever reads them before a forward pass.

    With ``overlap_param_gather`` a rank has updated its own share, and that pass would gather the
    rest.
    """
    if trainee.model.ddp_config.overlap_param_gather:
        trainee.model.start_param_sync(force_sync=True)


def have_transformer_engine() -> bool:
    """Return whether Transformer Engine can be used: it is installed, and there is a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def _transformer_config(config: PretrainConfig) -> TransformerConfig:
    on_cpu = not torch.cuda.is_available()
    fused = have_transformer_engine()
    for key in NEEDS_TRANSFORMER_ENGINE:
        if getattr(config, key) and not fused:
            flag = key.replace("_", "-")
            without = f"--no-{flag}" if getattr(config, key) is True else f"no --{flag}"
            raise UserError(f"--{flag} needs a GPU and Transformer Engine; here: {without}")
    check_megatrons_overlap(config)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    full_recompute = config.recompute_granularity == "full"
    try:
        return _configuration(
            TransformerConfig,
            config,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            num_moe_experts=config.num_experts,
            ffn_hidden_size=config.moe_ffn_hidden_size,  # of dense layers; there are none
            moe_router_dtype="fp32",
            # Megatron validates other features against its own dispatchers' names; ep_comm's
            # takes the place of alltoall in the layer spec.
            moe_token_dispatcher_type=(
                STOCK if config.uses_ep_comm else config.moe_token_dispatcher
            ),
            recompute_method="uniform" if full_recompute else None,
            recompute_num_layers=1 if full_recompute else None,
            fp8=config.fp8_format,
            fp8_param=config.fp8_param_gather,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            use_cpu_initialization=on_cpu,
            bias_activation_fusion=fused,
            bias_dropout_fusion=fused,
            apply_rope_fusion=fused,
            # Megatron would ask for Apex on behalf of its own layers: see fuse_accumulation.
            gradient_accumulation_fusion=False,
            **graph_settings(config),
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"megatron-core refuses the configuration: {error}") from None


def _configuration(megatrons: type[C], config: PretrainConfig, **others: Any) -> C:
    """Make one of Megatron's configurations: of our keys of the same name, and of `others`."""
    theirs = {each.name for each in dataclasses.fields(megatrons)}  # type: ignore[arg-type]
    same = {key: getattr(config, key) for key in PretrainConfig.model_fields if key in theirs}
    return megatrons(**{**same, **others})


def check_megatrons_overlap(config: PretrainConfig) -> None:
    """Refuse Megatron's own overlap where it cannot work.

    Raises:
        UserError: Megatron-Core or Transformer Engine is too old for it.
    """
    key = "overlap_dispatch_backward_with_experts_wgrad"
    if not getattr(config, key):
        return
    flag = "--" + key.replace("_", "-")
    if not hasattr(TransformerConfig, key):
        version = megatron.core.__version__
        raise UserError(f"{flag} needs megatron-core 0.18 or newer, this is {version}")
    # What Megatron asks for where DDP is to reduce delayed gradients during the backward pass.
    if not is_te_min_version("2.8.0"):
        raise UserError(f"{flag} needs Transformer Engine 2.8 or newer")


def _layer_spec(config: PretrainConfig) -> ModuleSpec:
    if have_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_experts,
            moe_grouped_gemm=False,
            qk_layernorm=config.qk_layernorm,
            normalization="RMSNorm",
        )
    if config.uses_ep_comm:
        spec = ep_megatron.use_ep_comm(spec, config.ep_options)
        name_settings(flag_of)
    return spec


def _gpt_model(
    config: PretrainConfig,
    transformer_config: TransformerConfig,
    spec: ModuleSpec,
    vocab_size: int,
    device: torch.device,
) -> DistributedDataParallel:
    model = GPTModel(
        transformer_config,
        spec,
        vocab_size=padded_vocab_size(vocab_size),
        max_sequence_length=config.seq_length,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        share_embeddings_and_output_weights=False,
    ).to(device)
    if config.gradient_accumulation_fusion:
        fuse_accumulation(model)
    if config.bf16:
        model = Float16Module(transformer_config, model)
    ddp_config = _configuration(
        DistributedDataParallelConfig,
        config,
        grad_reduce_in_fp32=True,
        # Without it DDP takes the experts' gradients when backward has gone through them, which is
        # before any of the overlaps has computed them.
        delay_wgrad_compute=config.overlap_dispatch_backward_with_experts_wgrad
        or config.delay_wgrad_compute
        or config.ep_options.overlap_wgrad,
    )
    with hooks_for_graphs(config):
        model = DistributedDataParallel(transformer_config, ddp_config, model)
    if config.uses_ep_comm:
        ep_megatron.check_model([model])
    return model


def fuse_accumulation(model: torch.nn.Module) -> None:
    """Have Transformer Engine's GEMMs add weight gradients to DDP's buffers.

    Megatron's own layers, here the output layer, would need Apex for that.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]  # no submodule


def _scheduler(config: PretrainConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    # Megatron counts the schedule in samples.
    samples = config.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters * samples,
        lr_decay_steps=config.decay_iters * samples,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.decay_iters * samples,
        wd_incr_style="constant",
    )
