"""What reports say of their run."""

from __future__ import annotations

import sys

import pytest

from ep_comm.job.environment import command_line


@pytest.mark.parametrize(
    ("argv", "typed"),
    [
        (
            ["/somewhere/ep_comm/cli/__main__.py", "bench", "--out", "a b"],
            "ep-comm bench --out 'a b'",
        ),
        (["scripts/nodes_bench.py", "--iters", "3"], "scripts/nodes_bench.py --iters 3"),
    ],
)
def test_command_line_is_what_a_user_types(monkeypatch, argv, typed):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == typed
