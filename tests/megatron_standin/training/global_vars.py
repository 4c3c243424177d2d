"""What the whole process shares: arguments, timers, writers."""

import json
from pathlib import Path
from types import SimpleNamespace

from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.timers import Timers

_state = SimpleNamespace(args=None, timers=None, wandb=None, tensorboard=None)


def set_global_variables(args):
    init_num_microbatches_calculator(
        args.rank, None, args.global_batch_size, args.micro_batch_size, args.world_size
    )
    _state.args, _state.timers = args, Timers(0, "minmax")
    if args.tensorboard_dir and args.rank == args.world_size - 1:
        _state.tensorboard = _Writer(Path(args.tensorboard_dir))
    if args.wandb_project and args.rank == args.world_size - 1:
        import wandb

        wandb.init(
            project=args.wandb_project,
            name=args.wandb_exp_name,
            dir=args.wandb_save_dir,
            config=vars(args),
        )
        _state.wandb = wandb


class _Writer:
    """A TensorBoard writer as Megatron uses it; one JSON list a scalar in ``scalars.jsonl``.

    Texts are in ``texts.jsonl``.
    """

    def __init__(self, folder):
        folder.mkdir()
        self._scalars, self._texts = (
            (folder / f"{kind}.jsonl").open("w", buffering=1) for kind in ("scalars", "texts")
        )

    def add_scalar(self, name, value, iteration):
        self._scalars.write(json.dumps([name, value, iteration]) + "\n")

    def add_text(self, name, text, iteration):
        self._texts.write(json.dumps([name, text, iteration]) + "\n")


def get_args():
    return _state.args


def get_timers():
    return _state.timers


def get_wandb_writer():
    return _state.wandb


def get_tensorboard_writer():
    return _state.tensorboard
