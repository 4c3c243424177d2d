"""Measure what the records of operations cost: the same calls with and without them, interleaved.

Records cannot be turned off. So this compares the package's library with one that is built without
them (``-DEP_WITHOUT_RECORDS``), and its host code with one that notes nothing::

    python scripts/recorder_cost.py --build          # minutes; anywhere with nvcc
    torchrun --nproc_per_node=2 scripts/recorder_cost.py --json recorder-cost.json

Three buffers take turns, block by block: with records, without, and with records once more. The
last says what the same thing differs by. On a GPU "graph" is a dispatch in a CUDA graph of 20: the
kernels alone. "host" is how long rank 0's host is in a call, with a known routing and many calls
in a row: then it waits for nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import setuptools
import torch
import torch.distributed as dist

from ep_comm import Buffer, _native
from ep_comm._native import header
from ep_comm.bench.ops.cases import NUM_SETS, InputSet, make_inputs
from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.ops.settings import PRESETS, Settings
from ep_comm.bench.timing import Stopwatch
from ep_comm.job import files
from ep_comm.job.environment import surroundings
from ep_comm.job.exits import UserError, user_errors_exit
from ep_comm.job.start import join
from ep_comm.telemetry.device import DeviceRecorder

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "build" / "recorder_cost" / "libep_comm.so"
WITH, WITHOUT, AGAIN = "with", "without", "with again"
OPS_OF_A_GRAPH = 20
HOST_TURNS, HOST_CALLS = 10, 20  # of a block; calls in a row
MOST = 0.01  # of a dispatch


class Unrecorded(DeviceRecorder):
    """Gives kernels an address, and notes nothing but the number of operations."""

    def start(self, op: int, rows_of_experts: bytes = b"") -> int:
        self.num_operations += 1
        if op == header.EP_OP_DISPATCH:
            self.num_dispatches += 1
        return self._address

    def complete(
        self, row_bytes: int, rows_of_experts: bytes = b"", number: int | None = None
    ) -> None:
        pass


@dataclass(frozen=True)
class Cost:
    """One figure of one call: what each turn took in µs, by `WITH`, `WITHOUT` and `AGAIN`."""

    preset: str
    call: str
    what: str
    us: dict[str, list[float]]

    def ratio(self, name: str) -> float:
        """Return the median over turns of a buffer's time over that without records, less one."""
        other = WITHOUT if name == WITH else WITH
        return median(a / b for a, b in zip(self.us[name], self.us[other], strict=True)) - 1

    def as_json(self) -> dict[str, Any]:
        return {
            **{"preset": self.preset, "call": self.call, "what": self.what, "us": self.us},
            **{"cost": self.ratio(WITH), "noise": self.ratio(AGAIN)},
        }


def build_command(output: Path) -> list[str]:
    """Return what compiles `output`, as setup.py compiles the package's library."""
    with mock.patch.object(setuptools, "setup"):
        spec = importlib.util.spec_from_file_location("ep_comm_setup", ROOT / "setup.py")
        assert spec is not None and spec.loader is not None
        setup = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(setup)
    nvcc = setup.find_nvcc()
    if nvcc is None:
        raise UserError("there is no nvcc (CUDA_HOME, PATH, /usr/local/cuda)")
    command = setup.nvcc_command(nvcc, setup.known_archs(nvcc, setup.wanted_archs()))
    sources = setup.LIBRARY.sources
    return [*command, "-DEP_WITHOUT_RECORDS", *sources, *setup.link_flags(output)]


@contextlib.contextmanager
def without_records(path: Path) -> Iterator[None]:
    """Have a buffer that is made in here take the library at `path`, and note nothing."""
    library = _native.NativeLibrary(path)
    with (
        mock.patch.object(_native, "load", lambda: library),
        mock.patch("ep_comm.backends.nvlink.backend.DeviceRecorder", Unrecorded),
    ):
        yield


