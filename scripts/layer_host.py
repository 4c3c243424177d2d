"""Measure what one MoE layer's forward costs the host with several dispatchers, interleaved.

    torchrun --nproc_per_node=2 --numa-binding exclusive scripts/layer_host.py \
        --config configs/qwen3-30b-a3b-proxy.yaml --expert-model-parallel-size 2 --num-layers 2 \
        --json layer-host.json

A model of each variant (those of ``ep-comm bench train``) stays in memory. Its first MoE layer runs
from idle, now one variant's, now another's, in an order that turns from round to round. *host* is
the time until the call returns, *gpu* until its work is done. Launches and waits are those that
torch's profiler saw in one pass; *without waits* is the host's time in that pass with the waits
taken out. The last column is the host's time over the first variant's, the median over the rounds.

Further flags go to the training example's configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from ep_comm.bench.tables import number
from ep_comm.bench.timing import Stopwatch
from ep_comm.job.environment import surroundings
from ep_comm.job.exits import UserError, needs_extra, user_errors_exit
from ep_comm.job.files import write_json
from ep_comm.job.start import agree, has_launcher, on_rank_0

if TYPE_CHECKING:
    from ep_comm.bench.train.layer import LayerAlone

_WARMUP = 10
_COLUMNS = (
    "forward of one MoE layer; host µs; min; gpu µs; kernels; copies; waits; wait µs; "
    "without waits; ÷ first"
).split("; ")


def main() -> None:
    """Run the measurement, and print its table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file of ep_comm.pretrain")
    parser.add_argument(
        "--variants",
        default="alltoall,ep_comm",
        help="of ep-comm bench train; default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=100, help="samples of each; default: 100")
    parser.add_argument("--json", type=Path, help="file for all samples")
    args, extra = parser.parse_known_args()
    with user_errors_exit(), contextlib.redirect_stdout(sys.stderr), needs_extra("megatron"):
        from ep_comm.bench.train.settings import make_configs, make_train_settings
        from ep_comm.pretrain.start import join, prepare_megatron

        settings = make_train_settings(
            config=args.config,
            extra=extra,
            variants=args.variants,
            microbatches="1",
            blocks=1,
            steps=1,
            warmup=0,
        )
        if not has_launcher():
            raise UserError("start it with torchrun --nproc_per_node=2 scripts/layer_host.py ...")
        device = join()
        configs = agree(lambda: make_configs(settings, dist.get_world_size()))
        prepare_megatron()
        from ep_comm.bench.train.layer import LayerAlone
        from ep_comm.bench.train.model import Trainer

        trainers = {name: Trainer(config, device) for name, config in configs.items()}
        for trainer in trainers.values():
            trainer.step(1)
        layers = {name: LayerAlone(trainer) for name, trainer in trainers.items()}
        with contextlib.ExitStack() as stack:
            first = next(iter(trainers.values()))
            stack.enter_context(first.garbage_collection())
            for trainer in trainers.values():
                stack.enter_context(trainer.trainee.model.no_sync())
            times = _times(layers, device, args.rounds)
            profiles = _profiles(layers, device)
        on_rank_0(lambda: _report(times, profiles, args.json))
    dist.destroy_process_group()


def _times(
    layers: dict[str, LayerAlone], device: torch.device, rounds: int
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Return the µs of each round, by variant: of the slowest rank in each."""
    watch = Stopwatch(device, rounds)
    names = list(layers)
    samples: dict[str, dict[str, list[float]]] = {name: {"host": [], "gpu": []} for name in names}
    for i in range(-_WARMUP, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            watch.align_from_idle()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            output = layers[name].forward()
            host_us = 1e6 * (time.perf_counter() - begin)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            gpu_us = 1e6 * (time.perf_counter() - begin)
            layers[name].backward(output)
            if i >= 0:
                samples[name]["host"].append(host_us)
                samples[name]["gpu"].append(gpu_us)
    return {
        name: {what: watch.slowest(us) for what, us in kinds.items()}
        for name, kinds in samples.items()
    }


def _profiles(layers: dict[str, LayerAlone], device: torch.device) -> dict[str, Any]:
    """Return what the profiler saw in a forward of each variant on rank 0; empty on a CPU."""
    from ep_comm.bench.train.profile import FORWARD, record, summarize_trace

    if device.type != "cuda":
        return {}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, layer in layers.items():
            events = record(layer.once, device, Path(folder, f"{name}.json.gz"))
            if events:
                found[name] = summarize_trace(events, FORWARD)
    return found


def _report(
    times: dict[str, dict[str, tuple[float, ...]]], profiles: dict[str, Any], path: Path | None
) -> None:
    reference = next(iter(times.values()))["host"]
    rows = []
    for name, us in times.items():
        ratio = statistics.median(a / b for a, b in zip(us["host"], reference, strict=True))
        seen = profiles.get(name)
        counted: list[float | None] = [None] * 5
        if seen:
            counted = [seen.kernels, seen.copies, seen.waits, seen.wait_us, seen.host_us]
        host_us, gpu_us = us["host"], us["gpu"]
        measured = [statistics.median(host_us), min(host_us), statistics.median(gpu_us), *counted]
        rows.append([name, *(number(each, ".0f") for each in measured), f"{ratio:.2f}"])
    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*(cell or "–" for cell in row))
    Console(file=sys.__stdout__, width=160).print(table)
    if path is not None:
        write_json(path, _document(rows, times))


def _document(rows: list[list[str | None]], times: dict[str, Any]) -> dict[str, Any]:
    """Return what the JSON file holds: the times of all rounds, and the table for docs/results."""
    found = surroundings()
    gpus = found["gpus"]
    return {
        "title": "The host in the forward of one MoE layer",
        "source": "each variant in turn; launches and waits of one pass under torch's profiler",
        "machine": f"{len(gpus)} × {gpus[0]}" if gpus else "CPU",
        **found,
        "tables": [{"columns": _COLUMNS, "rows": rows}],
        "times": times,
    }


if __name__ == "__main__":
    main()
