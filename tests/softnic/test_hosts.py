"""Processes as hosts, without GPUs and NVSHMEM: what tests over the card stand on."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from free_port import free_port
from softnic import hosts
from softnic.hosts import HostFailure, run_hosts

from ep_comm import Buffer
from ep_comm.bench.network.check import Sizes, check_network
from ep_comm.bench.network.report import is_sound
from ep_comm.cli import network

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(hosts.missing() is not None, reason=str(hosts.missing())),
]


def names(rank: int) -> list[str]:
    all_names = [""] * dist.get_world_size()
    dist.all_gather_object(all_names, socket.gethostname())
    return all_names


def test_each_host_has_a_name_and_the_ranks_a_group():
    here = socket.gethostname()
    want = ["softnode0", "softnode0", "softnode1", "softnode1"]
    assert run_hosts(2, names, ranks_per_host=2) == [want] * 4
    assert socket.gethostname() == here


def test_variables_reach_processes_and_leave_no_trace():
    os.environ.pop("EP_COMM_TEST_VARIABLE", None)
    got = run_hosts(2, variable_of, variables={"EP_COMM_TEST_VARIABLE": "7"})
    assert got == ["7", "7"] and "EP_COMM_TEST_VARIABLE" not in os.environ


def variable_of(rank: int) -> str | None:
    return os.environ.get("EP_COMM_TEST_VARIABLE")


def fails(rank: int, how: str) -> None:
    if rank == 1:
        if how == "raises":
            raise ValueError("as planned")
        if how == "dies":
            os._exit(3)
    time.sleep(1000)


@pytest.mark.parametrize(
    ("how", "words", "timeout_s"),
    [
        ("raises", "as planned", 240),
        ("dies", "rank 1:\nthe process died", 240),
        ("sleeps", r"ranks \[0, 1\] are late\n(?s:.*)in fails", 10),
    ],
)
def test_a_failure_is_told_and_nothing_outlives_it(how, words, timeout_s):
    before = set(mp.active_children())  # of other tests
    with pytest.raises(HostFailure, match=words):
        run_hosts(2, fails, how, timeout_s=timeout_s)
    assert set(mp.active_children()) <= before


def all_but_one_answer(rank: int) -> int:
    dist.barrier()  # or the other one may still be connecting
    if rank == 1:
        os._exit(3)
    return rank


def test_one_that_is_to_die_has_no_result():
    assert run_hosts(2, all_but_one_answer, dying=(1,)) == [0, None]


def leaves_its_number(rank: int, folder: Path) -> None:
    (folder / f"{os.getpid()}").touch()
    time.sleep(1000)


def test_hosts_die_with_whoever_runs_the_tests(tmp_path):
    tests = mp.get_context("spawn").Process(target=run_hosts, args=(2, leaves_its_number, tmp_path))
    tests.start()
    while len(hosts_of := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert tests.is_alive()
        time.sleep(0.1)
    assert all(is_running(pid) for pid in hosts_of)
    os.kill(tests.pid, signal.SIGKILL)
    tests.join()
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in hosts_of):
        assert time.monotonic() < deadline, "hosts live on"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sound_over_reference(rank: int, sizes: Sizes) -> bool:
    with Buffer(None, sizes.config("reference", 20)) as buffer:
        return is_sound(check_network(buffer, sizes, torch.device("cpu")))


def test_the_check_between_hosts_runs_over_the_reference_backend():
    sizes = Sizes(num_nodes=2, ranks_per_node=1, tokens=9, hidden=16, repeats=1)
    assert run_hosts(2, sound_over_reference, sizes) == [True, True]


def as_command(rank: int, silent: int | None = None, timeout_s: float = 20) -> bool:
    """What ``ep-comm doctor --network --backend reference`` does on two hosts."""
    if rank == silent:
        network.check_network = lambda *_: time.sleep(1000)
    dist.destroy_process_group()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
    )
    return network.check("reference", None, timeout_s)


@pytest.fixture
def port() -> dict[str, str]:
    return {"MASTER_PORT": str(free_port())}


def test_the_command_finds_out_which_ranks_are_a_host(port):
    assert run_hosts(2, as_command, variables=port) == [True, True]


def test_the_command_names_a_silent_host_and_ends(port, capfd):
    with pytest.raises(HostFailure, match="rank 0:\nthe process died"):
        run_hosts(2, as_command, 1, 8.0, variables=port)
    error = capfd.readouterr().err
    assert "error: rank 0 on softnode0:0 waited 8 s for rank 1 on softnode1:0" in error
