"""A lock that one process holds at a time, and files that are written whole."""

from __future__ import annotations

import os
import socket

import pytest

from ep_comm.job import files
from ep_comm.job.exits import UserError
from ep_comm.job.files import introduce, lock, take_folder, user_of, write_json


def test_who_comes_second_is_told_who_was_first(tmp_path):
    first = lock(tmp_path / "lock", "--out x")
    me = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(UserError, match=f"^--out x is in use by {me}: wait for it"):
        lock(tmp_path / "lock", "--out x")
    introduce(first, "somebody")
    with pytest.raises(UserError, match="^--save y is in use by somebody: wait for it"):
        lock(tmp_path / "lock", "--save y")
    os.close(first)
    os.close(lock(tmp_path / "lock", "--out x"))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "nowhere" / "lock", "--out x")


def test_a_process_may_take_a_folder_twice(tmp_path):
    for flag in ("--save", "--run-dir"):
        take_folder(tmp_path / "a" / "b", flag)
    with pytest.raises(UserError, match="is in use by process"):
        lock(tmp_path / "a" / "b" / ".lock", "it")


def test_who_uses_a_folder(tmp_path):
    assert user_of(tmp_path) is None
    descriptor = lock(tmp_path / ".lock", "it")
    assert user_of(tmp_path) == f"process {os.getpid()} on {socket.gethostname()}"
    os.close(descriptor)
    assert user_of(tmp_path) is None  # its lock is left, and nobody has it
    take_folder(tmp_path, "--run-dir")  # nor has the one who asked


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--save {tmp_path}/file/x cannot be written: Not a dir"):
        take_folder(tmp_path / "file" / "x", "--save")


def test_a_document_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("what", ["file", "lock"])
def test_nothing_is_written_through_somebody_elses_link(what, tmp_path):
    precious, link = tmp_path / "precious", tmp_path / ("x.json.tmp" if what == "file" else "x")
    precious.write_text("precious")
    link.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        if what == "file":
            files.write_text(tmp_path / "x.json", "new")
        else:
            files.lock(link, "it")
    assert precious.read_text() == "precious"
