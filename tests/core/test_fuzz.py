"""Whatever another process sends, or leaves on disk: an error that says so, or values in bounds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ep_comm import EPConfig, EPError, EPMismatchError, EPTimeoutError, EPTooManyTokensError
from ep_comm.backends.reference import headers
from ep_comm.fault_file import run_name
from ep_comm.job.roster import Roster
from ep_comm.telemetry.explain import FORMAT, ExplainError, read_story

CONFIG = EPConfig(num_experts=8, hidden=16, max_tokens_per_rank=8, num_topk=2)
int64 = st.integers(-(2**63), 2**63 - 1)
near = st.integers(-3, 12)  # what is almost right goes furthest
quick = settings(max_examples=150, deadline=None)


# ---- Headers -----------------------------------------------------------------------------------


@contextlib.contextmanager
def heard(theirs: dict[int, int]) -> Iterator[Any]:
    """A transport of two ranks: the other one says what we say, but for these places of it."""

    class Exchange:
        def __init__(self, transport: Any, send: Any, recv: Any, *_: Any) -> None:
            for place, value in theirs.items():
                recv[1, place] = value

        def wait(self) -> tuple[float, ...]:
            return (0.0, 0.0)

    transport = SimpleNamespace(
        rank=0, host_device=torch.device("cpu"), to_host=lambda tensor, *_: tensor
    )
    with mock.patch.object(headers, "Exchange", Exchange):
        yield transport


@quick
@given(
    st.dictionaries(st.integers(0, 15), int64 | near, max_size=16),
    st.sampled_from(["plan", "dispatch", "combine"]),
    st.none() | st.tuples(st.just(3), st.integers(0, 8)),
)
@example({1: 9}, "plan", None)
@example({1: 7}, "dispatch", (3, 2))
@example({2: 2**40}, "plan", None)
@example({3: -1}, "combine", None)
def test_no_header_gives_rows_out_of_bounds(theirs, op, expected):
    record = SimpleNamespace(op=op, epoch=4, wait_s_by_rank=())
    with heard(theirs) as transport:
        try:
            rows = headers.exchange_headers(
                transport, CONFIG, 1, record, (3, 5), num_tokens=5, expected_rows=expected,
                dtype=torch.bfloat16,
            )  # fmt: skip
        except EPTooManyTokensError:
            assert op == "plan" and theirs[2] > 8
        except EPMismatchError as error:
            assert "rank 1" in str(error)
        else:
            assert expected is None or rows == expected
            assert rows[0] == 3 and 0 <= rows[1] <= 8 and rows[1] == theirs.get(1, 5)


# ---- What stands in the store ------------------------------------------------------------------

words = st.text() | st.recursive(
    st.none() | st.booleans() | near | int64 | st.text(max_size=3), st.lists, max_leaves=6
).map(json.dumps)


@quick
@given(words, st.booleans())
@example("[1, [5]]", True)
@example("[-1, [0]]", True)
@example("[[1, 1], 0]", False)
@example("[[1], 1e300]", False)
@example("[" * 10_000, True)
def test_no_word_about_masks_does_harm(word, is_state):
    store = dist.HashStore()
    roster = Roster(store, "buffer", 0, 3, timeout_s=1e-3)
    store.set("buffer/roster" if is_state else "buffer/roster/1/1", word)
    with contextlib.suppress(EPError):
        roster.agree("mask_rank", None, 4)
    assert set(roster.masked) <= {1, 2} and list(roster.masked) == sorted(roster.masked)


def test_a_word_that_cannot_be_read_is_told():
    store = dist.HashStore()
    store.set("buffer/roster/1/1", '[[7], "x"]')
    roster = Roster(store, "buffer", 0, 2, timeout_s=0.1)
    with pytest.raises(EPMismatchError, match=r"rank 0 cannot read .* masks: '\[\[7\], \"x\"\]'"):
        roster.agree("mask_rank", None, 4)
    store = dist.HashStore()
    store.set("buffer/roster/1/1", "[null, 6]")
    roster = Roster(store, "buffer", 0, 2, timeout_s=0.1)
    assert roster.agree("mask_rank", None, 4) == [4, 6]
    with pytest.raises(EPTimeoutError):  # the control: it does wait for a word
        Roster(dist.HashStore(), "buffer", 0, 2, timeout_s=0.1).agree("clear_mask", (), 4)


@pytest.mark.parametrize("name", ["../../tmp/x", "a" * 16 + "\n", "A" * 16, "\udcff"])
def test_the_name_of_a_run_leads_nowhere_else(name):
    store = dist.HashStore()
    store.set("ep_comm/run", name.encode(errors="replace"))
    with pytest.raises(EPMismatchError, match="another rank says that the run's name is"):
        run_name(store, 0)


# ---- Files -------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | near | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@quick
@given(st.data())
def test_no_file_of_a_fault_makes_explain_fail_otherwise(tmp_path_factory, data):
    error = dict(
        type="EPTimeoutError", text="late", late_ranks=[1], op="dispatch", epoch=5, phase="rows",
        waited_s=2.0,
    )  # fmt: skip
    operation = dict(op="dispatch", epoch=4, seconds=0.1, called_ago_s=2.0)
    document = dict(
        format=FORMAT, run="r", buffer="b", rank=0, num_ranks=2, host="h", process=1,
        backend="reference", time=1.0, error=error, operations=[operation],
    )  # fmt: skip
    where = data.draw(st.sampled_from([document, error, operation]))
    key = data.draw(st.sampled_from(sorted(where)))
    where[key] = data.draw(json_values)
    path: Path = tmp_path_factory.getbasetemp() / "fault.json"
    path.write_text(json.dumps(document))
    with contextlib.suppress(ExplainError):
        read_story([path])
