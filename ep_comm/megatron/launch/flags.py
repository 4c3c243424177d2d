"""The launcher's flags: their place in Megatron's parser, and what contradicts them."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ep_comm.errors import EPArgumentError
from ep_comm.job.exits import UserError
from ep_comm.job.files import take_folder
from ep_comm.job.ranks import whole
from ep_comm.megatron.names import NAME, STOCK, VALUES, is_ep_comm, printed
from ep_comm.megatron.options import OPTIONS, EPOptions, flag_of
from ep_comm.megatron.support import check_flags
from ep_comm.numeric import ceil_div

# Rows of a rank, of newer Megatrons' own dispatchers; here each expert has its part of them.
_RANK_CAPACITY = "moe_expert_rank_capacity_factor"


def add_flags(parser: argparse.ArgumentParser, dispatchers: Sequence[str]) -> None:
    """Add our argument group. Flags that are not given leave nothing in the namespace.

    Args:
        parser: Megatron's, or one for the help alone.
        dispatchers: Names of Megatron's own dispatchers.
    """
    group = parser.add_argument_group(
        NAME, f"{NAME}'s MoE token dispatcher; --ep-* need --moe-token-dispatcher {NAME}"
    )
    add = functools.partial(group.add_argument, default=argparse.SUPPRESS)
    add(
        "--moe-token-dispatcher",
        choices=[*VALUES, *dispatchers],
        help=f"{' and '.join(VALUES)} are two names of ours; the others are Megatron's own. "
        "--moe-token-dispatcher-type takes the same.",
    )
    for option in OPTIONS:
        help = option.full_help.replace("%", "%%")
        if option.value_type is bool:
            add(option.flag, action=argparse.BooleanOptionalAction, help=help)
        else:
            add(
                option.flag,
                type=option.value_type,
                choices=option.choices or None,
                metavar=option.metavar,
                help=help,
            )


def wants_ep_comm(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for our dispatcher, as far as no parser is needed."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return any(
        flag in ("--moe-token-dispatcher", "--moe-token-dispatcher-type") and is_ep_comm(value)
        for flag, value in itertools.pairwise(words)
    )


def extend_parser(arguments: Any, use: Callable[[EPOptions], None]) -> None:
    """Make Megatron's parser take our flags, and call `use` once they ask for our dispatcher.

    Args:
        arguments: The module ``megatron.training.arguments``. Every version of Megatron looks up
            its ``add_megatron_arguments`` by name.
        use: Called before the parsed arguments are returned.
    """
    original = arguments.add_megatron_arguments

    @functools.wraps(original)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        stock_type = _action(parser, "moe_token_dispatcher_type")
        stock_default, stock_type.default = stock_type.default, None  # None: not given
        dispatchers = tuple(stock_type.choices or ())
        stock_type.choices = (*dispatchers, *VALUES)
        add_flags(parser, dispatchers)
        parse = parser.parse_known_args

        @functools.wraps(parse)
        def parse_known_args(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
            namespace, rest = parse(*args, **kwargs)
            options = resolve(namespace, stock_default)
            if options is not None:
                use(options)
            return namespace, rest

        # parse_args calls it too.
        parser.parse_known_args = parse_known_args  # type: ignore[assignment,method-assign]
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
        UserError: Flags contradict each other, or a value is wrong.
        EPUnsupportedError: A flag asks for what does not go with our dispatcher.
    """
    given = [option for option in OPTIONS if hasattr(args, option.key)]
    chosen = {
        "--moe-token-dispatcher": vars(args).pop("moe_token_dispatcher", None),
        "--moe-token-dispatcher-type": args.moe_token_dispatcher_type,
    }
    types = {printed(value) for value in chosen.values() if value is not None}
    if NAME not in types:
        if given:
            raise UserError(
                f"{', '.join(option.flag for option in given)}: only with "
                f"--moe-token-dispatcher {NAME}"
            )
        if len(types) > 1:
            raise UserError(_contradiction(chosen))
        args.moe_token_dispatcher_type = types.pop() if types else stock_default
        return None
    if types - {NAME, STOCK}:
        raise UserError(_contradiction(chosen))
    args.moe_token_dispatcher, args.moe_token_dispatcher_type = NAME, STOCK
    _take_rank_capacity(args)
    given = [option for option in OPTIONS if hasattr(args, option.key)]
    try:
        options = EPOptions(**{option.name: getattr(args, option.key) for option in given})
    except EPArgumentError as error:
        raise UserError(f"--ep-*: {error}") from None
    check_flags(args, options)
    _check_others(args, options)
    for option in OPTIONS:
        setattr(args, option.key, getattr(options, option.name))
    return options


def _take_rank_capacity(args: argparse.Namespace) -> None:
    """Take the value of newer Megatrons' flag for ours, and clear it.

    Megatron's configuration insists on dispatchers of its own where it is set.
    """
    factor = getattr(args, _RANK_CAPACITY, None)
    if factor is None:
        return
    if getattr(args, "ep_capacity_factor", factor) != factor:
        ours, theirs = f"--ep-capacity-factor {args.ep_capacity_factor:g}", f"{factor:g}"
        raise UserError(
            f"{ours} and --{_RANK_CAPACITY.replace('_', '-')} {theirs} contradict each other: "
            "give one of them"
        )
    args.ep_capacity_factor = factor
    setattr(args, _RANK_CAPACITY, None)


def tokens_per_rank(args: argparse.Namespace) -> int | None:
    """Return the most tokens of a micro-batch on one rank, by Megatron's validated arguments.

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
    return ceil_div(sequences * length, ranks)


def _check_others(args: argparse.Namespace, options: EPOptions) -> None:
    """Raise where the command line lacks something, or W&B or the capture could not write."""
    may_come_later = args.use_checkpoint_args or getattr(args, "yaml_cfg", None)
    if args.num_experts is None and not may_come_later:
        raise UserError(f"--moe-token-dispatcher {NAME} needs --num-experts")
    if getattr(args, "wandb_project", None) and _on_last_node():
        _check_wandb_dir(args.wandb_save_dir, args.save)
    if options.capture_routing is not None and os.environ.get("RANK", "0") == "0":
        take_folder(Path(options.capture_routing), flag_of("capture_routing"))


def _on_last_node() -> bool:
    """Return whether this process is on the node of the last rank, which writes to W&B."""
    rank, ranks = whole(os.environ, "RANK", 0), whole(os.environ, "WORLD_SIZE", 1)
    return rank >= ranks - whole(os.environ, "LOCAL_WORLD_SIZE", 1)


def _check_wandb_dir(wandb_save_dir: str | None, save: str | None) -> None:
    if wandb_save_dir:
        flag, folder = "--wandb-save-dir", wandb_save_dir
    elif save:
        flag, folder = "--save", os.path.join(save, "wandb")
    else:
        raise UserError("--wandb-project needs --wandb-save-dir, or --save to write below")
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag}: W&B cannot write to {folder}: {error.strerror}") from None


def _contradiction(chosen: dict[str, str]) -> str:
    flags = " and ".join(f"{flag} {value}" for flag, value in chosen.items())
    return f"{flags} contradict each other: give one of them"


def _action(parser: argparse.ArgumentParser, dest: str) -> argparse.Action:
    return next(action for action in parser._actions if action.dest == dest)
