"""The training loop."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from ep_comm import megatron as ep_megatron
from ep_comm.job.environment import commit, versions
from ep_comm.job.exits import UserError
from ep_comm.job.files import take_folder
from ep_comm.job.start import on_rank_0
from ep_comm.job.stop import EXIT_CODE, StopRequest
from ep_comm.megatron.options import flag_of
from ep_comm.pretrain.checkpoint import check_paths, load, save
from ep_comm.pretrain.config import PretrainConfig
from ep_comm.pretrain.data import load_datasets, microbatches
from ep_comm.pretrain.flops import flops_per_token, peak_tflops
from ep_comm.pretrain.log import RunLog, announce, check_wandb
from ep_comm.pretrain.log_file import TOKENS_PER_S
from ep_comm.pretrain.model import (
    Trainee,
    build,
    have_transformer_engine,
    padded_vocab_size,
    slow_backend,
)

Batches = Iterator[dict[str, torch.Tensor]]


def pretrain(config: PretrainConfig) -> None:
    """Train as `config` says; call it on all ranks.

    Raises:
        UserError: Something is asked for that cannot be done. Nothing has been overwritten.
        SystemExit: SIGTERM or Ctrl-C came, on any rank (`stop`).
    """
    # Whatever can be wrong with the request comes first, before anything is written.
    num_microbatches = config.num_microbatches(dist.get_world_size())
    check_wandb(config)
    checkpoint = on_rank_0(lambda: check_paths(config))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    announce("reading the data")
    corpus, train_data, valid_data = load_datasets(config)
    if (folder := config.save) is not None:
        on_rank_0(lambda: take_folder(folder, "--save"))
    if (name := config.ep_options.capture_routing) is not None:
        capture_folder = Path(name)
        on_rank_0(lambda: take_folder(capture_folder, flag_of("capture_routing")))
    announce("building the model")
    trainee = build(config, corpus.vocab_size, device)
    iteration, consumed_samples = load(trainee, config, checkpoint) if checkpoint else (0, 0)
    stop = StopRequest()
    stopping = False

    with RunLog(config, _versions(), first_iteration=iteration) as log:
        if checkpoint:
            log.message(f"resumed at step {iteration} from {checkpoint}")
        elif config.load:
            log.message(f"no checkpoint in {config.load} yet: from the start")
        if iteration >= config.train_iters:
            log.message(f"already at step {iteration} of {config.train_iters}: nothing to do")
        meter = ep_megatron.MoEMeter([trainee.model])
        capture = ep_megatron.RoutingCapture([trainee.model], config.ep_options.capture_routing)
        speed = partial(_speed, config=config, vocab_size=corpus.vocab_size)
        batches = partial(microbatches, config=config, device=device)
        train_batches = batches(train_data, first_sample=consumed_samples)
        if config.gradient_accumulation_fusion:
            log.message("the output layer's gradient accumulation is not fused: that takes Apex")
        first = iteration + 1
        if first <= config.train_iters:
            log.message(f"step {first} takes longest: buffers are made, kernels loaded")
        if config.manual_gc:
            gc.disable()
            gc.collect()

        while iteration < config.train_iters and not stopping:
            start = time.perf_counter()
            learning_rate = trainee.optimizer.param_groups[0]["lr"]
            if trainee.graphs.before_step():
                meter.step()  # what was dispatched for a capture belongs to no step
            own_loss, grad_norm = train_step(trainee, train_batches, config, num_microbatches)
            # One all-reduce for both: asking whether any rank is to stop costs four bytes.
            loss, asked = mean_over_ranks(own_loss, own_loss.new_tensor(stop.received))
            stopping = asked > 0
            # Over NVLink nobody knows before whether a rank was missing in the backward pass.
            ep_megatron.synchronize_buffers()
            duration = time.perf_counter() - start
            trainee.scheduler.step(increment=config.global_batch_size)
            iteration += 1
            consumed_samples += config.global_batch_size
            capture.step(iteration)
            log.train(
                iteration,
                {
                    "lm loss": loss,
                    "grad-norm": grad_norm,
                    "learning-rate": learning_rate,
                    "iteration-time": duration,
                    **speed(duration),
                    **meter.step(),
                },
            )
            log.balance(iteration, meter.balance)
            if iteration == first and (warning := slow_backend(trainee)):
                log.warning(iteration, warning)
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {iteration}; a lower --lr may help")

            last = iteration == config.train_iters
            validate = valid_data and (last or iteration % config.eval_interval == 0)
            if validate:
                if config.manual_gc:
                    gc.collect()
                valid_batches = batches(valid_data, first_sample=0)
                log.valid(iteration, _validate(trainee, valid_batches, config, num_microbatches))
                meter.step()  # what validation dispatched belongs to no step
            interval = config.manual_gc_interval
            if config.manual_gc and (validate or (interval and iteration % interval == 0)):
                gc.collect()
            due = config.save_interval and iteration % config.save_interval == 0
            if config.save and (last or due or stopping):
                save(trainee, config, iteration=iteration, consumed_samples=consumed_samples)
                log.message(f"step {iteration}: checkpoint in {config.save}")
        capture.close()
        trainee.graphs.close()
        if iteration < config.train_iters:
            saved = f"--load {config.save} goes on from there"
            log.message(
                f"asked to stop: stopped after step {iteration} of {config.train_iters}; "
                + (saved if config.save else "nothing is saved, there is no --save")
            )
    dist.barrier()  # W&B may take a while on one rank; no other one shall look as if it had failed
    dist.destroy_process_group()
    if iteration < config.train_iters:
        sys.exit(EXIT_CODE)


def train_step(
    trainee: Trainee, batches: Batches, config: PretrainConfig, num_microbatches: int
) -> tuple[torch.Tensor, float]:
    """Take one optimizer step; return this rank's loss, and the gradient norm before clipping."""
    trainee.model.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    loss = _forward_backward(trainee, batches, config, num_microbatches, forward_only=False)
    ep_megatron.check_weight_gradients([trainee.model])
    ep_megatron.check_overflow([trainee.model])
    _, grad_norm, _ = trainee.optimizer.step()
    return loss, float(grad_norm)


