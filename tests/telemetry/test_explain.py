"""What ranks leave when a buffer fails, and what `ep-comm explain` makes of it."""

from __future__ import annotations

import json
import pickle
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from typer.testing import CliRunner

from ep_comm import Buffer, EPConfig, EPError, EPTimeoutError, fault_file
from ep_comm.cli.app import app
from ep_comm.telemetry.explain import ExplainError, read_story
from ep_comm.telemetry.records import Interval, OpRecord

SIZES = dict(num_experts=12, hidden=16, max_tokens_per_rank=8, num_topk=2, dtype=torch.float32)
X = torch.ones(5, 16)
TOPK = torch.tensor([[0, 11], [4, 5], [1, -1], [8, 2], [3, 7]])
_kept: list[Buffer] = []


def one_stays_away(rank: int, folder: str, fails_itself: bool) -> Path | None:
    """Rank 2 makes one step fewer than the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fault_file.FOLDER_VARIABLE, folder)
        buffer = Buffer(None, EPConfig(**SIZES, timeout_s=5, backend="reference"))
        for _ in range(3):
            out = buffer.dispatch(X, TOPK)
            buffer.combine(out.recv_x, out.handle)
        dist.barrier()
        if rank == 2:
            _kept.append(buffer)
            if not fails_itself:
                return None
            with pytest.raises(ZeroDivisionError), buffer._session.operation():
                raise ZeroDivisionError("of the test")
            return None
        with pytest.raises(EPTimeoutError) as caught:
            buffer.dispatch(X, TOPK)
        error = caught.value
        assert f"Last operations: {error.file} (ep-comm explain)." in str(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert str(error.file) in buffer._session.unusable
        assert buffer.stats().operations["dispatch"].seconds.num == 3  # of a failed buffer, too
        return error.file


def test_who_was_late_is_found_with_files_of_the_others(tmp_path):
    files = run_ranks(3, one_stays_away, str(tmp_path), False, fresh=True)
    assert sorted(tmp_path.iterdir()) == sorted(file for file in files if file)
    story = read_story(tmp_path.iterdir())
    assert story.culprits == (2,) and sorted(story.ranks) == [0, 1] and story.num_ranks == 3
    assert story.sentences == (
        "Rank 2 was late: ranks 0, 1 waited for it for 5 s in plan #4 (phase: header).",
        "It has left no file: its process has ended or stands still outside of ep_comm, or the "
        "file is not among these. Look for the end of rank 2's output.",
    )
    last = story.ranks[0].last
    assert (last["op"], last["epoch"]) == ("combine", 3)
    shown = CliRunner().invoke(app, ["explain", str(tmp_path)], terminal_width=200)
    assert shown.exit_code == 0 and story.sentences[0] in shown.output.replace("\n", " ")


def test_a_rank_that_failed_itself_is_named_with_its_error(tmp_path):
    run_ranks(3, one_stays_away, str(tmp_path), True, fresh=True)
    story = read_story(tmp_path.iterdir())
    assert story.culprits == (2,) and sorted(story.ranks) == [0, 1, 2]
    assert story.sentences[1].startswith(
        "Its last complete operation was combine #3, which was done"
    )
    assert story.sentences[1].endswith("It never called plan #4.")
    assert story.sentences[2] == "Rank 2 failed with ZeroDivisionError: of the test"


def document(rank: int, late: list[int], **changes) -> dict:
    error = dict(
        type="EPTimeoutError", text="...", late_ranks=late, op="dispatch", epoch=5, phase="rows",
        waited_s=30.0,
    )  # fmt: skip
    operations = [
        dict(op="combine", epoch=4, place=8, called_ago_s=33.0, seconds=1.0, wait_s_by_rank=[]),
        dict(op="dispatch", epoch=5, place=9, called_ago_s=31.0, seconds=None, wait_s_by_rank=[]),
    ]
    whole = dict(
        format="ep_comm last operations 1", run="a1", buffer="ep_comm/b/1", rank=rank, num_ranks=4,
        host=f"host{rank}", time=100.0, error=error, operations=operations,
    )  # fmt: skip
    return {**whole, **changes}


@pytest.fixture
def written(tmp_path):
    def write(*documents: dict) -> list[Path]:
        paths = [tmp_path / f"{i}-rank{d['rank']}.json" for i, d in enumerate(documents)]
        for path, content in zip(paths, documents, strict=True):
            path.write_text(json.dumps(content))
        return paths

    return write


def test_whoever_waits_too_is_not_the_one(written):
    """Rank 3 waits for rank 1, and only because of that do the others wait for rank 3."""
    paths = written(document(0, [3]), document(2, [1, 3]), document(3, [1]))
    story = read_story(paths)
    assert story.culprits == (1,)
    assert story.sentences[0] == (
        "Rank 1 was late: ranks 2, 3 waited for it for 30 s in dispatch #5 (phase: rows)."
    )
    assert story.ranks[0].last["op"] == "combine" and story.ranks[0].last_end_ago_s == 32.0


def test_a_circle_is_a_mismatch(written):
    story = read_story(written(document(0, [1]), document(1, [0])))
    assert story.culprits == () and "waited for one another" in story.sentences[0]
    assert story.sentences[-1] == "Of ranks 2, 3 there is no file here."


def test_a_gpu_that_could_not_be_read(written):
    story = read_story(written(document(0, [1]), document(1, [], operations=None)))
    assert story.sentences[1] == (
        "It had begun no operation of the buffer, or its GPU could not be read."
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(run="b2"), "is of another run than .*0-rank0.json: b2, not a1"),
        (dict(buffer="ep_comm/b/2"), "is of another buffer of the run than"),
        (dict(rank=0), "are both of rank 0"),
        (dict(format="something"), 'is no file that ep_comm has left: "format" is not'),
    ],
)
def test_files_that_do_not_belong_together(written, changes, text):
    with pytest.raises(ExplainError, match=text):
        read_story(written(document(0, [1]), {**document(1, [0]), **changes}))


def test_of_a_folder_the_last_fault_is_explained(written, tmp_path, monkeypatch):
    read: list[str] = []
    monkeypatch.setattr(
        "ep_comm.telemetry.explain.json.loads",
        lambda text, loads=json.loads: read.append(text) or loads(text),
    )
    written(
        {**document(0, [1]), "run": "old", "time": 50.0},
        {**document(0, [2]), "time": 99.0},
        {**document(1, [2]), "time": 101.0},
    )
    shown = CliRunner().invoke(app, ["explain", str(tmp_path)], terminal_width=200)
    assert shown.exit_code == 0 and "has 2 faults: this is the last one" in shown.output
    assert "Rank 2 was late: ranks 0, 1 waited for it" in shown.output
    assert len(read) == 3  # each file once


def test_files_of_different_runs_are_named_by_the_command(written):
    paths = written(document(0, [1]), document(1, [0], run="b2"))
    shown = CliRunner().invoke(app, ["explain", *map(str, paths)])
    assert shown.exit_code == 2 and str(paths[1]) in shown.output.replace("\n", "")
    assert "is of another run than" in shown.output.replace("\n", " ")


def test_bad_input_of_the_command(tmp_path):
    (tmp_path / "x-rank0.json").write_text("{")
    for path, text in ((tmp_path, "is no file that ep_comm has left"), (tmp_path / "n", "No such")):
        shown = CliRunner().invoke(app, ["explain", str(path)])
        assert shown.exit_code == 2 and text in shown.output


def test_records_of_what_did_not_end_are_not_believed(tmp_path, monkeypatch):
    """A GPU's ring still has what stood there a thousand operations ago."""
    monkeypatch.setenv(fault_file.FOLDER_VARIABLE, str(tmp_path))
    records = [
        OpRecord(op=op, epoch=epoch, place=place, called_s=0.0, span=Interval(1.0))
        for place, (op, epoch) in enumerate([("dispatch", 7), ("combine", 7), ("dispatch", 3)], 10)
    ]
    path = fault_file.leave(IDENTITY, backend_of(lambda _: records), EPError("late"))
    operations = json.loads(path.read_text())["operations"]
    assert [(op["op"], op["epoch"], op["seconds"]) for op in operations] == [
        ("dispatch", 7, 1.0), ("combine", 7, 1.0), ("dispatch", 8, None),
    ]  # fmt: skip
    assert read_story([path]).ranks[0].last["op"] == "combine"


