"""Command line."""

import argparse
import dataclasses
import os

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from .global_vars import set_global_variables

_NUMBERS = """
    num-layers hidden-size num-attention-heads ffn-hidden-size moe-ffn-hidden-size seq-length
    max-position-embeddings micro-batch-size global-batch-size train-iters num-experts
    moe-router-topk expert-model-parallel-size mtp-num-layers vocab-size save-interval
"""
_WORDS = """
    save moe-router-dtype transformer-impl tokenizer-type distributed-backend wandb-project
    wandb-exp-name wandb-save-dir tensorboard-dir position-embedding-type
"""
_SWITCHES = """
    use-checkpoint-args moe-enable-deepep use-megatron-fsdp use-torch-fsdp2 disable-bias-linear
    no-persist-layer-norm no-gradient-accumulation-fusion use-cpu-initialization
    no-masked-softmax-fusion no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion
    no-rope-fusion swiglu sequence-parallel
"""


def add_megatron_arguments(parser):
    for names, kind in ((_NUMBERS, int), (_WORDS, str)):
        for name in names.split():
            parser.add_argument(f"--{name}", type=kind)
    for name in _SWITCHES.split():
        parser.add_argument(f"--{name}", action="store_true")
    for name, default in (("lr", None), ("hidden-dropout", 0.1), ("attention-dropout", 0.1)):
        parser.add_argument(f"--{name}", type=float, default=default)
    for name, default in (
        ("seed", 1234),
        ("pipeline-model-parallel-size", 1),
        ("tensor-model-parallel-size", 1),
        ("context-parallel-size", 1),
        ("tensorboard-log-interval", 1),
        ("log-interval", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--moe-token-dispatcher-type",
        choices=("allgather", "alltoall", "flex"),
        default="allgather",
    )
    return parser


def parse_args():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    args = add_megatron_arguments(parser).parse_args()
    args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return args


def parse_and_validate_args():
    args = parse_args()
    args.padded_vocab_size = args.vocab_size + 1
    set_global_variables(args)
    return args


def core_transformer_config_from_args(args):
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    return TransformerConfig(
        **{
            name: value for name, value in vars(args).items() if name in names and value is not None
        },
        num_moe_experts=args.num_experts,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        pipeline_dtype=torch.float32,
    )
