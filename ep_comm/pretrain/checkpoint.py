"""Checkpoints that a run resumes from exactly, through Megatron's dist_checkpointing.

A folder of checkpoints looks like Megatron-LM's::

    iter_0000100/                          one checkpoint
    latest_checkpointed_iteration.txt      100

A checkpoint is written under another name, then renamed, then named in the text file. A run that
is killed meanwhile leaves the text file pointing at the previous, complete one.

It may be resumed with another dispatcher, number of processes and expert-parallel size. The losses
are then those of the uninterrupted run, up to the rounding of sums in another order.
"""

from __future__ import annotations

import itertools
import multiprocessing.dummy
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from ep_comm.job.exits import UserError
from ep_comm.job.files import write_text
from ep_comm.job.start import agree, on_rank_0
from ep_comm.megatron.options import OPTIONS
from ep_comm.pretrain.checkpoint_files import check_metadata
from ep_comm.pretrain.config import MAY_CHANGE, PretrainConfig
from ep_comm.pretrain.log_file import LATEST, latest_iteration
from ep_comm.pretrain.model import Trainee, gather_parameters

T = TypeVar("T")

# Keys that a resumed run may change; with any other one changed it would not be the same run.
FREE_KEYS = ({each.key for each in OPTIONS} - {"ep_capacity_factor", "ep_device_counts"}) | set(
    """
    train_iters moe_token_dispatcher moe_grouped_gemm moe_permute_fusion moe_router_fusion
    expert_model_parallel_size overlap_dispatch_backward_with_experts_wgrad
    overlap_moe_expert_parallel_comm delay_wgrad_compute
    manual_gc manual_gc_interval
    recompute_granularity recompute_modules overlap_grad_reduce overlap_param_gather
    cuda_graph_modules
    eval_interval eval_iters save save_interval keep_checkpoints load load_despite run_dir
    log_interval
    wandb_project wandb_exp_name wandb_entity wandb_save_dir data_cache_path
    """.split()
)

# The formats of optimizer state that any number of ranks can read, with any expert-parallel size.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


def _tracker_states() -> dict[str, torch.Tensor]:
    """Return the states of Megatron's tracker. The one for CUDA graphs keeps generators."""
    states = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        name: state.get_state() if isinstance(state, torch.Generator) else state
        for name, state in states.items()
    }


def _set_tracker_states(states: dict[str, torch.Tensor]) -> None:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    mine = dict(tracker.get_states())
    for name, state in states.items():
        if isinstance(mine.get(name), torch.Generator):
            mine[name].set_state(state)
        else:
            mine[name] = state
    tracker.set_states(mine)


# How the state of each random generator is read and set.
_RANDOM_STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "python": (random.getstate, random.setstate),
    "numpy": (np.random.get_state, np.random.set_state),
    "torch": (torch.get_rng_state, torch.set_rng_state),
    "cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
    "megatron": (_tracker_states, _set_tracker_states),
}


def check_paths(config: PretrainConfig) -> Path | None:
    """Refuse paths that would fail, or overwrite another run's checkpoints, hours later.

    Call it on rank 0.

    Returns:
        The checkpoint to load, if any: the latest one in ``config.load``. Where that is
        ``config.save`` too, a run begins there if it is still without checkpoints: the same command
        starts a run and goes on with it.

    Raises:
        UserError: There is no checkpoint to load, it belongs to another model or run, or there is
            one in the way of saving.
    """
    saved = config.save / LATEST if config.save else None
    goes_on = config.save and config.load and config.save.resolve() == config.load.resolve()
    if saved and saved.exists() and not goes_on:
        raise UserError(
            f"--save {config.save} already holds checkpoints, the latest of iteration "
            f"{saved.read_text().strip()}: add --load {config.save} to go on from it, or "
            f"choose another folder"
        )
    checkpoint = None
    if config.load and not (goes_on and saved and not saved.exists()):
        checkpoint = _latest(config.load)
        _check_fingerprint(checkpoint, config)
    return checkpoint


def save(
    trainee: Trainee, config: PretrainConfig, *, iteration: int, consumed_samples: int
) -> None:
    """Write the checkpoint of `iteration` into ``config.save``; call it on all ranks.

    Raises:
        UserError: Its folder cannot be written. The checkpoint before it is as it was.
    """
    root = config.save
    assert root is not None  # the caller asks whether to save
    gather_parameters(trainee)
    folder = root / f"iter_{iteration:07d}"
    temporary = folder.with_suffix(".tmp")

    def make_folder() -> None:
        for leftover in (temporary, folder):  # of a run that was killed before it named `folder`
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)

    def name_it() -> None:
        temporary.rename(folder)
        write_text(root / LATEST, f"{iteration}\n")
        if config.keep_checkpoints is not None:
            _delete_old(root, latest=iteration, keep=config.keep_checkpoints)

    _write(config, make_folder)
    state = {
        **_sharded_state(trainee, is_loading=False),
        "iteration": iteration,
        "consumed_samples": consumed_samples,
        "fingerprint": _fingerprint(config),
        "ranks": _ranks(trainee),
    }
    _write_in_threads()
    try:
        agree(lambda: _save_state(state, temporary, config))
    except UserError:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    _write(config, name_it)


