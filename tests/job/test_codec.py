"""What ranks tell each other: read back as it was, and nothing of it is run."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from ep_comm import EPConfig, EPMismatchError
from ep_comm.bench.network.check import Found, Rail
from ep_comm.job import codec
from ep_comm.job.exits import UserError
from ep_comm.job.meeting import meet
from ep_comm.job.start import agree, on_rank_0
from ep_comm.topology import Spot

CONFIG = EPConfig(num_experts=8, hidden=16, max_tokens_per_rank=8, num_topk=2)

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    plain | st.binary() | st.builds(Spot, st.text(), st.lists(st.integers()).map(tuple)),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(plain, inner),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(values)
def test_values_come_back_as_they_were(value):
    assert codec.loads(codec.dumps(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        CONFIG,
        (torch.bfloat16, Path("a/b"), {("x", 1): [None]}),
        Found([Rail(0, 1, 2, 3.0, 4.0, 5.0)], {(0, 1): 7}),
    ],
    ids=["config", "mixed", "records"],
)
def test_records_come_back_as_they_were(value):
    again = codec.loads(codec.dumps(value))
    assert again == value and type(again) is type(value)


@settings(max_examples=100, deadline=None)
@given(
    st.binary() | values.map(repr).map(str.encode) | values.map(codec.dumps).map(lambda b: b[1:])
)
def test_no_bytes_raise_anything_else(data):
    with contextlib.suppress(codec.CodecError):
        codec.loads(data)


class RunsCode:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("run by pickle",)


RECORD = '{"record": "%s", "fields": {}}'


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pickle.dumps(RunsCode()), "Decode"),
        ((RECORD % "os:_exit").encode(), "no record of this package: 'os:_exit'"),
        ((RECORD % "ep_comm.job.codec:loads").encode(), "no record"),
        ((RECORD % "ep_comm.job.codec:Path").encode(), "no record"),
        ((RECORD % "ep_comm.buffer:Buffer").encode(), "cannot send a ep_comm.buffer.Buffer"),
        ((RECORD % "ep_comm.topology:Spot").encode(), "TypeError"),
        (codec.dumps(CONFIG).replace(b":16", b":-16"), "hidden must be a positive"),
        (b"[" * 100_000, "Recursion"),
        (b'{"dtype": "save"}', "no value"),
    ],
    ids=["pickle", "function", "ours", "imported", "no record", "fields", "bounds", "deep", "type"],
)
def test_what_is_refused(data, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(codec.CodecError, match=words):
        codec.loads(data)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_sent():
    with pytest.raises(codec.CodecError, match="cannot send a builtins.set to other ranks"):
        codec.dumps([{1}])


def say_a_pickle(rank: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(codec, "dumps", lambda value: pickle.dumps(RunsCode(), protocol=0))
        with pytest.raises(EPMismatchError) as caught:
            meet(None, "make a Buffer", None, 5.0)
    assert not Path("run by pickle").exists()
    return str(caught.value)


def test_a_rank_that_says_a_pickle_is_named():
    for message in run_ranks(2, say_a_pickle, fresh=True):
        assert "(make a Buffer) cannot read what rank 1 says" in message


def agree_on_all(rank: int) -> tuple[object, str]:
    found = on_rank_0(lambda: {"path": Path("x"), "long": "y" * 1000})
    with pytest.raises(UserError) as caught:
        agree(lambda: (_ for _ in ()).throw(UserError("rank 1's")) if rank == 1 else None)
    return found, str(caught.value)


def test_all_ranks_hear_of_a_result_and_of_an_error():
    want = ({"path": Path("x"), "long": "y" * 1000}, "rank 1's")
    assert run_ranks(2, agree_on_all) == [want, want]
