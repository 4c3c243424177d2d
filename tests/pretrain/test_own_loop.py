"""examples/own_loop.py, as users start it."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("megatron.core")

from example_runs import EXAMPLES, torchrun  # noqa: E402


def test_it_learns_through_our_dispatcher():
    result = torchrun(script=EXAMPLES / "own_loop.py")
    assert result.code == 0, result.output
    assert re.search(r"^ep_comm .*EP 2, 8 experts top-2", result.output, flags=re.MULTILINE)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (.*)$", result.output, re.M)]
    assert len(losses) == 30 and losses[0] > 4 and losses[-1] < 0.2
