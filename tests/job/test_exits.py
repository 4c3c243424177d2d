"""Ending a job together: one line, whoever has the error. Runs on gloo."""

from __future__ import annotations

import pytest
from example_runs import torchrun

SCRIPT = """
import os, time
import torch.distributed as dist
from ep_comm.job import exits

exits._MEETING_S = 2.0
rank = int(os.environ["RANK"])
if {has_group}:
    dist.init_process_group("gloo")
if rank in {having}:
    exits.exit_together(ValueError(f"said by rank {{rank}}"))
if {has_group}:  # as a training would, for those who do not come
    dist.barrier()
    dist.barrier()
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("having", "has_group"),
    [((0, 1, 2), True), ((0,), True), ((2,), True), ((1, 2), True), ((0, 1), False), ((2,), False)],
)
def test_one_line_whoever_has_the_error(having, has_group, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(having=having, has_group=has_group))
    result = torchrun(script=script, timeout=100, processes=3)
    assert result.code != 0
    lines = [line for line in result.output.splitlines() if line.startswith("error:")]
    speakers = having[:1] if 0 in having else having
    assert lines in [[f"error: said by rank {rank}"] for rank in speakers]
    assert "exitcode: 2" in result.output or "exitcode  : 2" in result.output
