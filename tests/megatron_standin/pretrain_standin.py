"""Stands in for Megatron-LM's pretraining scripts in tests of the launcher: a few steps on CPU.

It knows nothing of ep_comm. Arguments, model building, training steps and logging are those of
``megatron.training``: the wheel's where it has them (0.18 and later), else `training` beside this
file. What it wrote itself is what those scripts get from functions that ask for a GPU.

The last rank leaves losses and dispatchers in ``result.json`` below --save.
"""

import json
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import initialize_rerun_state_machine
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import get_model_config
from megatron.training import training
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.global_vars import get_args, get_timers


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, **_):
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    spec = get_gpt_layer_local_spec(num_experts=args.num_experts, moe_grouped_gemm=False)
    return GPTModel(
        config,
        spec,
        args.padded_vocab_size,
        args.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type=args.position_embedding_type,
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )


def batches(args):
    """Rows that count upwards from a random number."""
    shape = (args.micro_batch_size, args.seq_length)
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    while True:
        first = torch.randint(args.padded_vocab_size, (shape[0], 1), generator=generator)
        yield (first + torch.arange(shape[1] + 1)) % args.padded_vocab_size


def forward_step(batch, model):
    rows = next(batch)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    length = tokens.shape[1]
    positions = torch.arange(length)[None].expand_as(tokens)
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    ones = torch.ones(tokens.shape)
    output = model(tokens, positions, mask, labels=labels, loss_mask=ones)
    return output, partial(loss_func, ones)


def loss_func(mask, losses):
    loss = (losses.float() * mask).sum()
    return loss / mask.sum(), {"lm loss": torch.stack([loss.detach(), mask.sum()])}


def main():
    args = parse_and_validate_args()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=args.expert_model_parallel_size
    )
    torch.manual_seed(args.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    initialize_rerun_state_machine()

    model, optimizer, scheduler = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder, model_provider
    )
    get_timers()("interval-time", log_level=0).start(barrier=True)
    data, config, losses, total = batches(args), get_model_config(model[0]), [], {}
    for iteration in range(1, args.train_iters + 1):
        loss, skipped, _, _, _, grad_norm, num_zeros, max_logit = training.train_step(
            forward_step, data, model, optimizer, scheduler, config, get_forward_backward_func()
        )
        losses.append(float(loss["lm loss"]))
        training.training_log(
            loss, total, args.lr, iteration, 1.0, False, skipped, grad_norm, None, num_zeros,
            max_logit,
        )  # fmt: skip
    if args.rank == args.world_size - 1:
        layers = [module for module in model[0].modules() if isinstance(module, MoELayer)]
        result = {
            "losses": losses,
            "dispatchers": [type(layer.token_dispatcher).__name__ for layer in layers],
            "dispatcher_type": args.moe_token_dispatcher_type,
        }
        Path(args.save, "result.json").write_text(json.dumps(result))
        torch.save({"args": args}, Path(args.save, "common.pt"))  # as Megatron's checkpoints do
    dist.barrier()


if __name__ == "__main__":
    main()
