"""``ep-comm doctor --network``: messages between hosts, sent, checked and timed."""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from rich.console import Console

from ep_comm import Buffer
from ep_comm.bench.network.check import Sizes, check_network
from ep_comm.bench.network.report import (
    Member,
    hint_lines,
    is_sound,
    render,
    timeout_text,
)
from ep_comm.cli.doctor import network_sections, sections_text
from ep_comm.config import BackendName
from ep_comm.errors import EPError, EPTimeoutError
from ep_comm.job.exits import UserError
from ep_comm.job.meeting import meet
from ep_comm.job.ranks import whole
from ep_comm.job.start import has_launcher, join
from ep_comm.network.host import find_host, hints
from ep_comm.network.settings import NetworkSettings
from ep_comm.topology import find_ranks_per_node

BACKENDS = ("nodes", "reference")  # those that span hosts
_LAUNCH = (
    "start it on two hosts or more, one process a GPU: bash scripts/two_nodes.sh, or srun "
    "--nodes=2 --ntasks-per-node=8 ep-comm doctor --network (docs/network.md)"
)
# Over all nodes together, so that memory and time stay within bounds; of one at least this many.
_TOKENS, _FEWEST_TOKENS = 8192, 256
_TABLE_WIDTH = 160


def check(backend: BackendName, ranks_per_node: int | None, timeout_s: float) -> bool:
    """Join the job, send messages between its nodes, and print what came. Collective, and bounded.

    Args:
        backend: What sends.
        ranks_per_node: Parts of a host as nodes, to try it out; None takes whole hosts.
        timeout_s: Bound of every wait.

    Returns:
        Whether all that was sent has arrived as it was.

    Raises:
        UserError: It cannot be done here; says what is missing.
    """
    if not has_launcher():
        print(sections_text(network_sections()))
        raise UserError(_LAUNCH)
    settings = NetworkSettings.from_environment()
    device = join(timedelta(seconds=max(timeout_s, 60)))
    console = Console(width=None if sys.stdout.isatty() else _TABLE_WIDTH, highlight=False)
    console.quiet = dist.get_rank() != 0
    me = Member(
        socket.gethostname(),
        whole(os.environ, "LOCAL_RANK"),
        settings.describe(),
        hints(find_host(), settings) if backend == "nodes" else [],
    )
    group = dist.group.WORLD
    assert group is not None
    try:
        members = meet(group, "check the network", me, timeout_s).answers
    except EPTimeoutError as error:
        raise UserError(str(error)) from error
    console.print(f"network: {me.settings}")
    for line in hint_lines(members):
        console.print(f"to look at: {line}")
    sizes = _sizes(members, ranks_per_node, device)
    try:
        buffer = Buffer(group, sizes.config(backend, timeout_s))
    except EPTimeoutError as error:
        _leave(timeout_text(error, members))
    except EPError as error:
        raise UserError(f"messages between nodes cannot be sent here: {error}") from error
    console.print(f"buffer: {buffer.describe()}")
    try:
        with buffer:
            found = check_network(buffer, sizes, device)
            console.print(render(found, sizes, members, buffer.describe()))
    except EPTimeoutError as error:
        _leave(timeout_text(error, members))
    except EPError as error:  # what came was so wrong that kernels would not have it
        _leave(f"rank {buffer.rank} on {members[buffer.rank]}: {error}")
    return is_sound(found)


def _sizes(members: list[Member], ranks_per_node: int | None, device: torch.device) -> Sizes:
    hosts = [member.host for member in members]
    size = find_ranks_per_node(hosts, [member.local_rank for member in members], ranks_per_node)
    num_nodes = len(members) // size
    if num_nodes == 1:
        raise UserError(
            f"all {len(members)} ranks are on host {hosts[0]}, so nothing crosses a network: "
            f"{_LAUNCH}; --ranks-per-node 1 takes each rank for a node, to try it out"
        )
    on_gpu = device.type == "cuda"
    return Sizes(
        num_nodes=num_nodes,
        ranks_per_node=size,
        tokens=max(_TOKENS // num_nodes, _FEWEST_TOKENS) if on_gpu else 64,
        hidden=7168 if on_gpu else 1024,
        repeats=20 if on_gpu else 3,
    )


def _leave(text: str) -> NoReturn:
    """End this process at once: in order it would wait for those that did not come."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    time.sleep(2)  # the others have something to say too, and launchers kill them when one ends
    os._exit(1)