def measure(
    preset: str, settings: Settings, device: torch.device, blocks: int, library: Path
) -> list[Cost]:
    """Measure dispatches of three buffers in turn. Collective."""
    watch = Stopwatch(device, settings.iters)
    inputs = make_inputs(settings, dist.get_rank(), device)
    buffers, calls = {}, {}
    for name in (WITH, WITHOUT, AGAIN):
        on_gpu = device.type == "cuda"
        outside = name == WITHOUT and on_gpu
        with without_records(library) if outside else contextlib.nullcontext():
            buffers[name] = Buffer(None, settings.buffer_config(device))
        calls[name] = calls_of(buffers[name], inputs, on_gpu)
        for call in calls[name].values():
            for i in range(2 * NUM_SETS):
                call(i)
    found: dict[tuple[str, str], dict[str, list[float]]] = {}

    def note(what: str, figure: str, name: str, us: float) -> None:
        found.setdefault((what, figure), {}).setdefault(name, []).append(us)

    # Every order: what a buffer's calls leave in caches meets each of the others alike.
    orders = list(itertools.permutations(calls))
    for block in range(blocks):
        for what in calls[WITH]:
            for name in orders[block % len(orders)]:
                us = median(watch.measure(calls[name][what]).call)
                note(what, "GPU", name, us / (OPS_OF_A_GRAPH if what == "graph" else 1))
        for turn in range(HOST_TURNS):
            for name in orders[(block + turn) % len(orders)]:
                note(
                    "cached",
                    "host",
                    name,
                    watch.host_back_to_back(calls[name]["cached"], HOST_CALLS),
                )
    del calls
    for buffer in buffers.values():
        buffer.destroy()
    return [Cost(preset, what, figure, us) for (what, figure), us in found.items()]


def calls_of(
    buffer: Buffer, inputs: list[InputSet], on_gpu: bool
) -> dict[str, Callable[[int], object]]:
    """Return dispatches by name, each a function of the number of the call."""
    handles = [buffer.dispatch(s.x, s.topk_idx, s.topk_weights).handle for s in inputs]

    def fresh(i: int) -> object:
        s = inputs[i % NUM_SETS]
        return buffer.dispatch(s.x, s.topk_idx, s.topk_weights)

    def cached(i: int) -> object:
        s = inputs[i % NUM_SETS]
        return buffer.dispatch(s.x, topk_weights=s.topk_weights, handle=handles[i % NUM_SETS])

    found: dict[str, Callable[[int], object]] = {"fresh": fresh, "cached": cached}
    if on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for i in range(OPS_OF_A_GRAPH):
                cached(i)
        found["graph"] = lambda _: graph.replay()
    return found


def document(costs: list[Cost]) -> dict[str, Any]:
    """Return what the JSON file holds: the times of all turns, and the table for docs/results."""
    found = surroundings()
    gpus = found["gpus"]
    columns = ["dispatch", "time", "with, µs", "without, µs", "cost, %", "told apart, %"]
    rows = []
    for cost in costs:
        with_us, without_us = (f"{median(cost.us[name]):.1f}" for name in (WITH, WITHOUT))
        percent = (f"{100 * cost.ratio(name):+.1f}" for name in (WITH, AGAIN))
        rows.append([f"{cost.preset}, {cost.call}", cost.what, with_us, without_us, *percent])
    return {
        "title": "What records of operations cost",
        "source": "the same calls with and without them, in turns; last column: the same twice",
        "machine": f"{len(gpus)} × {gpus[0]}" if gpus else "CPU",
        **found,
        "tables": [{"columns": columns, "rows": rows}],
        "costs": [cost.as_json() for cost in costs],
    }


def show(costs: list[Cost]) -> None:
    for cost in costs:
        us = {name: median(values) for name, values in cost.us.items()}
        verdict = "" if cost.ratio(WITH) <= MOST else f"  MORE THAN {MOST:.0%}"
        print(
            f"{cost.preset} {cost.call:7s} {cost.what:15s} with {us[WITH]:8.2f} us  without "
            f"{us[WITHOUT]:8.2f} us  cost {cost.ratio(WITH):+.2%}  noise {cost.ratio(AGAIN):+.2%}"
            f"{verdict}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", action="store_true", help="build the library without records")
    parser.add_argument("--library", type=Path, default=LIBRARY, help="the one without records")
    parser.add_argument("--blocks", type=int, default=20, help="turns of each buffer")
    parser.add_argument("--iters", type=int, default=20, help="samples of a block")
    parser.add_argument("--json", type=Path, help="file for the times of all turns")
    args = parser.parse_args()
    with user_errors_exit():
        if args.build:
            args.library.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(build_command(args.library.resolve()), cwd=ROOT, check=True)
            print(f"built {args.library}")
            return
        device = join()
        if device.type == "cuda" and not args.library.exists():
            raise UserError(f"{args.library} is not there: run it with --build first")
        costs = []
        for preset, shape in PRESETS.items():
            settings = Settings(
                shape=shape,
                routing=RoutingSpec(),
                sms=(0,),
                fp8=False,
                layout="expert",
                iters=args.iters,
            )
            costs += measure(preset, settings, device, args.blocks, args.library)
        if dist.get_rank() == 0:
            show(costs)
            if args.json is not None:
                files.write_json(args.json, document(costs))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
