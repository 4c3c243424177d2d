"""ep-comm doctor --network: over gloo, where a rank stands for a node or two."""

from __future__ import annotations

import re
import socket
import time

import pytest
import torch
from commands import run_command
from ranks import run_ranks
from rich.console import Console
from typer.testing import CliRunner

from ep_comm import Buffer, EPTimeoutError
from ep_comm.bench.network.check import Found, Rail, Sizes, check_network
from ep_comm.bench.network.report import Member, hint_lines, is_sound, render, timeout_text
from ep_comm.cli.app import app

SIZES = Sizes(num_nodes=2, ranks_per_node=2, tokens=9, hidden=16, repeats=1)
MEMBERS = [Member(f"gpu0{r // 2}", r % 2, "ibrc", []) for r in range(4)]
CPU = torch.device("cpu")


def rails(**changes: object) -> list[Rail]:
    made = [Rail(s, d, 0, 40.0, 41.0, 30.0) for s, d in ((0, 2), (1, 3), (2, 0), (3, 1))]
    made[0] = made[0]._replace(**changes)
    return made


def text_of(found: Found) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(found, SIZES, MEMBERS, "nodes"))
    return capture.get()


def checked(rank: int, sizes: Sizes, wrong: tuple[str, int, int] | None) -> Found:
    """What the check finds; rank `wrong[1]` is made to spoil an operation's row `wrong[2]`."""
    with Buffer(None, sizes.config("reference", 20)) as buffer:
        if wrong is not None and wrong[1] == rank:
            spoil(buffer, *wrong[::2])
        return check_network(buffer, sizes, CPU)


def spoil(buffer: Buffer, operation: str, row: int) -> None:
    real = getattr(buffer, operation)

    def spoilt(*args, **kwargs):
        out = real(*args, **kwargs)
        x = out.recv_x if operation == "dispatch" else out.combined_x
        if len(x) > row:
            x[row, 5] += 1
        return out

    setattr(buffer, operation, spoilt)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (4, 1)])
def test_messages_that_are_right(shape):
    sizes = Sizes(num_nodes=shape[0], ranks_per_node=shape[1], tokens=9, hidden=16, repeats=1)
    results = run_ranks(sizes.num_ranks, checked, sizes, None)
    assert all(found == results[0] for found in results)
    (found, *_) = results
    assert is_sound(found)
    wanted = {
        (r, sizes.rail_peer(r, k)) for r in range(sizes.num_ranks) for k in range(1, shape[0])
    }
    assert {(rail.source, rail.dest) for rail in found.rails} == wanted
    assert all(rail.dispatch_gb_per_s > 0 and rail.latency_us > 0 for rail in found.rails)


def test_a_spoilt_row_of_a_dispatch_is_named():
    (found, *_) = run_ranks(4, checked, SIZES, ("dispatch", 3, 4))
    # What rank 3 received from rank 1. Its combine sends that on, back to rank 1.
    wrong = {(rail.source, rail.dest) for rail in found.rails if rail.wrong_rows}
    assert wrong == {(1, 3), (3, 1)} and not is_sound(found)
    text = text_of(found)
    assert "gpu00:1 → gpu01:1" in text and "WRONG" in text
    assert "all wrong rows are of GPUs" not in text  # mixed rounds were wrong elsewhere too
    assert re.search("WRONG: [0-9]+ rows between rank .* and rank 3 on gpu01:1", text)


def test_a_spoilt_row_of_a_combine_is_named():
    (found, *_) = run_ranks(4, checked, SIZES, ("combine", 0, 8))
    wrong = {(rail.source, rail.dest) for rail in found.rails if rail.wrong_rows}
    assert wrong == {(2, 0)}


def late(rank: int) -> str:
    """Rank 2 makes its buffer and sends nothing."""
    members = [Member(f"gpu0{r // 2}", r % 2, "ibrc", []) for r in range(4)]
    buffer = Buffer(None, SIZES.config("reference", 2))
    if rank == 2:
        time.sleep(4)
        return ""
    begin = time.monotonic()
    with pytest.raises(EPTimeoutError) as error:
        check_network(buffer, SIZES, CPU)
    assert time.monotonic() - begin < 2 + 5
    return timeout_text(error.value, members)


def test_a_silent_rank_is_named_with_its_host():
    texts = run_ranks(4, late, fresh=True)
    assert "rank 0 on gpu00:0 waited 2 s for rank 2 on gpu01:0" in texts[0]


# ---------------------------------------------------------------------------------- what is printed


def test_right_messages():
    found = Found(rails(), {})
    assert is_sound(found)
    text = text_of(found)
    assert "2 nodes of 2: nodes" in text and "gpu00:0 → gpu01:0" in text and "WRONG" not in text
    assert "every row arrived as it was sent" in text and "slow" not in text


def test_wrong_rows_of_one_rail():
    found = Found(rails(wrong_rows=7), {})
    assert not is_sound(found)
    text = text_of(found)
    assert "7 WRONG" in text and "all wrong rows are of GPUs with number 0" in text
    assert "every row arrived" not in text


def test_wrong_rows_of_mixed_rounds():
    found = Found(rails(), {(3, 0): 2})
    assert not is_sound(found)
    assert "WRONG: 2 rows between rank 3 on gpu01:1 and rank 0 on gpu00:0" in text_of(found)


def test_a_slow_rail_and_its_culprit():
    text = text_of(Found(rails(dispatch_gb_per_s=9.0), {}))
    assert "slow: gpu00:0 → gpu01:0, less than 0.7 of the median 40 GB/s" in text
    assert "all slow rails are of GPUs with number 0: see the card of that rail" in text


def test_hints_are_said_once_for_all_hosts_that_have_them():
    members = [Member(f"gpu{r}", 0, "ibrc" if r else "IBGDA", ["no port"]) for r in range(6)]
    lines = hint_lines(members)
    assert lines[0] == "gpu0, gpu1, gpu2, gpu3 and 2 more: no port"
    assert lines[1] == "hosts have different settings: IBGDA; ibrc"


# -------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_over_gloo():
    done = run_command("doctor", "--network", "--backend", "reference", "--ranks-per-node", "1")
    assert done.returncode == 0, done.stderr
    host = socket.gethostname()
    assert f"{host}:0 → {host}:1" in done.stdout
    assert "buffer: reference over gloo" in done.stdout
    assert "every row arrived as it was sent" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "processes", "words"),
    [
        (
            ["--ranks-per-node", "1"],
            2,
            "error: messages between nodes cannot be sent here: no backend",
        ),
        (["--backend", "reference"], 2, "so nothing crosses a network"),
        (["--backend", "nvlink"], 1, "--backend 'nvlink' is none of nodes, reference"),
    ],
)
def test_what_cannot_be_done_ends_with_one_line(flags, processes, words):
    done = run_command("doctor", "--network", *flags, processes=processes)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1 and words in ours[0]


def test_without_a_launcher(monkeypatch, capfd):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(app, ["doctor", "--network"])
    assert result.exit_code == 2
    said = capfd.readouterr()
    text = said.out + said.err + result.output
    assert "error: start it on two hosts or more, one process a GPU" in text
    assert "network cards" in text
