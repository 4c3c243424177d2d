"""Time the backend between nodes against NVLink's, on the same GPUs in the same run.

Nodes are parts of this host, and NVLink is their network (`EPConfig(backend="nodes")`), as fast as
it is or throttled::

    torchrun --nproc_per_node=4 scripts/nodes_bench.py --ranks-per-node 2 --gb-per-s 50
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
import torch.distributed as dist

from ep_comm import Buffer
from ep_comm.bench.ops.cases import NUM_SETS, buffer_cases, make_inputs
from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.ops.settings import LAYOUTS, PRESETS, Settings
from ep_comm.bench.timing import Stopwatch, summarize
from ep_comm.job.start import join


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument(
        "--gb-per-s", type=float, default=0.0, help="of each rank's network; 0: all"
    )
    parser.add_argument("--shape", choices=sorted(PRESETS), default="W1")
    parser.add_argument("--layout", choices=LAYOUTS, default="expert")
    parser.add_argument("--sms", type=int, help="of an operation; default: all")
    parser.add_argument("--iters", type=int, default=50)
    args = parser.parse_args()
    device = join()
    settings = Settings(
        shape=PRESETS[args.shape],
        routing=RoutingSpec(),
        sms=(0,),
        fp8=True,
        layout=args.layout,
        iters=args.iters,
    )
    watch = Stopwatch(device, settings.iters)
    inputs = make_inputs(settings, dist.get_rank(), device)
    config = settings.buffer_config(device)
    times: dict[str, list[float]] = {}
    for name in ("nvlink", "nodes"):
        size = args.ranks_per_node if name == "nodes" else None
        buffer = Buffer(None, dataclasses.replace(config, backend=name, ranks_per_node=size))
        if name == "nodes":
            buffer._session.backend.throttle(args.gb_per_s * 1e9)
        buffer.set_num_sms(args.sms)
        for case in buffer_cases(buffer, inputs, settings):
            for i in range(2 * NUM_SETS):
                case.call(i)
            median = summarize(watch.measure(case.call).call).median
            times.setdefault(case.name, []).append(median)
        buffer.destroy()
    if dist.get_rank() == 0:
        for case, (nvlink, nodes) in times.items():
            print(
                f"{case:40s} nvlink {nvlink:8.1f} us  nodes {nodes:8.1f} us  {nodes / nvlink:.2f} x"
            )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
