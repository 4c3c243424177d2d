"""ep_comm/pretrain/checkpoint.py: what a run that is killed while it saves leaves behind."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.metadata import MetadataIndex

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")

from ep_comm.pretrain import checkpoint  # noqa: E402
from ep_comm.pretrain.checkpoint import LATEST, save  # noqa: E402
from ep_comm.pretrain.checkpoint_files import check_metadata  # noqa: E402


class Killed(BaseException):
    """As a signal: nothing handles it."""


@pytest.fixture
def save_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Save an iteration with given content; Megatron's part of it is one file."""

    def write(state: dict, folder: str) -> None:
        (Path(folder) / content).touch()

    content = ""
    for name, value in (
        ("gather_parameters", lambda trainee: None),
        ("on_rank_0", lambda action: action()),
        ("agree", lambda action: action()),
        ("_sharded_state", lambda trainee, is_loading: {}),
        ("_fingerprint", lambda config: {}),
        ("_ranks", lambda trainee: {}),
        ("_write_in_threads", lambda: None),
        ("dist_checkpointing", SimpleNamespace(save=write)),
    ):
        monkeypatch.setattr(checkpoint, name, value)
    config = SimpleNamespace(save=tmp_path, keep_checkpoints=None)

    def call(iteration: int, text: str) -> None:
        nonlocal content
        content = text
        save(None, config, iteration=iteration, consumed_samples=0)

    return call


def contents(folder: Path) -> dict[str, list[str]]:
    return {
        path.name: sorted(file.name for file in path.iterdir())
        for path in folder.iterdir()
        if path.is_dir()
    }


@pytest.mark.parametrize("where", ["before it is renamed", "before it is named", "half written"])
def test_killed_while_it_saves(save_step, tmp_path, where):
    """The checkpoint before it stays the latest; saving the same step again leaves no trace."""

    def killed(*args: object) -> None:
        raise Killed

    save_step(3, "first")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        if where == "before it is renamed":
            patch.setattr(Path, "rename", killed)
        elif where == "before it is named":
            patch.setattr(os, "replace", killed)
        else:
            patch.setattr(checkpoint.dist_checkpointing, "save", killed)
        save_step(6, "killed")
    assert (tmp_path / LATEST).read_text() == "3\n"
    assert contents(tmp_path)["iter_0000003"] == ["first"]

    save_step(6, "again")
    assert (tmp_path / LATEST).read_text() == "6\n"
    assert contents(tmp_path) == {"iter_0000003": ["first"], "iter_0000006": ["again"]}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [LATEST]


class RunsCode:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("run by pickle",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(RunsCode()), "names posix.mkdir, which no metadata has"),
        (pickle.dumps(MetadataIndex), None),
        (pickle.dumps((torch.float8_e4m3fn, torch.Size([1]))), None),
        (pickle.dumps(torch.distributed.checkpoint.save), "names .*save, which no metadata has"),
        (b"\x80\x04cut", "unpickling|truncated|invalid"),
    ],
    ids=["code", "record", "tensor", "function", "cut"],
)
def test_metadata_that_would_run_code(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    if words is None:
        check_metadata(tmp_path)
    else:
        with pytest.raises(pickle.UnpicklingError, match=words):
            check_metadata(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".metadata"]


def test_metadata_of_torch_passes(tmp_path):
    state = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "n": {"a": 1, "b": torch.ones(1)}}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    check_metadata(tmp_path)


def test_a_tracker_of_generators_is_saved_as_tensors(monkeypatch):
    """CUDA graphs need generators; a checkpoint of theirs is one of a run without graphs."""
    generator = torch.Generator().manual_seed(7)
    states = {"graphed": generator, "plain": torch.get_rng_state()}

    class Tracker:
        get_states = staticmethod(lambda: states)
        set_states = staticmethod(lambda given: states.update(given))

    monkeypatch.setattr(checkpoint.tensor_parallel, "get_cuda_rng_tracker", Tracker)
    saved = checkpoint._tracker_states()
    first = torch.rand(3, generator=generator)
    checkpoint._set_tracker_states(saved)
    assert all(isinstance(state, torch.Tensor) for state in saved.values())
    assert states["graphed"] is generator
    assert torch.equal(torch.rand(3, generator=generator), first)
