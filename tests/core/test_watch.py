"""A late rank is named while it is waited for, and once it has come."""

from __future__ import annotations

import gc
import logging
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ep_comm import Buffer, EPConfig
from ep_comm.telemetry import watch
from ep_comm.telemetry.watch import Wait

SIZES = dict(num_experts=4, hidden=8, max_tokens_per_rank=8, num_topk=2, dtype=torch.float32)
X, TOPK = torch.ones(4, 8), torch.tensor([[0, 2], [1, 3], [2, 1], [3, 0]])


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def one_rank_is_late(rank: int) -> list[str]:
    handler = Lines()
    logging.getLogger("ep_comm").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "_AFTER_S", 1.0)
        patch.setattr(watch, "_INTERVAL_S", 0.1)
        patch.setattr(watch, "_the_watcher", None)
        buffer = Buffer(None, EPConfig(**SIZES, timeout_s=60))
        dist.barrier()
        if rank == 1:
            time.sleep(3)
        buffer.dispatch(X, TOPK)
        time.sleep(0.5)
        gone = weakref.ref(buffer._session.backend)
        del buffer
        gc.collect()
        time.sleep(0.3)
        assert gone() is None  # the thread keeps nothing alive
    return handler.lines


def test_a_late_rank_is_named():
    lines, of_the_late_one = run_ranks(2, one_rank_is_late, fresh=True)
    assert of_the_late_one == []
    late, come = lines
    assert late.startswith("plan #1: rank 1, which rank 0 waits for, has not come for")
    assert "(phase: header); rank 0 gives up after 60 s" in late
    assert come.startswith("plan #1: rank 1, which rank 0 waits for, came after")


def test_each_wait_is_named_once(caplog):
    one, other = Wait("dispatch", "plan", 7, 1), Wait("combine", "rows", 3, None)
    watched = watch._Watched(rank=0, timeout_s=300)
    for second in range(100):
        watched.look([one] if second < 60 else [one, other] if second < 95 else [], second)
    assert [record.getMessage() for record in caplog.records] == [
        "dispatch #7: rank 1, which rank 0 waits for, has not come for 30 s (phase: plan); "
        "rank 0 gives up after 300 s",
        "combine #3: an unknown rank, which rank 0 waits for, has not come for 30 s "
        "(phase: rows); rank 0 gives up after 300 s",
        "dispatch #7: rank 1, which rank 0 waits for, came after 95 s",
        "combine #3: an unknown rank, which rank 0 waits for, came after 35 s",
    ]


def test_where_the_bound_comes_first_nothing_is_watched(monkeypatch):
    monkeypatch.setattr(watch, "_watcher", lambda: pytest.fail("watched"))
    watch.watch(object(), rank=0, timeout_s=30.0)
