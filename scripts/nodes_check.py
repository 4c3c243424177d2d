"""Dispatch, combine and both backwards between hosts, bit by bit against the tests' oracle.

Started on every host by torchrun or srun (scripts/two_nodes.sh)::

    torchrun --nnodes=2 ... scripts/nodes_check.py --cases 40

`--backend reference` does the same over NCCL or gloo. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ep_comm import Buffer, EPError
from ep_comm.job.exits import UserError, user_errors_exit
from ep_comm.job.start import has_launcher, join

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

from buffer_cases import check_results, on_gpus, random_case, run_case  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20, help="random cases; default: 20")
    parser.add_argument(
        "--backend", choices=("nodes", "reference"), default="nodes", help="default: nodes"
    )
    args = parser.parse_args()
    with user_errors_exit():
        if not has_launcher():
            raise UserError("start it with torchrun or srun: see scripts/two_nodes.sh")
        device = join(timedelta(seconds=120))
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_wrong = 0
    for seed in range(args.cases):
        with contextlib.redirect_stdout(io.StringIO()):  # every rank would print it
            case = random_case(9000 + seed, num_ranks)
        case = dataclasses.replace(case, ranks_per_node=int(os.environ["LOCAL_WORLD_SIZE"]))
        if device.type == "cuda":
            case = on_gpus(case, args.backend)
        else:
            case = dataclasses.replace(case, device="cpu", backend=args.backend, hidden=64)
        with Buffer(None, case.config()) as buffer:
            mine, name = run_case(rank, case, buffer), buffer.describe()
        results = [None] * num_ranks if rank == 0 else None
        dist.gather_object(mine, results)
        if rank == 0:
            try:
                check_results(case, results, lambda *_: None)  # bytes depend on the backend
                print(f"case {seed}: right, {name}, {case.tokens} tokens", flush=True)
            except AssertionError as error:
                num_wrong += 1
                print(f"case {seed} ({case}): WRONG: {error}", flush=True)
    wrong_everywhere = torch.tensor([num_wrong], device=device)
    dist.broadcast(wrong_everywhere, 0)
    dist.destroy_process_group()
    return int(wrong_everywhere.item() > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EPError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # in order it would wait for the others
