"""One run of ``ep-comm bench train``: the variants in turn, block by block.

A model of every variant stays in memory, so that visits are short and what the machine does
besides meets all alike. Then each variant alone, for what would disturb the timed blocks: a
profile, the MoE layer alone, and the phases of the MoE layers.

Imports Megatron, see `model`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ep_comm.bench.timing import Stopwatch, summarize
from ep_comm.bench.train.layer import LayerAlone
from ep_comm.bench.train.model import Trainer, vocabulary
from ep_comm.bench.train.profile import (
    BACKWARD,
    FORWARD,
    STEP,
    bars,
    record,
    summarize_trace,
)
from ep_comm.bench.train.results import Block, Inspection, TrainRun
from ep_comm.bench.train.settings import TrainSettings
from ep_comm.job.exits import UserError
from ep_comm.megatron import MoEMeter
from ep_comm.megatron.overflow import take_all
from ep_comm.pretrain.config import PretrainConfig
from ep_comm.pretrain.loop import mean_over_ranks
from ep_comm.pretrain.model import slow_backend
from ep_comm.telemetry.records import timed

_DISCARDED_STEPS = 5  # of a variant alone, besides the warm-up
_LAYER_ITERS = 20
_METER_STEPS = 5


def run(
    settings: TrainSettings,
    configs: dict[str, PretrainConfig],
    device: torch.device,
    out: Path,
    progress: Callable[[str], None],
    save: Callable[[TrainRun], None],
) -> TrainRun:
    """Measure everything that `settings` asks for. Collective over the default group.

    Args:
        settings: Checked before.
        configs: The example's configuration of each variant.
        device: This rank's.
        out: Folder that the traces go to.
        progress: Told what is measured next.
        save: Given what was found, after each block and each variant alone.
    """
    found = TrainRun(
        settings=settings,
        configs={name: config.model_dump(mode="json") for name, config in configs.items()},
        vocab_size=vocabulary(configs[settings.variants[0]]),
        device=device.type,
        num_ranks=dist.get_world_size(),
    )
    _measure_blocks(found, configs, device, progress, save)
    for name in settings.variants:
        progress(f"{name}: profile, MoE layer alone")
        trainer = Trainer(configs[name], device)
        found.inspections[name] = _inspect(trainer, settings, out / f"trace-{name}")
        save(found)
        if (left := trainer.free()) > 2**28:  # workspaces of libraries are less
            progress(f"warning: {left / 2**30:.2f} GiB are still allocated")
    return found


def _measure_blocks(
    found: TrainRun,
    configs: dict[str, PretrainConfig],
    device: torch.device,
    progress: Callable[[str], None],
    save: Callable[[TrainRun], None],
) -> None:
    """Have models of all variants take turns."""
    settings = found.settings
    for name in settings.variants:  # or the first one's memory would hold workspaces of libraries
        progress(f"{name}: first step")
        trainer = Trainer(configs[name], device)
        trainer.step(settings.microbatches[0])
        trainer.free()
    trainers: dict[str, Trainer] = {}
    own_bytes: dict[str, int] = {}  # of each model while it rests
    for name in settings.variants:
        progress(f"{name}: warm-up")
        before = _allocated(device)
        trainers[name] = _warm(configs[name], settings, device)
        if warning := slow_backend(trainers[name].trainee):
            progress(f"WARNING: {name}: {warning}")
        own_bytes[name] = _allocated(device) - before
    with next(iter(trainers.values())).garbage_collection():
        for block in range(settings.blocks):
            for microbatches in settings.microbatches:
                for name in settings.order(block):
                    trainer, own = trainers[name], own_bytes[name]
                    visit = _measure(trainer, settings, name, microbatches, block, own)
                    found.blocks.append(visit)
                    progress(_describe(visit, settings))
            save(found)
    for trainer in trainers.values():
        trainer.free()


def _warm(config: PretrainConfig, settings: TrainSettings, device: torch.device) -> Trainer:
    """Build a model and take its first steps.

    Raises:
        UserError: There is no room for it beside the others.
    """
    try:
        trainer = Trainer(config, device)
        for microbatches in settings.microbatches:
            for _ in range(settings.warmup):
                trainer.step(microbatches)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the models of all variants do not fit in memory together: fewer --variants, or a "
            f"smaller model ({str(error).splitlines()[0]})"
        ) from None
    return trainer


def _measure(
    trainer: Trainer,
    settings: TrainSettings,
    name: str,
    microbatches: int,
    block: int,
    own_bytes: int,
) -> Block:
    """Time one visit: `settings.steps` steps, after one for the caches."""
    device = trainer.device
    watch = Stopwatch(device, settings.steps)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    others = _allocated(device) - own_bytes
    trainer.step(microbatches)
    allocations_before = _num_allocations(device)
    watch.align_from_idle()
    spans, host_ms = [], []
    for _ in range(settings.steps):
        begin = time.perf_counter()
        with timed(device) as span:
            loss = trainer.step(microbatches)
        spans.append(span)
        host_ms.append(1e3 * (time.perf_counter() - begin))
    step_ms = [1e3 * span.seconds for span in spans]
    peak_bytes = num_allocations = None
    if device.type == "cuda":
        outside_torch = sum(buffer.buffer_bytes for buffer in trainer.buffers())
        peak = torch.cuda.max_memory_allocated(device) - others + outside_torch
        allocations = _num_allocations(device) - allocations_before
        peak_bytes, num_allocations = map(int, watch.slowest([float(peak), float(allocations)]))
    return Block(
        variant=name,
        microbatches=microbatches,
        block=block,
        step_ms=watch.slowest(step_ms),
        host_ms=watch.slowest(host_ms),
        loss=mean_over_ranks(loss)[0],
        peak_bytes=peak_bytes,
        num_allocations=num_allocations,
    )


def _inspect(trainer: Trainer, settings: TrainSettings, trace: Path) -> Inspection:
    """Measure a variant alone."""
    microbatches = settings.microbatches[0]
    for _ in range(settings.warmup + _DISCARDED_STEPS):
        trainer.step(microbatches)
    layer = LayerAlone(trainer)
    times = layer.measure(Stopwatch(trainer.device, _LAYER_ITERS), _LAYER_ITERS)
    profiles = _profile(trainer, layer, microbatches, trace)
    dropped = _dropped(trainer, microbatches)
    phases_ms: dict[str, float] = {}
    imbalance: dict[str, float] = {}
    if not trainer.config.cuda_graph_modules:  # whose parts nobody sees
        phases_ms, imbalance = _phases(trainer, microbatches)  # last: it puts clocks into the model
    return Inspection(
        phases_ms=phases_ms, imbalance=imbalance, layer=times, dropped=dropped, **profiles
    )


def _profile(trainer: Trainer, layer: LayerAlone, microbatches: int, trace: Path) -> dict:
    """Profile a step and the layer alone; empty on a CPU and on ranks other than 0."""
    if trainer.device.type != "cuda":
        return {}
    step_events = record(
        lambda: trainer.step(microbatches), trainer.device, trace.with_suffix(".json.gz")
    )
    with trainer.trainee.model.no_sync():
        layer_trace = trace.with_name(f"{trace.name}-layer.json.gz")
        layer_events = record(layer.once, trainer.device, layer_trace)
    if not step_events:
        return {}
    return dict(
        step=summarize_trace(step_events, STEP),
        layer_forward=summarize_trace(layer_events, FORWARD),
        layer_backward=summarize_trace(layer_events, BACKWARD),
        backward_bars=tuple(bars(layer_events, BACKWARD)),
    )


def _dropped(trainer: Trainer, microbatches: int) -> float | None:
    """Return the share of selected experts that tokens did not get in a step; see `Inspection`."""
    config = trainer.trainee.config
    dispatchers = [layer.token_dispatcher for layer in trainer.moe_layers()]
    overflows = [each.overflow for each in dispatchers if getattr(each, "overflow", None)]
    if overflows:
        take_all(overflows)
        trainer.step(microbatches)
        num_dropped = sum(dropped for dropped, _ in take_all(overflows))
        tokens = microbatches * trainer.config.micro_batch_size * trainer.config.seq_length
        share = num_dropped / (tokens * config.moe_router_topk * len(overflows))
        return mean_over_ranks(torch.tensor(share, device=trainer.device))[0]
    if config.moe_expert_capacity_factor is None:
        return None
    kept, selected = [], 0

    def count(router: torch.nn.Module, args: tuple, output: tuple) -> None:
        nonlocal selected
        probs, routing_map = output  # padding is in the map, with probability 0
        kept.append((routing_map & (probs != 0)).sum())
        selected += len(probs) * config.moe_router_topk

    hooks = [layer.router.register_forward_hook(count) for layer in trainer.moe_layers()]
    trainer.step(microbatches)
    for hook in hooks:
        hook.remove()
    if not kept:  # in a graph no hook is called
        return None
    return mean_over_ranks(1 - torch.stack(kept).sum() / selected)[0]


def _phases(trainer: Trainer, microbatches: int) -> tuple[dict[str, float], dict[str, float]]:
    meter = MoEMeter([trainer.trainee.model])
    steps = []
    for _ in range(_METER_STEPS):
        trainer.step(microbatches)
        steps.append(meter.step())
    medians = {key: torch.tensor([step[key] for step in steps]).median().item() for key in steps[0]}
    phases = {phase: medians[f"ep/{phase}-ms"] for phase in ("dispatch", "expert", "combine")}
    imbalance = {what: medians[f"ep/imbalance-{what}"] for what in ("rank", "expert")}
    return phases, imbalance


def _allocated(device: torch.device) -> int:
    """Return the bytes that torch has given out; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _num_allocations(device: torch.device) -> int:
    """Return how often torch asked the driver for memory; 0 on a CPU."""
    return torch.cuda.memory_stats(device)["num_device_alloc"] if device.type == "cuda" else 0


def _describe(block: Block, settings: TrainSettings) -> str:
    return (
        f"block {block.block + 1}/{settings.blocks}: {block.variant}, {block.microbatches} "
        f"microbatch(es): {summarize(block.step_ms).median:.1f} ms, loss {block.loss:.4f}"
    )
