"""The training loop's functions."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from .global_vars import get_args, get_wandb_writer


def setup_model_and_optimizer(model_type, model_provider_func):
    args = get_args()
    model = model_provider_func()
    model.config.finalize_model_grads_func = finalize_model_grads
    model = [DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)]
    config = OptimizerConfig(optimizer="adam", lr=args.lr, params_dtype=torch.float32)
    return model, get_megatron_optimizer(config, model), SimpleNamespace()


def train_step(
    forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config,
    forward_backward_func, iteration=None,
):  # fmt: skip
    args = get_args()
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    results = forward_backward_func(
        forward_step_func=forward_step_func,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=get_num_microbatches(),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=False,
    )
    _, grad_norm, _ = optimizer.step()
    losses = torch.stack([result["lm loss"] for result in results]).sum(0)
    dist.all_reduce(losses, group=parallel_state.get_data_parallel_group())
    return {"lm loss": losses[0] / losses[1]}, 0, False, False, None, grad_norm, None, None


def training_log(
    loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag,
    skipped_iter, grad_norm, params_norm, num_zeros_in_grad, max_attention_logit,
    pg_collection=None, is_first_iteration=False,
):  # fmt: skip
    if wandb := get_wandb_writer():
        wandb.log({"grad-norm": float(grad_norm)}, iteration)
    return report_memory_flag


def save_checkpoint(*args, **kwargs):
    raise NotImplementedError("the stand-in writes no checkpoint")


def evaluate(forward_step_func, data_iterator, model, process_non_loss_data_func, config):
    raise NotImplementedError("the stand-in does not evaluate")