@torch.no_grad()
def load(trainee: Trainee, config: PretrainConfig, checkpoint: Path) -> tuple[int, int]:
    """Restore what `check_paths` returned; call it on all ranks.

    Returns:
        Iteration and number of samples that the checkpoint was written after.

    Raises:
        UserError: The checkpoint is damaged.
    """
    _prepare_torch_optimizers(trainee)
    same_ranks = _common_state(checkpoint).get("ranks") == _ranks(trainee)
    wanted = _sharded_state(trainee, is_loading=True)
    if not same_ranks:
        del wanted["rng_state"]  # each rank's own; nothing here is random after initialisation
    optimizer = wanted.pop("optimizer")
    wanted["optimizer_parts"] = _parts(optimizer)
    # It communicates, inside `agree`: torch reports a shard that one rank cannot read on all.
    state = agree(
        lambda: _readable(checkpoint, lambda: dist_checkpointing.load(wanted, str(checkpoint)))
    )
    trainee.model.module.load_state_dict(state["model"])
    trainee.optimizer.load_state_dict(_with_parts(optimizer, state["optimizer_parts"]))
    _set_optimizer_steps(trainee, state["iteration"])
    # The schedule goes by steps; Megatron counts it in samples, of the present batch size.
    trainee.scheduler.step(increment=state["iteration"] * config.global_batch_size)
    if same_ranks:
        for name, (_, set_state) in _RANDOM_STATES.items():
            set_state(state["rng_state"][name])
    return state["iteration"], state["consumed_samples"]


def _delete_old(folder: Path, *, latest: int, keep: int) -> None:
    """Delete all checkpoints up to `latest` but the last `keep` ones."""
    numbers = {path: path.name.removeprefix("iter_") for path in folder.glob("iter_*")}
    complete = {int(n): path for path, n in numbers.items() if n.isdigit() and int(n) <= latest}
    for number in sorted(complete)[:-keep]:
        shutil.rmtree(complete[number])


def _write_in_threads() -> None:
    """Have Megatron write with threads where it would start processes.

    A process would outlive this one if that is killed. A thread never does, and SIGTERM to all of
    a job does not end it while the last checkpoint is written.
    """
    filesystem_async.mp = SimpleNamespace(get_context=lambda method: multiprocessing.dummy)


def _ranks(trainee: Trainee) -> dict[str, int]:
    """Return what the ranks' parts of a checkpoint depend on."""
    return {
        "processes": dist.get_world_size(),
        "expert_model_parallel_size": trainee.config.expert_model_parallel_size,
    }


def _parts(optimizer: dict[str, Any]) -> dict[int, ShardedBase]:
    """Return the tensors of an optimizer's state, numbered.

    Only they are read. The rest, hyperparameters, is grouped in the checkpoint by its own
    expert-parallel size: above 1 Megatron has an optimizer for the experts and one for all else.
    The configuration and the scheduler say the same.
    """
    leaves = nested_values(optimizer)
    return dict(enumerate(leaf for leaf in leaves if isinstance(leaf, ShardedBase)))


def _with_parts(optimizer: dict[str, Any], loaded: dict[int, Any]) -> dict[str, Any]:
    """Return `optimizer` with its `_parts` as loaded."""
    numbers = itertools.count()

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, ShardedBase):
            return loaded[next(numbers)]
        return leaf.unwrap() if isinstance(leaf, LocalNonpersistentObject) else leaf

    return dict_list_map_outplace(fill, optimizer)


def _sharded_state(trainee: Trainee, *, is_loading: bool) -> dict[str, Any]:
    """Return the part of a checkpoint that differs between ranks."""
    model = trainee.model.module.sharded_state_dict(metadata=_METADATA)
    optimizer = trainee.optimizer.sharded_state_dict(
        model, is_loading=is_loading, metadata=_METADATA
    )
    states = {name: get() for name, (get, _) in _RANDOM_STATES.items()}
    rng_state = ShardedObject("rng_state", states, (dist.get_world_size(),), (dist.get_rank(),))
    return {"model": model, "optimizer": optimizer, "rng_state": rng_state}