def backend_of(read) -> SimpleNamespace:
    recorder = SimpleNamespace(num_operations=3, since=read)
    return SimpleNamespace(recorder=recorder, describe=lambda: "of the test")


IDENTITY = fault_file.Identity("a1", "ep_comm/b/1", 0, 2)


def test_a_gpu_that_does_not_come_to_rest_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv(fault_file.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(fault_file, "_READ_S", 0.1)
    start = time.monotonic()
    path = fault_file.leave(IDENTITY, backend_of(lambda _: time.sleep(3)), EPError("late"))
    assert time.monotonic() - start < 2
    assert json.loads(path.read_text())["operations"] is None


def test_an_interrupt_reads_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv(fault_file.FOLDER_VARIABLE, str(tmp_path))
    path = fault_file.leave(IDENTITY, backend_of(lambda _: 1 / 0), KeyboardInterrupt())
    assert json.loads(path.read_text())["operations"] is None


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv(fault_file.FOLDER_VARIABLE, str(tmp_path / "file"))
    assert fault_file.leave(IDENTITY, backend_of(lambda _: []), EPError("late")) is None
    assert "cannot keep the last operations of rank 0" in caplog.text


def test_the_folder_is_the_users_own(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv(fault_file.FOLDER_VARIABLE)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    path = fault_file.leave(IDENTITY, backend_of(lambda _: []), EPError("late"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.parent.chmod(0o777)
    assert fault_file.leave(IDENTITY, backend_of(lambda _: []), EPError("late")) is None
    assert "only this user can write to" in caplog.text
