"""``ep-comm`` on all ranks of a job, in processes that are forked: a tenth of what torchrun takes.

The job's variables are torchrun's. What torchrun itself does, ending the others when a rank has
failed, is not there: all ranks have to end by themselves. Before they have met, one does at once,
and the others wait to be ended: ask one process alone for that.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from types import SimpleNamespace

from example_runs import ROOT, environment
from free_port import free_port
from ranks import run_ranks


def run_command(*words: object, processes: int = 2, pool: str = "", **variables: str):
    """Run ``ep-comm *words``; exit codes, the largest, and what all ranks wrote, in rank order.

    `variables` are of the environment. With `pool` "training" Megatron is imported before.
    """
    job = dict(
        WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_PORT=free_port(), **variables
    )
    results = run_ranks(
        processes, _as_rank, list(map(str, words)), job, fresh=True, pool=pool, backend=""
    )
    codes, output, said = zip(*results, strict=True)
    output, said = "".join(output), "".join(said)
    return SimpleNamespace(codes=codes, returncode=max(codes), stdout=output, stderr=said)


def _as_rank(rank: int, words: list[str], job: dict[str, object]) -> tuple[int, str, str]:
    """Exit code, and what goes to stdout and to stderr."""
    job = {**environment(), "MASTER_ADDR": "localhost", "RANK": rank, "LOCAL_RANK": rank, **job}
    os.environ.clear()
    os.environ.update({name: str(value) for name, value in job.items()})
    os.chdir(ROOT)
    sys.argv = ["ep-comm", *words]
    code = 0
    with caught(1) as output, caught(2) as said:
        try:
            from ep_comm.cli.main import main

            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
    return code, output[0], said[0]


@contextlib.contextmanager
def caught(descriptor: int) -> Iterator[list[str]]:
    """What goes to this file descriptor, whoever writes; in the list at the end."""
    text: list[str] = []
    with tempfile.TemporaryFile("w+") as file:
        saved = os.dup(descriptor)
        os.dup2(file.fileno(), descriptor)
        try:
            yield text
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved, descriptor)
            os.close(saved)
            file.seek(0)
            text.append(file.read())
