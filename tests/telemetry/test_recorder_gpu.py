"""Statistics, traces and files of faults over NVLink."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ep_comm import Buffer, EPConfig, EPTimeoutError, fault_file
from ep_comm.telemetry.beside import Beside, beside
from ep_comm.telemetry.explain import read_story
from ep_comm.telemetry.profiles import read_profile
from ep_comm.telemetry.records import timed
from ep_comm.telemetry.spans import covered, exposed
from ep_comm.telemetry.trace import read_trace

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


@pytest.mark.own_gpus
def test_records_say_what_the_profiler_says():
    for recorded, profiled in run_ranks(2, against_the_profiler, backend="nccl"):
        print(f"recorded {1e6 * recorded:.1f} us, profiled {1e6 * profiled:.1f} us")
        # A record begins with the first warp and ends with the last: without the launch's ends.
        assert profiled - 4e-6 < recorded < profiled * 1.03


def events_on_the_records_axis(rank: int) -> list[float]:
    """By how many seconds an event before and one behind a dispatch are outside of its record."""
    buffer = Buffer(None, EPConfig(**SIZES))
    x, topk = inputs()
    handle = buffer.dispatch(x, topk).handle
    for _ in range(3):
        with timed(x.device) as span:
            buffer.dispatch(x, handle=handle)
    torch.cuda.synchronize()
    (record,) = buffer.records.since(buffer.records.num_operations - 1)
    begin, end = span.on_axis(buffer.records.origin())
    buffer.destroy()
    return [record.began_s - begin, end - record.began_s - record.seconds]


@pytest.mark.own_gpus
def test_events_can_be_set_beside_records():
    for before_s, behind_s in run_ranks(2, events_on_the_records_axis, backend="nccl"):
        print(f"event {1e6 * before_s:.1f} us before, {1e6 * behind_s:.1f} us behind the record")
        assert -10e-6 < before_s < 200e-6  # the host launches meanwhile
        assert -10e-6 < behind_s < 50e-6


def beside_the_profiler(rank: int, folder: str) -> tuple[Beside, float, float]:
    """Backward passes with products beside their combine: by the profiler, by records and events.

    The parts of the communication's time that were exposed.
    """
    buffer = Buffer(None, EPConfig(**SIZES))
    x, topk = inputs()
    x.requires_grad_(True)
    weight = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    spans = []

    def products() -> None:
        with timed(x.device) as span:
            for _ in range(4):
                torch.mm(weight, weight)
        spans.append(span)

    def step() -> None:
        out = buffer.dispatch(x, topk, during_backward=products)
        buffer.combine(out.recv_x @ weight, out.handle).combined_x.sum().backward()

    for _ in range(5):
        step()
    buffer.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        before = buffer.records.num_operations
        spans.clear()
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    records = buffer.records.since(before)
    ours = [(record.began_s, record.began_s + record.seconds) for record in records]
    hidden = [span.on_axis(buffer.records.origin()) for span in spans]
    by_events = exposed(ours, hidden) / covered(ours)
    without = exposed(ours, []) / covered(ours)
    buffer.write_trace(Path(folder, "trace.json"))
    path = Path(folder, f"profile-{rank}.json.gz")
    profiler.export_chrome_trace(str(path))
    found = beside(read_trace(Path(folder, "trace.json")), read_profile(path))
    buffer.destroy()
    return found, by_events, without


@pytest.mark.own_gpus
def test_what_is_exposed_by_the_profiler_and_by_events(tmp_path):
    results = run_ranks(2, beside_the_profiler, str(tmp_path), backend="nccl")
    for rank, (found, by_events, without) in enumerate(results):
        typical, furthest = found.apart_us
        print(
            f"rank {rank}: exposed {found.exposed_share:.1%} by the profiler, {by_events:.1%} by "
            f"events; axes {typical:+.1f} us apart, at most {furthest:+.1f} us"
        )
        assert found.rank == rank and found.num_operations >= 39  # of 40
        assert found.num_compared >= 19  # combines: forward, and of each backward
        assert abs(typical) < 200
        assert without == pytest.approx(1)
        assert 0 < found.exposed_share < 1 and 0 < by_events < 1
        # A span of products has gaps between their kernels, and begins when the first is queued.
        assert by_events == pytest.approx(found.exposed_share, abs=0.15)


STOP_S = 8


def one_stays_away(rank: int, folder: str, how: str) -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fault_file.FOLDER_VARIABLE, folder)
        buffer = Buffer(None, EPConfig(**SIZES, timeout_s=3))
        x, topk = inputs()
        handle = buffer.dispatch(x, topk).handle
        torch.cuda.synchronize()
        dist.barrier()
        if rank == 1:
            _kept.append(buffer)
            if how == "stopped":
                goes_on = f"sleep {STOP_S} && kill -CONT {os.getpid()}"
                subprocess.Popen(["sh", "-c", goes_on])
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            return None
        with pytest.raises(EPTimeoutError) as caught:
            buffer.dispatch(x, handle=handle)
            buffer.synchronize()
        return str(caught.value)


@pytest.mark.parametrize("how", ["calls nothing", "stopped", "killed"])
def test_who_stayed_away_is_found_in_the_files(tmp_path, how):
    dying = (1,) if how == "killed" else ()
    texts = run_ranks(
        2, one_stays_away, str(tmp_path), how, backend="nccl", fresh=True, dying=dying
    )
    story = read_story(tmp_path.iterdir())
    assert story.culprits == (1,) and str(story.ranks[0].path) in texts[0]
    last = story.ranks[0].last
    assert (last["op"], last["epoch"]) == ("dispatch", 1) and last["seconds"] < 1
