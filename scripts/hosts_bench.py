"""Time dispatch and combine between hosts, and what they bring to the network.

Started on every host by torchrun or srun (scripts/two_nodes.sh does)::

    torchrun --nnodes=2 ... scripts/hosts_bench.py --shape W1 --sms 24

For parts of one host, with NVLink for a network, there is scripts/nodes_bench.py.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from ep_comm import Buffer
from ep_comm.bench.ops.cases import buffer_cases, make_inputs
from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.ops.run import warm_up
from ep_comm.bench.ops.settings import LAYOUTS, PRESETS, Settings, shape_of_flags
from ep_comm.bench.timing import Stopwatch, summarize
from ep_comm.job.exits import UserError, user_errors_exit
from ep_comm.job.start import has_launcher, join


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", choices=sorted(PRESETS), help="sizes; default: W1, or the capture's"
    )
    parser.add_argument("--tokens", type=int, help="of a rank; default: the shape's")
    parser.add_argument(
        "--num-groups", type=int, help="groups of experts; default: uniform routing"
    )
    parser.add_argument("--topk-groups", type=int, help="groups that a token selects from")
    parser.add_argument("--replay", type=Path, help="folder of a captured routing")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="expert", help="order of the rows; default: expert"
    )
    parser.add_argument("--sms", type=int, default=0, help="of an operation; default: all")
    parser.add_argument("--iters", type=int, default=50, help="samples of each time; default: 50")
    args = parser.parse_args()
    with user_errors_exit():
        spec = RoutingSpec.of_flags(None, args.num_groups, args.topk_groups, replay=args.replay)
        settings = Settings(
            shape=shape_of_flags(args.shape, spec, tokens=args.tokens),
            routing=spec,
            sms=(args.sms,),
            fp8=True,
            layout=args.layout,
            iters=args.iters,
        )
        settings.check()
        if not has_launcher():
            raise UserError("start it with torchrun or srun: see scripts/two_nodes.sh")
        device = join()
        settings.routing.check_job(dist.get_world_size(), settings.shape.tokens)
        measure(settings, device)
    dist.barrier()
    dist.destroy_process_group()


def measure(settings: Settings, device: torch.device) -> None:
    watch = Stopwatch(device, settings.iters)
    inputs = make_inputs(settings, dist.get_rank(), device)
    with Buffer(None, settings.buffer_config(device)) as buffer:
        buffer.set_num_sms(settings.sms[0] or None)
        say(f"{dist.get_world_size()} ranks: {buffer.describe()}")
        for case in buffer_cases(buffer, inputs, settings):
            warm_up(case, device)
            us = summarize(watch.measure(case.call).call).median
            gb_per_s = most_of_all(bytes_to_other_hosts(buffer), device) / us / 1e3
            say(f"{case.name:40s} {us:9.1f} us  {gb_per_s:6.1f} GB/s of a GPU to other hosts")


def bytes_to_other_hosts(buffer: Buffer) -> int:
    """Those that this rank sent in the last operation."""
    sent = list(buffer.records)[-1].wire_bytes_to_rank
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    first = buffer.rank // local_ranks * local_ranks
    return sum(sent) - sum(sent[first : first + local_ranks])


def most_of_all(value: int, device: torch.device) -> float:
    most = torch.tensor([float(value)], dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
