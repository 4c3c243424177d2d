"""Statistics, traces and files of faults over NVLink."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ep_comm import Buffer, EPConfig, EPTimeoutError, fault_file
from ep_comm.telemetry.explain import read_story

pytestmark = pytest.mark.multi_gpu

SIZES = dict(num_experts=32, hidden=2048, max_tokens_per_rank=1024, num_topk=4, backend="nvlink")
LATE_CYCLES = 20_000_000  # about 10 ms
_kept: list[Buffer] = []


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(1024, 2048, device="cuda").bfloat16()
    return x, torch.stack([torch.randperm(32)[:4] for _ in range(1024)]).cuda()


def a_late_gpu(rank: int, folder: str) -> dict:
    buffer = Buffer(None, EPConfig(**SIZES))
    x, topk = inputs()
    x.requires_grad_(True)
    for step in range(30):
        if rank == 1 and step >= 10:
            torch.cuda._sleep(LATE_CYCLES)
        out = buffer.dispatch(x, topk)
        buffer.combine(out.recv_x, out.handle).combined_x.sum().backward()
    stats, of_all = buffer.stats(), buffer.stats_of_all_ranks()
    buffer.write_trace(Path(folder, "trace.json"))
    buffer.destroy()
    return dict(stats=stats, of_all=of_all)


def test_a_late_gpu_is_named_and_seen_in_the_trace(tmp_path):
    results = run_ranks(2, a_late_gpu, str(tmp_path), backend="nccl")
    for got in results:
        slowest = got["of_all"].slowest
        assert slowest.rank == 1 and int(slowest.since_op.rpartition("#")[2]) in range(18, 24)
        kinds = {kind: stats.seconds.num for kind, stats in got["stats"].operations.items()}
        names = ("dispatch", "combine", "dispatch of backward", "combine of backward")
        assert kinds == dict.fromkeys(names, 30)
    assert results[0]["stats"].slowest.rank == 1
    document = json.loads((tmp_path / "trace.json").read_text())
    assert all(0 < error < 200 for error in document["otherData"]["clock error, us"].values())
    spans = {(e["pid"], e["name"]): e for e in document["traceEvents"] if e["ph"] == "X"}
    for epoch in range(1, 61):
        # No rank's operation ends before the other's has begun: each receives from each.
        first, second = (spans[rank, f"combine #{epoch}"] for rank in (0, 1))
        slack = sum(document["otherData"]["clock error, us"].values())
        assert first["ts"] < second["ts"] + second["dur"] + slack
        assert second["ts"] < first["ts"] + first["dur"] + slack


def against_the_profiler(rank: int) -> tuple[float, float]:
    """Medians of the same cached dispatches: by their records, by torch's profiler."""
    buffer = Buffer(None, EPConfig(**SIZES))
    x, topk = inputs()
    handle = buffer.dispatch(x, topk).handle
    for _ in range(20):
        buffer.dispatch(x, handle=handle)
    torch.cuda.synchronize()
    before = buffer.records.num_operations
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(50):
            buffer.dispatch(x, handle=handle)
        torch.cuda.synchronize()
    recorded = [record.seconds for record in buffer.records.since(before)]
    kernels = [
        event.device_time_total / 1e6
        for event in profiler.events()
        if "dispatch" in event.name and event.device_time_total > 0
    ]
    assert len(recorded) == len(kernels) == 50
    buffer.destroy()
    return statistics.median(recorded), statistics.median(kernels)


def test_records_say_what_the_profiler_says():
    for recorded, profiled in run_ranks(2, against_the_profiler, backend="nccl"):
        print(f"recorded {1e6 * recorded:.1f} us, profiled {1e6 * profiled:.1f} us")
        # A record begins with the first warp and ends with the last: without the launch's ends.
        assert profiled - 4e-6 < recorded < profiled * 1.03


def one_stays_away(rank: int, folder: str) -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fault_file.FOLDER_VARIABLE, folder)
        buffer = Buffer(None, EPConfig(**SIZES, timeout_s=3))
        x, topk = inputs()
        handle = buffer.dispatch(x, topk).handle
        torch.cuda.synchronize()
        dist.barrier()
        if rank == 1:
            _kept.append(buffer)
            return None
        with pytest.raises(EPTimeoutError) as caught:
            buffer.dispatch(x, handle=handle)
            buffer.synchronize()
        return str(caught.value)


def test_who_stayed_away_is_found_in_the_files(tmp_path):
    texts = run_ranks(2, one_stays_away, str(tmp_path), backend="nccl", fresh=True)
    story = read_story(tmp_path.iterdir())
    assert story.culprits == (1,) and str(story.ranks[0].path) in texts[0]
    last = story.ranks[0].last
    assert (last["op"], last["epoch"]) == ("dispatch", 1) and last["seconds"] < 1
