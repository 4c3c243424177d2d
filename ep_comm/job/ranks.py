"""Ranks of tasks that srun started: its variables where torchrun's are missing."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ep_comm.errors import EPArgumentError

# Ports below the range that Linux hands out to connections by itself.
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000
# From one step of a job to the next. So far away that jobs of about the same time are not hit.
_PORTS_PER_STEP = 3_571


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what torch.distributed needs and `environment` lacks, if srun started the process.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; empty for
        processes that are no task of a SLURM job step (a batch script, whatever the size of its
        job), or that torchrun started.

    Raises:
        EPArgumentError: SLURM's variables contradict others.
    """
    if "SLURM_STEP_TASKS_PER_NODE" not in environment:
        return {}
    local_tasks = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[
        whole(environment, "SLURM_NODEID")
    ]
    if "TORCHELASTIC_RUN_ID" in environment:
        _check_torchrun(environment, local_tasks)
        return {}
    ours = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(local_tasks),
    }
    for name, value in ours.items():
        if environment.get(name, value) != value:
            raise EPArgumentError(
                f"{name} is {environment[name]}, but srun says {value} (it started "
                f"{ours['WORLD_SIZE']} tasks, SLURM_PROCID {ours['RANK']}): unset {name}, or start "
                f"as many tasks as processes are meant (srun --ntasks)"
            )
    number = whole(environment, "SLURM_JOB_ID")
    number += _PORTS_PER_STEP * whole(environment, "SLURM_STEP_ID", 0)
    port = _FIRST_PORT + number % _NUM_PORTS
    return {
        **ours,
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def whole(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a variable that is a whole number, at least 0.

    Raises:
        EPArgumentError: It is something else; or it is missing, and there is no default.
    """
    text = environment.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit()):
        raise EPArgumentError(f"the variable {name} must be a whole number, got {text!r}")
    return int(text)


def job_name(environment: Mapping[str, str]) -> str:
    """Return what tells this job from others: its launcher's name for it."""
    if run := environment.get("TORCHELASTIC_RUN_ID"):
        return f"torchrun's job {run!r}"
    if job := environment.get("SLURM_JOB_ID"):
        ours = ("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
        # Else mpirun has started it, from steps of its own, which differ from node to node.
        is_task = all(environment.get(a) == environment.get(b) for a, b in ours)
        step = f"step {environment.get('SLURM_STEP_ID')} of " if is_task else ""
        return f"{step}SLURM's job {job}"
    return "a job without a name"


def _check_torchrun(environment: Mapping[str, str], local_tasks: int) -> None:
    if local_tasks > 1:
        raise EPArgumentError(
            f"srun started {local_tasks} torchruns on this node, each of them "
            f"{environment['LOCAL_WORLD_SIZE']} processes: start torchrun with "
            f"--ntasks-per-node=1, or this script without torchrun, one task for each GPU"
        )
    nodes, groups = environment["SLURM_STEP_NUM_NODES"], environment["GROUP_WORLD_SIZE"]
    if nodes != groups:
        raise EPArgumentError(
            f"srun started torchrun on {nodes} nodes, but torchrun forms a job of {groups}: give "
            f"it --nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:PORT, or start "
            f"this script without torchrun, one task for each GPU"
        )


def _tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node: 4, 4, 1 for SLURM's ``"4(x2),1"``."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts


def _first_host(environment: Mapping[str, str]) -> str:
    """Return the step's first node: gpu03 of ``"gpu[03-05,9],cpu1"``."""
    if whole(environment, "SLURM_STEP_NUM_NODES") == 1:
        return "localhost"
    nodes = environment["SLURM_STEP_NODELIST"]
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]
