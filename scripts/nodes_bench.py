"""Time the backend between nodes against NVLink's, on the same GPUs in the same run.

Nodes are parts of this host, and NVLink is their network (`EPConfig(backend="nodes")`), as fast as
it is or throttled::

    torchrun --nproc_per_node=4 scripts/nodes_bench.py --ranks-per-node 2 --gb-per-s 50 \\
        --json nodes-h200-2x2-throttled.json

``ep-comm plan --check FILE`` compares the model with the JSON. It is that of ``ep-comm bench`` for
the backend between nodes, with "ranks_per_node", "network_gb_per_s" (null: not throttled) and, in
"one_node", the results of NVLink's.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ep_comm import Buffer
from ep_comm.bench.ops.cases import buffer_cases, make_inputs
from ep_comm.bench.ops.probe import Limit, measure_limit
from ep_comm.bench.ops.report import document
from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.ops.run import Result, Run, imbalances, warm_up
from ep_comm.bench.ops.settings import LAYOUTS, PRESETS, Settings, shape_of_flags
from ep_comm.bench.timing import Stopwatch, summarize
from ep_comm.job import files
from ep_comm.job.exits import UserError, user_errors_exit
from ep_comm.job.start import join


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ranks-per-node", type=int, default=2, help="GPUs that are taken for a node; default: 2"
    )
    parser.add_argument(
        "--gb-per-s", type=float, default=0.0, help="rate of each rank's network; default: NVLink's"
    )
    parser.add_argument(
        "--shape", choices=sorted(PRESETS), help="sizes; default: W1, or the capture's"
    )
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
    parser.add_argument("--json", type=Path, help="file for all samples")
    args = parser.parse_args()
    with user_errors_exit():
        spec = RoutingSpec.of_flags(None, args.num_groups, args.topk_groups, replay=args.replay)
        settings = Settings(
            shape=shape_of_flags(args.shape, spec),
            routing=spec,
            sms=(args.sms,),
            fp8=True,
            layout=args.layout,
            iters=args.iters,
        )
        settings.check()
        device = join()
        if dist.get_world_size() % args.ranks_per_node:
            raise UserError(
                f"--ranks-per-node {args.ranks_per_node} does not divide the "
                f"{dist.get_world_size()} ranks"
            )
        settings.routing.check_job(dist.get_world_size(), settings.shape.tokens)
        one_node, nodes = measure(settings, device, args.ranks_per_node, args.gb_per_s)
    if dist.get_rank() == 0:
        show(one_node, nodes)
        if args.json is not None:
            found = as_json(one_node, nodes, args.ranks_per_node, args.gb_per_s)
            files.write_json(args.json, found)
    dist.barrier()
    dist.destroy_process_group()


def measure(
    settings: Settings,
    device: torch.device,
    ranks_per_node: int,
    gb_per_s: float,
    measure_limit: Callable[[Stopwatch], Limit] = measure_limit,
) -> tuple[Run, Run]:
    """Return a run of NVLink's backend and one of that between nodes. Collective."""
    watch = Stopwatch(device, settings.iters)
    limit = measure_limit(watch)
    inputs = make_inputs(settings, dist.get_rank(), device)
    rank_imbalance, expert_imbalance = imbalances(settings, inputs, device)
    config = settings.buffer_config(device)
    (num_sms,) = settings.sms
    runs = []
    for size in (None, ranks_per_node):
        config = dataclasses.replace(config, ranks_per_node=size)
        if size is not None and device.type == "cuda":
            config = dataclasses.replace(config, backend="nodes")
        with Buffer(None, config) as buffer:
            if config.backend == "nodes":
                buffer._session.backend.throttle(gb_per_s * 1e9)
            buffer.set_num_sms(num_sms or None)
            results = []
            for case in buffer_cases(buffer, inputs, settings):
                wire_bytes = warm_up(case, device)
                results.append(
                    Result(
                        case=case.name,
                        num_sms=num_sms,
                        samples=watch.measure(case.call, buffer.records),
                        wire_bytes=wire_bytes,
                        floor_bytes=wire_bytes,
                        logical_bytes=case.logical_bytes,
                    )
                )
            runs.append(
                Run(
                    settings=settings,
                    num_ranks=dist.get_world_size(),
                    backend=buffer.describe(),
                    buffer_bytes=buffer.buffer_bytes,
                    limit=limit,
                    rank_imbalance=rank_imbalance,
                    expert_imbalance=expert_imbalance,
                    results=tuple(results),
                )
            )
    return runs[0], runs[1]


def show(one_node: Run, nodes: Run) -> None:
    for ours, theirs in zip(nodes.results, one_node.results, strict=True):
        us, nvlink_us = (summarize(result.samples.call).median for result in (ours, theirs))
        both = f"nvlink {nvlink_us:8.1f} us  nodes {us:8.1f} us  {us / nvlink_us:.2f} x"
        print(f"{ours.case:40s} {both}")


def as_json(one_node: Run, nodes: Run, ranks_per_node: int, gb_per_s: float) -> dict:
    found = document(nodes)
    throttle = f", network of {gb_per_s:g} GB/s" if gb_per_s else ""
    return {
        **found,
        "headline": f"{found['headline']}; nodes of {ranks_per_node} ranks{throttle}",
        "ranks_per_node": ranks_per_node,
        "network_gb_per_s": gb_per_s or None,
        "one_node": document(one_node)["results"],
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
