"""Ranks and rendezvous for tasks that srun started without torchrun."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

_PORTS = range(15000, 31000)


def from_slurm(environ: MutableMapping[str, str]) -> None:
    """Set what torchrun would set, from srun's variables; nothing where there is a rank already.

    Only for tasks of srun (``SLURM_STEP_ID`` of a real step): a batch script itself runs as one
    process, whatever the size of the job.
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ or "SLURM_STEP_NODELIST" not in environ:
        return
    step = int(environ.get("SLURM_STEP_ID", 0))
    settings = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_of_node(environ)),
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_PORTS[(int(environ["SLURM_JOB_ID"]) * 16 + step) % len(_PORTS)]),
    }
    for name, value in settings.items():
        environ.setdefault(name, value)


def first_host(nodelist: str) -> str:
    """First of a compressed list of hosts: "gpu[03-05,9],cpu1" gives "gpu03"."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodelist).partition(",")[0]


def tasks_of_node(environ: MutableMapping[str, str]) -> int:
    """Tasks of this step on this node, from a list such as "8(x3),4"."""
    tasks: list[int] = []
    for count, repeated in re.findall(
        r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"]
    ):
        tasks += [int(count)] * int(repeated or 1)
    return tasks[int(environ["SLURM_NODEID"])]
