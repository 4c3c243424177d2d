"""Hooks in Megatron's training loop: our dispatcher, checks, scalars."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training.global_vars import get_args, get_tensorboard_writer, get_wandb_writer
from torch import nn

import ep_comm
from ep_comm.errors import name_settings
from ep_comm.fault_file import FOLDER_VARIABLE
from ep_comm.megatron.balance import COLUMNS, TABLE, LayerBalance, markdown
from ep_comm.megatron.buffers import synchronize_buffers
from ep_comm.megatron.capture import RoutingCapture
from ep_comm.megatron.launch.flags import tokens_per_rank
from ep_comm.megatron.layer import check_model, complete, install
from ep_comm.megatron.meter import MoEMeter
from ep_comm.megatron.options import EPOptions, flag_of
from ep_comm.megatron.overflow import check_overflow
from ep_comm.megatron.wgrad import check_weight_gradients


class Training:
    """Wrappers of the functions that every version of Megatron's loop looks up by name.

    Args:
        training: The module ``megatron.training.training``. Left alone until `use` is called.
        version: This Megatron's.

    Attributes:
        options: Those that our dispatcher was installed with; None without it.
        started: Whether the model is built and checked.
    """

    def __init__(self, training: Any, version: str) -> None:
        self.options: EPOptions | None = None
        self._asked: EPOptions | None = None
        self.started = False
        self._training = training
        self._version = version
        self._meter: MoEMeter | None = None
        self._capture: RoutingCapture | None = None

    def use(self, options: EPOptions) -> None:
        """Put our dispatcher into all MoE layers that are built from now on."""
        if options == self._asked:  # the command line was parsed once more
            return
        install(options)
        name_settings(flag_of)
        for wrap in (
            self._setup_model_and_optimizer,
            self._training_log,
            self._evaluate,
            self._save_checkpoint,
        ):
            name = wrap.__name__.removeprefix("_")
            original = getattr(self._training, name)
            setattr(self._training, name, functools.wraps(original)(wrap(original)))
        self.options = self._asked = options

    def finish(self) -> None:
        """Raise an error of the last step, which no later call would; finish the capture."""
        synchronize_buffers()
        if self._capture is not None:
            self._capture.close()

    def _setup_model_and_optimizer(self, original: Any) -> Any:
        """Size buffers by the validated arguments, check the built model, prepare its scalars."""

        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> tuple:
            settings = get_args()
            self.options = complete(max_tokens_per_rank=tokens_per_rank(settings))
            if settings.save:
                os.environ.setdefault(
                    FOLDER_VARIABLE, os.path.join(settings.save, "ep_comm-faults")
                )
            model, optimizer, scheduler = original(*args, **kwargs)
            num_layers = check_model(model)
            if dist.get_rank() == 0:
                print(self._summary(num_layers), flush=True)
            if settings.tensorboard_dir or settings.wandb_project:
                self._meter = MoEMeter(model)
            self._capture = RoutingCapture(model, self.options.capture_routing)
            checks = self.options.overlap_wgrad or self.options.capacity_factor is not None
            if optimizer is not None and checks:
                optimizer.step = _checking(optimizer.step, model)
            self.started = True
            return model, optimizer, scheduler

        return setup_model_and_optimizer

    def _training_log(self, original: Any) -> Any:
        """Add our scalars to Megatron's, where and when it writes its own."""
        signature = inspect.signature(original)

        def training_log(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            iteration = signature.bind(*args, **kwargs).arguments["iteration"]
            assert self._capture is not None  # made with the model
            self._capture.step(iteration)
            if self._meter is not None:
                metrics = self._meter.step()  # collective: on all ranks, after each step
                settings = get_args()
                if iteration % settings.tensorboard_log_interval == 0:
                    _log(metrics, iteration)
                if iteration % settings.log_interval == 0:
                    _log_balance(self._meter.balance, iteration)
            return result

        return training_log

    def _evaluate(self, original: Any) -> Any:
        """Forget what an evaluation dispatched: it belongs to no training step."""

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._meter is not None:
                self._meter.step()
            return result

        return evaluate

    def _save_checkpoint(self, original: Any) -> Any:
        """Save nothing after a backward pass whose communication failed."""

        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            synchronize_buffers()
            return original(*args, **kwargs)

        return save_checkpoint

    def _summary(self, num_layers: int) -> str:
        """Return the line that rank 0 prints: which Megatron, how many layers, what settings."""
        folder = Path(self._training.__file__).parents[1]
        return (
            f"ep_comm {ep_comm.__version__} in Megatron {self._version} ({folder}): {num_layers} "
            f"MoE layers on rank 0, all with our dispatcher; {self.options}"
        )


def _checking(step: Any, model: list[nn.Module]) -> Any:
    @functools.wraps(step)
    def checked_step(*args: Any, **kwargs: Any) -> Any:
        check_weight_gradients(model)
        check_overflow(model)
        return step(*args, **kwargs)

    return checked_step


def _log(metrics: dict[str, float], iteration: int) -> None:
    """Write scalars on the rank that has Megatron's writers, which is the last one."""
    if (writer := get_tensorboard_writer()) is not None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(metrics, iteration)


def _log_balance(layers: Sequence[LayerBalance], iteration: int) -> None:
    """Write how tokens were spread, a line a layer, where `_log` writes."""
    if (writer := get_tensorboard_writer()) is not None:
        writer.add_text(TABLE, markdown(layers), iteration)
    if (wandb := get_wandb_writer()) is not None:
        data = [list(layer.row().values()) for layer in layers]
        wandb.log({TABLE: wandb.Table(columns=list(COLUMNS), data=data)}, iteration)
