"""Run random operations for as long as you like, and check every value that arrives.

    torchrun --nproc_per_node=4 scripts/soak.py --operations 100000 --seconds 500 --state soak.json

Tokens, routing, shapes, SM counts, streams, graphs are random, normal and low-latency operations
mixed. Each result is checked on the device by sums that share no code with our kernels
(`soak_checks`), one step in fifty against the reference backend too, bit by bit. All of it follows
from the seed. With the same `--state` another call goes on where one has stopped.

`--plant N` flips one bit of what operation N, or the next with rows, brings to the last rank: it
has to be found.

Exits with 1 where a value is wrong, or where memory, threads or open files grow.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ep_comm import Buffer, EPConfig, EPError
from ep_comm.job.environment import surroundings
from ep_comm.job.exits import UserError, user_errors_exit
from ep_comm.job.files import write_json
from ep_comm.job.start import has_launcher, join, on_rank_0

sys.path.insert(0, str(Path(__file__).parent))

from soak_checks import Checker, Place  # noqa: E402
from soak_steps import STEPS, Step  # noqa: E402

_FULL_EVERY = 50  # steps
_WARM_UP = 2  # rounds, until what is made once is made
# How far each may grow while rounds come and go: allocators keep pieces, and no count may.
_MAY_GROW = {"device MiB": 64.0, "host MiB": 96.0, "threads": 0, "files": 0}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a call is to do; `operations` with those of earlier calls."""

    operations: int
    seconds: float
    seed: int
    state: Path | None
    backend: str
    round_operations: int
    plant: int | None
    timeout_s: float


@dataclass
class State:
    """How far a soak has come; what is in its file."""

    seed: int
    ranks: int
    rounds: int = 0
    operations: int = 0
    full: int = 0
    wrong: int = 0
    calls: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    options = parse_args()
    with user_errors_exit():
        if not has_launcher():
            raise UserError("start it with torchrun, see the first lines of scripts/soak.py")
        device = join(timedelta(seconds=120))
        sound = soak(options, device)
    dist.destroy_process_group()
    return int(not sound)


def parse_args(words: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--operations",
        type=int,
        default=100_000,
        help="of all calls with this --state, in whole rounds; default: 100000",
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no round after these"
    )
    parser.add_argument("--seed", type=int, default=0, help="all is drawn from it; default: 0")
    parser.add_argument("--state", type=Path, help="where to note how far it has come")
    parser.add_argument("--backend", default="auto", help="default: the fastest that there is")
    parser.add_argument(
        "--round-operations",
        type=int,
        default=2000,
        help="of one buffer, which is a round; default: 2000",
    )
    parser.add_argument("--plant", type=int, help="operation whose result gets a wrong bit")
    parser.add_argument(
        "--timeout-s", type=float, default=30.0, help="bound of every wait; default: 30"
    )
    return Options(**vars(parser.parse_args(words)))


def soak(options: Options, device: torch.device) -> bool:
    """Run rounds until it is enough. Collective. Returns whether all was right and nothing grew."""
    is_first = dist.get_rank() == 0
    state = State(**on_rank_0(lambda: asdict(read_state(options))))
    done_before, start = state.operations, time.monotonic()
    used: list[dict[str, float]] = []
    while state.operations < options.operations:
        if on_rank_0(lambda: time.monotonic() - start > options.seconds):
            break
        operations, full, wrong = run_round(options, state, device)
        state.rounds += 1
        state.operations += operations
        state.full += full
        state.wrong += wrong
        used.append(resources(device))
        if is_first:
            rate = (state.operations - done_before) / (time.monotonic() - start)
            shown = ", ".join(f"{name} {value:.0f}" for name, value in used[-1].items())
            print(
                f"round {state.rounds}: {state.operations} operations, {state.full} steps in full, "
                f"{state.wrong} wrong, {rate:.0f}/s; {shown}",
                flush=True,
            )
    grown = growth(used)
    if is_first:
        took = time.monotonic() - start
        call = {"operations": state.operations - done_before, "seconds": took, "grown": grown}
        state.calls.append({**surroundings(), **call})
        if options.state and options.plant is None:
            write_json(options.state, asdict(state))
    too_much = {name: by for name, by in grown.items() if by > _MAY_GROW[name]}
    grows = any_rank(bool(too_much), device)
    if too_much:
        print(f"rank {dist.get_rank()}: grown by {too_much}", flush=True)
    return state.wrong == 0 and not grows


