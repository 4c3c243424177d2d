"""A lock that one process holds at a time."""

from __future__ import annotations

import os
import socket

import pytest

from ep_comm.job.lock import InUse, introduce, lock


def test_who_comes_second_is_told_who_was_first(tmp_path):
    first = lock(tmp_path / "lock")
    with pytest.raises(InUse, match=f"^process {os.getpid()} on {socket.gethostname()}$"):
        lock(tmp_path / "lock")
    introduce(first, "somebody")
    with pytest.raises(InUse, match="^somebody$"):
        lock(tmp_path / "lock")
    os.close(first)
    os.close(lock(tmp_path / "lock"))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "nowhere" / "lock")
