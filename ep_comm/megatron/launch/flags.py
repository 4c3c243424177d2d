"""The launcher's flags: their meaning in Megatron's parser, and what contradicts them."""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from ep_comm.errors import EPArgumentError
from ep_comm.megatron.options import OPTIONS, EPOptions

NAME = "deepep"
# Megatron validates other features against this dispatcher; its instance is then replaced by ours.
STOCK = "alltoall"

# Flags of Megatron's that cannot go with ours: the argument, the values that are fine, why.
_CONFLICTS = (
    ("moe_enable_deepep", (None, False), "it asks for Megatron's own flex dispatcher"),
    ("moe_flex_dispatcher_backend", (None, "deepep"), "it belongs to Megatron's flex dispatcher"),
    ("use_megatron_fsdp", (None, False), "FSDP is not supported yet"),
    ("use_torch_fsdp2", (None, False), "FSDP is not supported yet"),
)


class LaunchError(Exception):
    """What the user asked for cannot be done; the message says what would be right."""


def add_flags(parser: argparse.ArgumentParser, dispatchers: Sequence[str]) -> None:
    """Add our argument group. Flags that are not given leave nothing in the namespace."""
    group = parser.add_argument_group(
        "ep_comm", "ep_comm's MoE token dispatcher; --ep-* need --moe-token-dispatcher deepep"
    )
    add = functools.partial(group.add_argument, default=argparse.SUPPRESS)
    add(
        "--moe-token-dispatcher",
        choices=dispatchers,
        help="deepep is ep_comm's; the others are Megatron's own. --moe-token-dispatcher-type "
        "takes the same",
    )
    for option in OPTIONS:
        help = option.full_help.replace("%", "%%")
        if option.value_type is bool:
            add(option.flag, action=argparse.BooleanOptionalAction, help=help)
        else:
            add(option.flag, type=option.value_type, metavar=option.metavar, help=help)


def wants_ep_comm(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for our dispatcher, as far as one can see without a parser."""
    names = ("--moe-token-dispatcher", "--moe-token-dispatcher-type")
    given = zip(arguments, [*arguments[1:], ""], strict=True)
    return any(
        (name in names and value == NAME) or name in [f"{each}={NAME}" for each in names]
        for name, value in given
    )


def extend_parser(arguments: ModuleType, use: Callable[[EPOptions], None]) -> None:
    """Make Megatron's parser take our flags, and call `use` once they ask for our dispatcher.

    Args:
        arguments: ``megatron.training.arguments``, whose ``add_megatron_arguments`` every version
            looks up by name.
        use: Called before the parsed arguments are returned.
    """
    original = arguments.add_megatron_arguments

    @functools.wraps(original)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        stock_type = _action(parser, "moe_token_dispatcher_type")
        stock_default, stock_type.default = stock_type.default, None  # None: not given
        stock_type.choices = [*stock_type.choices, NAME]
        add_flags(parser, stock_type.choices)
        parse = parser.parse_known_args

        @functools.wraps(parse)
        def parse_known_args(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
            namespace, rest = parse(*args, **kwargs)
            options = resolve(namespace, stock_default)
            if options is not None:
                use(options)
            return namespace, rest

        parser.parse_known_args = parse_known_args  # parse_args calls it
        return parser

    arguments.add_megatron_arguments = add_megatron_arguments


def resolve(args: argparse.Namespace, stock_default: str) -> EPOptions | None:
    """Turn the parsed flags into what Megatron knows, in place, and into our options.

    With our dispatcher `args` keeps the name and the options under our flags' names, as plain
    Python values: they go into checkpoints and the W&B configuration. Without it nothing of ours is
    left.

    Returns:
        None if another dispatcher was chosen.

    Raises:
        LaunchError: Flags contradict each other, or a value is wrong.
    """
    given = [option for option in OPTIONS if hasattr(args, option.key)]
    chosen = {
        "--moe-token-dispatcher": vars(args).pop("moe_token_dispatcher", None),
        "--moe-token-dispatcher-type": args.moe_token_dispatcher_type,
    }
    types = set(chosen.values()) - {None}
    if NAME not in types:
        if given:
            raise LaunchError(
                f"{', '.join(option.flag for option in given)}: only with "
                "--moe-token-dispatcher deepep"
            )
        if len(types) > 1:
            raise LaunchError(_contradiction(chosen))
        args.moe_token_dispatcher_type = types.pop() if types else stock_default
        return None
    if types - {NAME, STOCK}:
        raise LaunchError(_contradiction(chosen))
    args.moe_token_dispatcher, args.moe_token_dispatcher_type = NAME, STOCK
    _check_others(args)
    try:
        options = EPOptions(**{option.name: getattr(args, option.key) for option in given})
    except EPArgumentError as error:
        raise LaunchError(f"--ep-*: {error}") from None
    for option in OPTIONS:
        setattr(args, option.key, getattr(options, option.name))
    return options


def tokens_per_rank(args: argparse.Namespace) -> int | None:
    """Most tokens of a micro-batch on one rank, by Megatron's validated arguments.

    None where these do not say how long sequences are.
    """
    lengths_vary = any(
        getattr(args, name, False)
        for name in ("variable_seq_lengths", "hybrid_context_parallel", "perform_rl_step")
    )
    length = max(args.seq_length or 0, getattr(args, "decoder_seq_length", None) or 0)
    if lengths_vary or not length:
        return None
    ranks = args.context_parallel_size
    if args.sequence_parallel:
        ranks *= args.tensor_model_parallel_size
    sequences = max(args.micro_batch_size, getattr(args, "eval_micro_batch_size", None) or 0)
    return -(-sequences * length // ranks)


def _check_others(args: argparse.Namespace) -> None:
    """What else on the command line does not go with our dispatcher."""
    for name, fine, why in _CONFLICTS:
        if getattr(args, name, None) not in fine:
            raise LaunchError(f"{_flag(name)} with --moe-token-dispatcher deepep: {why}")
    may_come_later = args.use_checkpoint_args or getattr(args, "yaml_cfg", None)
    if args.num_experts is None and not may_come_later:
        raise LaunchError("--moe-token-dispatcher deepep needs --num-experts")
    if getattr(args, "wandb_project", None) and _on_last_node():
        _check_wandb_dir(args.wandb_save_dir, args.save)


def _on_last_node() -> bool:
    """The last rank writes to W&B."""
    rank, ranks = (int(os.environ.get(key, i)) for i, key in enumerate(("RANK", "WORLD_SIZE")))
    return rank >= ranks - int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _check_wandb_dir(wandb_save_dir: str | None, save: str | None) -> None:
    if not wandb_save_dir and not save:
        raise LaunchError("--wandb-project needs --wandb-save-dir, or --save to write below")
    folder = wandb_save_dir or os.path.join(save, "wandb")
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        flag = "--wandb-save-dir" if wandb_save_dir else "--save"
        raise LaunchError(f"{flag}: W&B cannot write to {folder}: {error.strerror}") from None


def _contradiction(chosen: dict[str, str]) -> str:
    flags = " and ".join(f"{flag} {value}" for flag, value in chosen.items())
    return f"{flags} contradict each other: give one of them"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _action(parser: argparse.ArgumentParser, dest: str) -> argparse.Action:
    return next(action for action in parser._actions if action.dest == dest)
