"""Ending a job together: one line, whoever has the error. Runs on gloo."""

from __future__ import annotations

import pytest
from example_runs import torchrun

SCRIPT = """
import os
import torch.distributed as dist
from ep_comm import exits

exits._MEETING_S = 2.0
dist.init_process_group("gloo")
rank = dist.get_rank()
if rank in {having}:
    exits.exit_together(ValueError(f"said by rank {{rank}}"))
dist.barrier()  # as a training would, for those who do not come
dist.barrier()
"""


@pytest.mark.parametrize("having", [(0, 1, 2), (0,), (2,), (1, 2)], ids=str)
def test_one_line_whoever_has_the_error(having, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(having=having))
    result = torchrun(script=script, timeout=100, processes=3)
    assert result.code != 0
    lines = [line for line in result.output.splitlines() if line.startswith("error:")]
    speakers = having[:1] if 0 in having else having
    assert lines in [[f"error: said by rank {rank}"] for rank in speakers]
    assert "exitcode: 2" in result.output or "exitcode  : 2" in result.output
