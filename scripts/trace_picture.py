"""Draw what a late rank does to the others: the picture in docs/recorder.md.

A few steps of dispatch, experts, combine and backward; from the middle on rank 1 is late for each,
by twice what a step takes. On GPUs over NVLink, elsewhere on the reference backend::

    torchrun --nproc_per_node=4 scripts/trace_picture.py --out runs/trace
    cp runs/trace/trace.png docs/results/trace-late-rank.png

The folder then has the trace, the profile of each rank, and both in one file. The figures are those
of ``ep-comm trace``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from ep_comm import Buffer, EPConfig
from ep_comm.cli.trace import trace
from ep_comm.job.exits import user_errors_exit
from ep_comm.job.start import join, on_rank_0

LATE, STEPS, WARM_UP = 1, 6, 4
OPS_OF_A_STEP = 4  # dispatch and combine, forward and backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/trace"), help="folder; default: %(default)s"
    )
    args = parser.parse_args()
    with user_errors_exit():
        device = join()
        on_rank_0(lambda: args.out.mkdir(parents=True, exist_ok=True))
        record(device, args.out)
        on_rank_0(lambda: show(args.out))
    dist.barrier()
    dist.destroy_process_group()


def record(device: torch.device, out: Path) -> None:
    """Write the trace of all ranks, and each rank's profile. Collective."""
    on_gpu = device.type == "cuda"
    tokens, hidden, dtype = (4096, 4096, torch.bfloat16) if on_gpu else (256, 256, torch.float32)
    experts = 8 * dist.get_world_size()
    config = EPConfig(
        num_experts=experts, hidden=hidden, max_tokens_per_rank=tokens, num_topk=4, dtype=dtype
    )
    x = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(hidden, hidden, device=device, dtype=dtype, requires_grad=True)
    topk_idx = torch.rand(tokens, experts, device=device).topk(4).indices
    with Buffer(None, config) as buffer:

        def step() -> None:
            out = buffer.dispatch(x, topk_idx)
            rows = out.recv_x @ weight @ weight  # of all experts at once
            buffer.combine(rows, out.handle).combined_x.float().square().mean().backward()

        def seconds_of_a_step() -> float:
            buffer.synchronize()
            dist.barrier()
            begin = time.perf_counter()
            step()
            buffer.synchronize()
            return time.perf_counter() - begin

        late_s = 2 * min(seconds_of_a_step() for _ in range(WARM_UP))
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=kinds) as profiler:
            dist.barrier()  # the profiler takes a while to begin
            for i in range(STEPS):
                if dist.get_rank() == LATE and i >= STEPS // 2:
                    time.sleep(late_s)
                step()
                buffer.synchronize()
        buffer.write_trace(out / "trace.json", OPS_OF_A_STEP * STEPS)
        profiler.export_chrome_trace(str(profile_of(out, dist.get_rank())))


def profile_of(out: Path, rank: int) -> Path:
    return out / f"profile-{rank}.json.gz"


def show(out: Path) -> None:
    """Print the figures, write one trace of all files, and draw it."""
    profiles = [profile_of(out, rank) for rank in range(dist.get_world_size())]
    files = out / "trace.json", profiles, out / "all.json.gz", out / "trace.png"
    trace(*files, window_ms=None, console=Console(soft_wrap=True))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
