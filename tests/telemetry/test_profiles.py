"""Traces beside those of torch's profiler: one axis, one file, what nothing hid."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import matplotlib.image
import pytest
import torch
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from ep_comm import Buffer, EPConfig
from ep_comm.cli.app import app
from ep_comm.telemetry.beside import beside, merge
from ep_comm.telemetry.profiles import ProfileError, kernel_kind, read_profile
from ep_comm.telemetry.spans import covered, exposed
from ep_comm.telemetry.trace import FORMAT, WAITS, read_trace

SIZES = dict(num_experts=12, hidden=16, max_tokens_per_rank=8, num_topk=2, dtype=torch.float32)
TOPK = torch.tensor([[0, 11], [4, 5], [1, -1], [8, 2], [3, 7]])
SLEEP_S = 0.2


def test_lengths_of_unions():
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1, 2), (7, 8)]) == 3 + 3
    assert exposed([(0, 10), (5, 12)], [(3, 4), (11, 20), (3.5, 5)]) == 3 + 6
    assert exposed([(0, 1)], []) == 1 and exposed([], [(0, 1)]) == 0


def test_kinds_of_kernels():
    gemm, attention = "cutlass::gemm::kernel::GemmUniversal", "flash::FlashAttnFwdSm90"
    assert kernel_kind(f"void cutlass::device_kernel<{gemm}<...>>") == "GEMM"
    assert (
        kernel_kind(f"void cutlass::device_kernel<flash::enable_sm90<{attention}<...>>>") == "other"
    )
    assert kernel_kind("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN") == "GEMM"
    assert kernel_kind("dispatch_kernel(ep_dispatch_args, Ring)") == "dispatch"
    assert kernel_kind("ncclDevKernel_SendRecv(...)") == "NCCL"
    assert kernel_kind("at::native::vectorized_elementwise_kernel") == "other"


def profiled(rank: int, folder: str) -> list[float]:
    """Three steps within the profile, one before and one after it; when each combine began."""
    buffer = Buffer(None, EPConfig(**SIZES, backend="reference"))
    x = torch.ones(5, 16, requires_grad=True)
    weight = torch.ones(16, 16)

    def step() -> None:
        if rank == 1:
            time.sleep(SLEEP_S)
        out = buffer.dispatch(x, TOPK)
        buffer.combine(out.recv_x @ weight, out.handle)

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    step()
    buffer.write_trace(Path(folder, "trace.json"))
    suffix = "json.gz" if rank == 0 else "json"
    profiler.export_chrome_trace(str(Path(folder, f"profile-{rank}.{suffix}")))
    return [record.began_s for record in buffer.records if record.op == "combine"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    run_ranks(3, profiled, str(folder))
    return folder


def files(folder: Path) -> tuple[Path, list[Path]]:
    return folder / "trace.json", sorted(folder.glob("profile-*"))


def test_operations_lie_within_the_calls_that_the_profiler_saw(written):
    """Both are stamped in the same microsecond or so; a call begins before its operation."""
    trace_file, profiles = files(written)
    trace = read_trace(trace_file)
    for rank, path in enumerate(profiles):
        merged = merge(trace, [read_profile(path)])["traceEvents"]
        for op in ("dispatch", "combine"):
            ours = sorted(
                (e["ts"], e["ts"] + e["dur"])
                for e in merged
                if e["ph"] == "X" and e["name"].startswith(f"{op} #") and e["pid"] == 1000 * rank
            )
            theirs = sorted(
                (e["ts"], e["ts"] + e["dur"]) for e in merged if e["name"] == f"ep_comm::{op}"
            )
            assert len(ours) == 5 and len(theirs) == 3
            for (begin, end), (call, returned) in zip(ours[1:4], theirs, strict=True):
                assert call - 100 < begin and end < returned + 100  # us, of two clocks' readings


def test_what_of_it_was_exposed(written):
    """On a CPU all of it: nothing runs beside an operation of the reference backend."""
    trace_file, profiles = files(written)
    trace = read_trace(trace_file)
    for rank, path in enumerate(profiles):
        found = beside(trace, read_profile(path))
        assert (found.rank, found.num_operations, found.num_compared) == (rank, 9, 3)
        assert found.exposed_share == pytest.approx(1)
        if rank != 1:
            assert found.exposed_us > 0.5e6 * 3 * SLEEP_S
        typical, furthest = found.apart_us
        assert abs(typical) <= abs(furthest) < 5e3


def test_the_command_says_it_and_writes_one_file_and_a_picture(written, tmp_path):
    trace_file, profiles = files(written)
    out, picture = tmp_path / "all.json.gz", tmp_path / "trace.png"
    arguments = ["trace", str(trace_file), *map(str, profiles), "--out", str(out)]
    shown = CliRunner().invoke(app, [*arguments, "--picture", str(picture)], terminal_width=200)
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("100.0%") == 3
    with gzip.open(out) as file:
        events = json.load(file)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    for rank in range(3):
        of_rank = [name for pid, name in names.items() if pid // 1000 == rank]
        assert any(name.startswith(f"ep_comm, rank {rank} on ") for name in of_rank)
        assert any(name.startswith(f"rank {rank}: ") for name in of_rank)
    flows = [e["id"] for e in events if isinstance(e.get("id"), int) and e["ph"] == "s"]
    assert len(flows) == len(set(flows))
    assert matplotlib.image.imread(picture).shape[1] == 12 * 150


# ---- Traces of a GPU, made up --------------------------------------------------------------------


def made_up(tmp_path: Path, base_ns: int = 1_000_000_000_000_000_100) -> tuple[dict, Path]:
    """Two combines of 100 us on a GPU; a product beside half of the second, 3 us of clock error."""
    waits = {WAITS: [0.0, 5.0]}
    ours = [
        {
            "ph": "X",
            "name": f"combine #{i}",
            "pid": 1,
            "tid": 0,
            "ts": ts,
            "dur": 100,
            "args": waits,
        }
        for i, ts in ((1, 0.0), (2, 1000.0), (3, 9000.0))
    ]
    trace = {
        "baseTimeNanoseconds": 1_000_000_000_000_000_000,
        "otherData": {
            "format": FORMAT,
            "rank in the job": {"rank 0": 4, "rank 1": 5},
            "clock error, us": {"rank 0": 2.0, "rank 1": 2.0},
            "clock error between hosts": "none: one host",
        },
        "traceEvents": ours,
    }
    kernels = [("ep::combine_kernel", -3), ("ep::combine_kernel", 997), ("nvjet_x", 1050)]
    events = [
        {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": ts - 0.1, "dur": 100}
        for name, ts in kernels
    ]
    events.append(
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": -20, "dur": 2000, "pid": 9}
    )
    document = {
        "schemaVersion": 1, "baseTimeNanoseconds": base_ns, "distributedInfo": {"rank": 5},
        "traceEvents": events,
    }  # fmt: skip
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(document))
    return trace, path


def test_kernels_count_and_not_calls_of_the_host(tmp_path):
    trace, path = made_up(tmp_path)
    found = beside(trace, read_profile(path))
    assert (found.rank, found.num_operations, found.communication_us) == (1, 2, 200)
    assert found.exposed_us == pytest.approx(150)
    assert found.apart_us == pytest.approx((3, 3), abs=0.01)


def test_files_that_do_not_belong_together_are_named(tmp_path):
    trace, path = made_up(tmp_path)
    document = json.loads(path.read_text())
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    late = {**document, "baseTimeNanoseconds": document["baseTimeNanoseconds"] + 10**12}
    without = [event for event in document["traceEvents"] if event["cat"] != "kernel"]
    for changed, text in (
        (late, "no operation of rank 1 in the trace is from the time of .*bad.json"),
        ({**document, "traceEvents": without}, "bad.json has no kernels"),
        ({**document, "distributedInfo": {"rank": 3}}, "bad.json is of rank 3 of the job, which"),
        ({**document, "distributedInfo": {}}, "bad.json does not say its rank"),
    ):
        bad = tmp_path / "bad.json"
        bad.write_text(json.dumps(changed))
        with pytest.raises(ProfileError, match=text):
            beside(trace, read_profile(bad))
    with pytest.raises(ProfileError, match="profile.json and .*profile.json are both of rank 1"):
        merge(trace, [read_profile(path)] * 2)
    trace["otherData"]["clock error, us"]["rank 1"] = 0.0
    with pytest.raises(ProfileError, match="were timed by the host"):
        beside(trace, read_profile(path))


def test_bad_input_of_the_command(tmp_path):
    trace, profile_file = made_up(tmp_path)
    trace_file, other = tmp_path / "trace.json", tmp_path / "other.json"
    trace_file.write_text(json.dumps(trace))
    other.write_text("[1")
    for arguments, text in (
        ([other], "other.json is no trace that Buffer.write_trace wrote"),
        ([profile_file], "profile.json is no trace that Buffer.write_trace wrote"),
        ([trace_file, other], "other.json is no trace of torch's profiler"),
        ([trace_file, trace_file], "trace.json does not say when it began"),
        ([tmp_path / "none"], "No such file"),
        ([trace_file, profile_file, "--out", tmp_path / "no" / "x.json"], "No such file"),
    ):
        shown = CliRunner().invoke(app, ["trace", *map(str, arguments)], terminal_width=200)
        assert shown.exit_code == 2 and text in shown.output.replace("\n", " "), shown.output