def _optimizers(trainee: Trainee) -> list[MegatronOptimizer]:
    return getattr(trainee.optimizer, "chained_optimizers", [trainee.optimizer])


def _prepare_torch_optimizers(trainee: Trainee) -> None:
    """Give torch's AdamW, which Megatron takes where Transformer Engine is missing, what it lacks.

    To be loaded into, it must have state, with a step count for each parameter.
    """
    for optimizer in _optimizers(trainee):
        if isinstance(optimizer.optimizer, torch.optim.AdamW):
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
            for state in optimizer.optimizer.state.values():
                # The count itself comes later; Megatron takes 0 for none.
                state["step"] = torch.tensor(1.0)
            if isinstance(optimizer, DistributedOptimizer):
                optimizer._set_main_param_and_optimizer_states = partial(
                    _set_with_step, optimizer._set_main_param_and_optimizer_states
                )


def _set_with_step(set_tensors: Callable, param: torch.Tensor, tensors: dict) -> None:
    set_tensors(param, {"step": torch.tensor(1.0), **tensors})


def _set_optimizer_steps(trainee: Trainee, iteration: int) -> None:
    """Restore the step count, which torch keeps for each parameter, Transformer Engine for a group.

    No step is ever skipped here: that is for FP16.
    """
    for optimizer in _optimizers(trainee):
        for group in optimizer.optimizer.param_groups:
            if not isinstance(optimizer.optimizer, torch.optim.AdamW):
                group["step"] = iteration
                continue
            for param in group["params"]:
                optimizer.optimizer.state[param]["step"] = torch.tensor(float(iteration))


def _save_state(state: dict[str, Any], folder: Path, config: PretrainConfig) -> None:
    """Write the files of one checkpoint. Communicates; Megatron reports a failure on all ranks."""
    try:
        dist_checkpointing.save(state, str(folder))
    except (OSError, RuntimeError, CheckpointException) as error:
        free, total = (shutil.disk_usage(config.save or folder)[i] / 2**20 for i in (2, 0))
        raise UserError(
            f"--save {config.save} cannot be written: {_cause(error)}; {free:,.0f} of "
            f"{total:,.0f} MiB are free there"
        ) from None


def _write(config: PretrainConfig, action: Callable[[], None]) -> None:
    """Call `action`, which writes into ``config.save``, on rank 0; all ranks wait for it."""

    def attempt() -> None:
        try:
            action()
        except OSError as error:
            raise UserError(f"--save {config.save} cannot be written: {error.strerror}") from None

    on_rank_0(attempt)


def _latest(folder: Path) -> Path:
    iteration = latest_iteration(folder)
    if iteration is None:
        raise UserError(
            f"--load {folder} holds no checkpoint: {folder / LATEST} is missing or no number"
        )
    checkpoint = folder / f"iter_{iteration:07d}"
    is_checkpoint = dist_checkpointing.check_is_distributed_checkpoint
    if not _readable(checkpoint, lambda: is_checkpoint(str(checkpoint))):
        raise UserError(f"--load {folder}: {checkpoint} is missing or incomplete")
    _readable(checkpoint, lambda: check_metadata(checkpoint))
    return checkpoint


def _readable(checkpoint: Path, action: Callable[[], T]) -> T:
    """Return the result of `action`; raise a `UserError` for whatever it fails with."""
    try:
        return action()
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        raise UserError(f"checkpoint {checkpoint} cannot be read: {_cause(error)}") from None


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        # One rank's is enough; where there is none, another rank has it.
        error = next((cause for cause, _ in error.failures.values()), error)
    return " ".join(str(error).split()) or type(error).__name__


def _common_state(checkpoint: Path) -> dict[str, Any]:
    """Return the part of a checkpoint that all ranks share."""
    return _readable(checkpoint, lambda: dist_checkpointing.load_common_state_dict(str(checkpoint)))


def _fingerprint(config: PretrainConfig) -> dict[str, Any]:
    """Return what has to be equal for a run to be continued exactly."""
    keys = config.model_dump(mode="json", exclude=FREE_KEYS)
    keys["lr_decay_iters"] = config.decay_iters
    return keys


def _check_fingerprint(folder: Path, config: PretrainConfig) -> None:
    there = _common_state(folder).get("fingerprint", {})
    here = _fingerprint(config)
    changed = [
        key
        for key in here | there
        if here.get(key) != there.get(key) and key not in config.load_despite
    ]
    if changed:
        each = [f"{key} is {there.get(key)} there and {here.get(key)} here" for key in changed]
        hint = f". If that is meant: --load-despite {' '.join(changed)}"
        raise UserError(
            f"checkpoint {folder} is of another run: {'; '.join(each)}"
            + (hint if set(changed) <= set(MAY_CHANGE) else "")
        )
