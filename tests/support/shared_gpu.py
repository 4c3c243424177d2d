"""Ranks with a GPU each where there is only one: they share it, under MPS.

    python -m pytest -m multi_gpu --share-gpu 2                         # what needs two GPUs
    python tests/support/shared_gpu.py 2 examples/decode_moe.py         # a script of two ranks

Each rank has a part of the SMs, and takes the GPU for one of its own. Processes map each other's
memory as those of several GPUs do, by the same handles. NCCL takes them for hosts, and goes through
sockets. So results, errors and what becomes of a killed rank are those of several GPUs. Times say
nothing, and an error of the GPU ends all ranks. MPS keeps no SM for a rank: blocks that wait for
one another may stand still where ranks take all of their parts at once, as in `scripts/soak.py`.
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
from unittest import mock

from free_port import free_port

_IS_SHARED = "EP_COMM_TESTS_SHARE_GPU"
_RANK = "EP_COMM_TESTS_RANK"  # of a script's process


@contextlib.contextmanager
def mps(num_processes: int) -> Iterator[dict[str, str]]:
    """Run a control daemon of our own; yield the variables of each of `num_processes`."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {
            "CUDA_MPS_PIPE_DIRECTORY": str(Path(folder) / "mps"),
            "CUDA_MPS_LOG_DIRECTORY": str(Path(folder) / "mps-log"),
        }
        for path in environment.values():
            Path(path).mkdir()
        control = ["nvidia-cuda-mps-control"]
        started = {**os.environ, **environment}
        subprocess.run([*control, "-d"], env=started, check=True, timeout=30)
        try:
            yield {**environment, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // num_processes)}
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
        if _IS_SHARED not in os.environ:  # else a process above has done it
            variables = {
                **stack.enter_context(mps(num_gpus * num_groups)),
                _IS_SHARED: "1",
                "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
                "NCCL_SOCKET_IFNAME": "lo",
                "NCCL_IB_DISABLE": "1",
            }
            stack.enter_context(mock.patch.dict(os.environ, variables))
        stack.enter_context(mock.patch.multiple(torch.cuda, **as_seen))
        yield


def gpu_of(rank: int) -> int:
    """Return the number of a rank's GPU. Called in its process, before NCCL is used."""
    if _IS_SHARED not in os.environ:
        return rank
    from ep_comm.backends.nvlink import support

    os.environ["NCCL_HOSTID"] = f"rank-{rank}"
    uuid = support.gpu_id(0)
    support.gpu_id = lambda _: f"{uuid}, that of rank {rank}"
    return 0


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
