"""`Buffer.write_trace`: all ranks on one time axis."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from ep_comm import Buffer, EPConfig, EPStateError
from ep_comm.job.files import write_json
from ep_comm.telemetry.clocks import HOST, Clock
from ep_comm.telemetry.records import Interval, OpRecord
from ep_comm.telemetry.trace import RankTrace, chrome_trace, rank_trace

SIZES = dict(num_experts=12, hidden=16, max_tokens_per_rank=8, num_topk=2, dtype=torch.float32)
TOPK = torch.tensor([[0, 11], [4, 5], [1, -1], [8, 2], [3, 7]])
SLEEP_S = 0.3


def on_a_full_disk(path: Path, document: dict) -> None:
    """No file may grow beyond a thousand bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        write_json(path, document)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def traced(rank: int, folder: str) -> list[tuple[str, int, bool, float]]:
    """Rank 1 sleeps before the third step. Its records, and a trace of all."""
    buffer = Buffer(None, EPConfig(**SIZES, backend="reference"))
    x = torch.ones(5, 16, requires_grad=True)
    for step in range(4):
        if rank == 1 and step == 2:
            time.sleep(SLEEP_S)
        out = buffer.dispatch(x, TOPK)
        buffer.combine(out.recv_x, out.handle).combined_x.sum().backward()
    path = Path(folder, "trace.json")
    buffer.write_trace(path)
    with pytest.raises(EPStateError, match="rank 0 cannot write the trace .*nowhere"):
        buffer.write_trace(Path(folder, "nowhere", "trace.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ep_comm.record_calls.write_json", on_a_full_disk)
        with pytest.raises(EPStateError, match="rank 0 cannot write the trace .*File too large"):
            buffer.write_trace(Path(folder, "large.json"))
    buffer.write_trace(Path(folder, "last.json"), num_operations=1)
    return [(r.op, r.epoch, r.is_backward, r.seconds) for r in buffer.records]


def test_all_ranks_are_on_one_axis(tmp_path):
    records = run_ranks(3, traced, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"trace.json", "last.json"}
    document = json.loads((tmp_path / "trace.json").read_text())
    assert document["otherData"]["rank in the job"] == {f"rank {r}": r for r in range(3)}
    assert document["otherData"]["clock error, us"] == {f"rank {r}": 0.0 for r in range(3)}
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    named = {e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"}
    assert {name.partition(" on ")[0] for name in named} == {"rank 0", "rank 1", "rank 2"}
    for rank, of_rank in enumerate(records):
        mine = [event for event in events if event["pid"] == rank]
        rows = {"forward": 0, "backward": 1, "plan": 3}
        assert [(e["name"], e["tid"], e["dur"]) for e in mine] == [
            (
                f"{op} #{epoch}",
                rows["plan" if op == "plan" else "backward" if is_backward else "forward"],
                pytest.approx(1e6 * seconds),
            )
            for op, epoch, is_backward, seconds in of_rank
        ]
        assert mine == sorted(mine, key=lambda event: event["ts"])
    assert min(event["ts"] for event in events) == 0
    # All wait in the third step for rank 1. Each step has a dispatch in its backward, too.
    plans = {event["pid"]: event for event in events if event["name"] == "plan #5"}
    assert plans[0]["dur"] > 0.5e6 * SLEEP_S < plans[2]["dur"]
    for rank in (0, 2):
        assert plans[1]["ts"] > plans[rank]["ts"]
        assert plans[1]["ts"] < plans[rank]["ts"] + plans[rank]["dur"]
        assert plans[rank]["args"]["waited for rank, us"][1] > 0.5e6 * SLEEP_S
    last = json.loads((tmp_path / "last.json").read_text())["traceEvents"]
    assert {e["name"] for e in last if e["ph"] == "X"} == {"combine #8"}


def test_clocks_of_gpus_and_hosts_are_taken_off():
    record = OpRecord(op="dispatch", epoch=1, place=1, began_s=1007.0, span=Interval(2.0))
    trace = rank_trace([record], 0, Clock(ahead_s=1000.0, error_s=5e-6))
    assert trace.operations[0].begin_s == pytest.approx(7.0)
    here = rank_trace([record], 1, HOST)
    far = RankTrace(2, 2, "another", here.unix_s + 3.0, 0.0, here.operations)
    document = chrome_trace([trace, here, far])
    begins = [event["ts"] for event in document["traceEvents"] if event["ph"] == "X"]
    assert begins == pytest.approx([0.0, 1000e6, 1003e6], abs=2e4)  # wall clocks between hosts
    assert document["otherData"]["clock error, us"]["rank 0"] == 5.0
    assert document["otherData"]["clock error between hosts"].startswith("not known")