def read_state(options: Options) -> State:
    if options.state is None or not options.state.exists():
        return State(options.seed, dist.get_world_size())
    try:
        state = State(**json.loads(options.state.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"--state {options.state} is no state of a soak: {error}") from None
    if (state.seed, state.ranks) != (options.seed, dist.get_world_size()):
        raise UserError(
            f"--state {options.state} is of seed {state.seed} on {state.ranks} ranks: give another "
            "file, or the same again"
        )
    return state


def run_round(options: Options, state: State, device: torch.device) -> tuple[int, int, int]:
    """One buffer, from its making to its end. Returns operations, full checks, wrong values."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    rng = np.random.default_rng([options.seed, state.rounds])  # the same on all ranks
    config = random_config(rng, num_ranks, options)
    place = Place(rank, num_ranks, device)
    number, full = state.operations, 0
    with Buffer(None, config) as buffer, reference(config) as other:
        checker = Checker(place, config, number, options.plant)
        own = np.random.default_rng([options.seed, state.rounds, rank])
        step = Step(buffer, other, config, checker, rng, own)
        names = [name for name, (_, needs_gpu) in STEPS.items() if step.on_gpu or not needs_gpu]
        num_steps = 0
        while checker.number < number + options.round_operations:
            num_steps += 1
            if num_steps % _FULL_EVERY == 1:
                step.in_full()
                full += 1
            else:
                call, _ = STEPS[names[int(rng.integers(len(names)))]]
                with step.on_a_stream():
                    call(step)
        buffer.synchronize()
        wrong = checker.flush()
    total = torch.tensor([wrong], device=device)
    dist.all_reduce(total)
    return checker.number - number, full, int(total)


def random_config(rng: np.random.Generator, num_ranks: int, options: Options) -> EPConfig:
    per_rank = int(rng.choice([1, 2, 3, 8, 16]))
    tokens = int(rng.choice([16, 64, 128]))
    return EPConfig(
        num_experts=per_rank * num_ranks,
        hidden=int(rng.choice([512, 1024, 2048])),
        max_tokens_per_rank=tokens,
        num_topk=int(min(rng.choice([1, 2, 4, 8]), per_rank * num_ranks)),
        dtype=torch.float32,  # so that rows of every type fit
        low_latency_tokens=tokens,
        backend=options.backend,
        timeout_s=options.timeout_s,
    )


@contextmanager
def reference(config: EPConfig) -> Iterator[Buffer]:
    """A second buffer, whose operations are torch's alone."""
    changes = {**vars(config), "backend": "reference", "network": None}
    with Buffer(None, EPConfig(**changes)) as buffer:
        yield buffer


def resources(device: torch.device) -> dict[str, float]:
    """What this process holds when nothing runs."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = {"host MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        held["device MiB"] = (total - free) / 2**20
    held["threads"] = len(os.listdir("/proc/self/task"))
    held["files"] = len(os.listdir("/proc/self/fd"))
    return held


def growth(used: list[dict[str, float]]) -> dict[str, float]:
    """By how much each has grown since the first rounds: the least of either half is compared."""
    used = used[_WARM_UP:]
    if len(used) < 2:
        return {}
    half = len(used) // 2
    return {
        name: min(each[name] for each in used[half:]) - min(each[name] for each in used[:half])
        for name in used[0]
    }


def any_rank(here: bool, device: torch.device) -> bool:
    found = torch.tensor([int(here)], device=device)
    dist.all_reduce(found)
    return bool(found)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EPError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # in order it would wait for the others