@torch.no_grad()
def _validate(
    trainee: Trainee, batches: Batches, config: PretrainConfig, num_microbatches: int
) -> float:
    """Return the loss over the first `eval_iters` global batches, the same ones each time."""
    trainee.model.eval()
    losses = [
        _forward_backward(trainee, batches, config, num_microbatches, forward_only=True)
        for _ in range(config.eval_iters)
    ]
    trainee.model.train()
    mean = sum(mean_over_ranks(*losses)) / len(losses)
    ep_megatron.synchronize_buffers()  # no backward pass would say it
    return mean


def _forward_backward(
    trainee: Trainee,
    batches: Batches,
    config: PretrainConfig,
    num_microbatches: int,
    *,
    forward_only: bool,
) -> torch.Tensor:
    """Run one global batch; return this rank's loss, averaged over its microbatches."""
    results = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=batches,
        model=[trainee.model],
        num_microbatches=num_microbatches,
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        forward_only=forward_only,
    )
    return torch.stack([result["lm loss"] for result in results]).mean()


def _speed(duration: float, *, config: PretrainConfig, vocab_size: int) -> dict[str, float]:
    """Return the speed of a step that took `duration` seconds, as `log_file` names it."""
    rate = config.global_batch_size * config.seq_length / duration
    flops = flops_per_token(config, padded_vocab_size(vocab_size))
    tflops = 1e-12 * flops * rate / dist.get_world_size()
    found = {TOKENS_PER_S: rate, "throughput": tflops}
    peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if config.bf16 and peak is not None:
        found["mfu"] = tflops / peak
    return found


def mean_over_ranks(*values: torch.Tensor) -> list[float]:
    """Return the mean of each scalar over all ranks."""
    sums = torch.stack(values)
    dist.all_reduce(sums)
    return [total / dist.get_world_size() for total in sums.tolist()]


def _forward_step(
    batches: Batches, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, partial]:
    """Return losses and loss function of a microbatch, as Megatron's schedules want them.

    Its 1F1B overlap wants a plan to compute the losses instead.
    """
    batch = next(batches)
    forward = model.build_schedule_plan if return_schedule_plan else model
    losses = forward(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(_mean_loss, batch["loss_mask"])


def _mean_loss(
    mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = (losses.float() * mask).sum() / mask.sum()
    return loss, {"lm loss": loss.detach().clone()}


def _versions() -> dict[str, str]:
    """Return what a run's numbers depend on, for its log."""
    names = ("ep_comm", "torch", "megatron-core", "transformer-engine")
    known = versions()
    found = {name: known[name] for name in names[: 4 if have_transformer_engine() else 3]}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {**found, "device": device, "commit": commit() or "none"}
