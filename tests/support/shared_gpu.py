"""Ranks with a GPU each where there is only one: they share it, under MPS.

    python -m pytest -m multi_gpu --share-gpu 2                         # what needs two GPUs
    python tests/support/shared_gpu.py 2 scripts/soak.py --seconds 60   # a script of two ranks

Each rank takes the GPU for one of its own, with its part of the SMs. MPS would give it such a part
too, but may give two ranks the same one: then blocks that wait for one another stand still. So the
kernels of all ranks together take half of the SMs, and each finds room, even beside one that still
holds its own. Processes map each other's memory as those of several GPUs do, by the same handles.
NCCL takes them for hosts, and goes through sockets. So results, errors and what becomes of a killed
rank are those of several GPUs. Times say nothing, and an error of the GPU ends all ranks, but for
those that take turns (`in_turns`).
"""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from free_port import free_port

_NUM_PARTS = "EP_COMM_TESTS_SHARE_GPU"
_MPS = "CUDA_MPS_PIPE_DIRECTORY"
_RANK = "EP_COMM_TESTS_RANK"  # of a script's process
_SMS_OF_NCCL = 12


@contextlib.contextmanager
def mps() -> Iterator[dict[str, str]]:
    """Run a control daemon of our own; yield the variables of its processes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {
            _MPS: str(Path(folder) / "mps"),
            "CUDA_MPS_LOG_DIRECTORY": str(Path(folder) / "mps-log"),
        }
        for path in environment.values():
            Path(path).mkdir()
        control = ["nvidia-cuda-mps-control"]
        started = {**os.environ, **environment}
        subprocess.run([*control, "-d"], env=started, check=True, timeout=30)
        try:
            yield environment
        finally:
            subprocess.run(control, input="quit -t 5\n", text=True, env=started, timeout=30)


def has_mps() -> bool:
    return shutil.which("nvidia-cuda-mps-control") is not None


@contextlib.contextmanager
def shared(num_gpus: int, num_groups: int = 1) -> Iterator[None]:
    """Let one GPU pass for several, in this process and in those that it starts.

    Args:
        num_gpus: The ranks of a group at most.
        num_groups: Groups that run at the same time.
    """
    import torch  # not above: hosts have their names before they import it

    # Not torch's: it looks at each of the GPUs that it is told of.
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    name = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    name = f"part of {name.strip()}"
    as_seen = dict(device_count=lambda: num_gpus, get_device_name=lambda _=None: name)
    with contextlib.ExitStack() as stack:
        if _NUM_PARTS not in os.environ:  # else a process above has done it
            variables = {
                **stack.enter_context(mps()),
                _NUM_PARTS: str(num_gpus * num_groups),
                "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
                "NCCL_SOCKET_IFNAME": "lo",
                "NCCL_IB_DISABLE": "1",
            }
            stack.enter_context(mock.patch.dict(os.environ, variables))
        stack.enter_context(mock.patch.multiple(torch.cuda, **as_seen))
        yield


@contextlib.contextmanager
def in_turns() -> Iterator[None]:
    """Have processes that are started in here share the GPU without MPS, one after the other.

    That is slow, and an error of the GPU ends only the process that has made it.
    """
    with mock.patch.dict(os.environ):
        os.environ.pop(_MPS, None)
        yield


def gpu_of(rank: int) -> int:
    """Return the number of a rank's GPU. Called in its process, before NCCL is used."""
    if _NUM_PARTS not in os.environ:
        return rank
    from ep_comm.backends.nvlink import support

    os.environ["NCCL_HOSTID"] = f"rank-{rank}"
    uuid = support.gpu_id(0)
    support.gpu_id = lambda _: f"{uuid}, that of rank {rank}"
    take_part(int(os.environ[_NUM_PARTS]))
    return 0


def take_part(num_parts: int) -> None:
    """Have this process find a GPU with half of one of so many parts of the SMs; NCCL has some."""
    import torch

    properties_of = torch.cuda.get_device_properties

    def part_of(device: Any = None) -> SimpleNamespace:
        whole = properties_of(device)
        names = [name for name in dir(whole) if not name.startswith("_")]
        part = SimpleNamespace(**{name: getattr(whole, name) for name in names})
        # Twice, because a kernel may begin while the one before it still holds its SMs.
        part.multi_processor_count = (whole.multi_processor_count - _SMS_OF_NCCL) // (2 * num_parts)
        return part

    torch.cuda.get_device_properties = part_of


def main() -> None:
    num_ranks, script, *words = sys.argv[1:]
    sys.argv = [script, *words]
    if _RANK in os.environ:
        gpu_of(int(os.environ[_RANK]))
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
        return
    with shared(int(num_ranks)):
        common = {
            "WORLD_SIZE": num_ranks,
            "LOCAL_WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        ranks = []
        for rank in range(int(num_ranks)):
            environment = {**os.environ, **common, "RANK": str(rank), _RANK: str(rank)}
            command = [sys.executable, __file__, num_ranks, *sys.argv]
            ranks.append(subprocess.Popen(command, env=environment))
        codes = [rank.wait() for rank in ranks]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
