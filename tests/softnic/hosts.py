"""Processes that take themselves for hosts, with the network card in software between them.

NVSHMEM and NCCL tell hosts apart by their names alone. So each process gets a UTS namespace, and a
name of its own there (root is needed for it)::

    outputs = run_hosts(2, my_function, argument, card=PROXY)   # my_function(rank, argument)

The card copies with CUDA in each process. A copy to or from pageable memory that stands behind a
kernel which waits holds the driver up, and the card with it: so `my_function` synchronises before
such copies (`cases.finished`). A real card needs no CUDA.

`my_function` must be importable (top level of a module). The default process group is there when
it is called: NCCL where there are GPUs, else gloo, both through sockets of the loopback interface.
Ranks have a GPU each where there are enough, else they share under MPS.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing as mp
import multiprocessing.connection
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shared_gpu import has_mps, mps

# Not torch: a process imports it when it has its name.

_CLONE_NEWUTS = 0x04000000
_PR_SET_PDEATHSIG = 1
_ENDS_WITHIN_S = 5.0
_SHOW_STACKS = signal.SIGUSR1
_COUNTS = ("puts", "put_bytes", "atomics", "gets", "out_of_order")


class Card(NamedTuple):
    """How NVSHMEM sends, and what goes wrong on purpose.

    Attributes:
        path: "proxy" or "ibgda".
        libraries: Of the two transports, by name (`softnic.build.build`).
        delay_us: Every other message waits for up to this long.
        reorder: Messages leave in any order that the path allows: with the proxy between fences,
            with IBGDA any put with its signal.
        early_signals: Deliberately wrong: signals overtake their data. A test that passes with it
            tests nothing.
        cut_file: When this file appears the links are dead.
    """

    path: str
    libraries: Mapping[str, Path]
    delay_us: int = 0
    reorder: bool = False
    early_signals: bool = False
    cut_file: Path | None = None

    def environment(self) -> dict[str, str]:
        """Return what NVSHMEM and the card read."""
        names = ["proxy", "ibgda"] if self.path == "ibgda" else ["proxy"]
        return {
            "LD_PRELOAD": ":".join(str(self.libraries[name]) for name in names),
            "NVSHMEM_REMOTE_TRANSPORT": "ucx",
            "NVSHMEM_IB_ENABLE_IBGDA": str(int(self.path == "ibgda")),
            "NVSHMEM_IBGDA_NUM_RC_PER_PE": "4",
            "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
            "NVSHMEM_DISABLE_MNNVL": "1",
            "CUDA_MODULE_LOADING": "EAGER",
            "SOFTNIC_DELAY_US": str(self.delay_us),
            "SOFTNIC_REORDER": str(int(self.reorder)),
            "SOFTNIC_EARLY_SIGNALS": str(int(self.early_signals)),
            **({"SOFTNIC_CUT_FILE": str(self.cut_file)} if self.cut_file else {}),
        }

    def counts(self) -> dict[str, int]:
        """Return what has gone through this process's card."""
        count = ctypes.CDLL(str(self.libraries[self.path])).softnic_count
        count.restype = ctypes.c_uint64
        return {name: count(i) for i, name in enumerate(_COUNTS)}


class HostFailure(Exception):
    """A rank raised, died or was late; carries what is known of each."""


class _Place(NamedTuple):
    rank: int
    num_ranks: int
    host: str
    local_rank: int
    store: str
    backend: str


def missing() -> str | None:
    """Return why this process cannot make hosts, or None where it can."""
    if os.geteuid() != 0:
        return "needs root: for UTS namespaces"
    pid = os.fork()
    if pid == 0:
        os._exit(int(_unshare() != 0))
    if os.waitpid(pid, 0)[1]:
        return "cannot make UTS namespaces here"
    return None


def missing_for(num_ranks: int, ranks_per_host: int, num_gpus: int) -> str | None:
    """Return why this machine cannot be these hosts with GPUs, or None where it can."""
    if reason := missing():
        return reason
    if num_ranks <= num_gpus:
        return None
    if ranks_per_host > 1:
        return f"needs {num_ranks} GPUs, this machine has {num_gpus}"
    if not has_mps():
        return f"needs {num_ranks} GPUs, or nvidia-cuda-mps-control to share them"
    return None


def run_hosts(
    num_hosts: int,
    function: Callable[..., Any],
    *args: Any,
    ranks_per_host: int = 1,
    card: Card | None = None,
    num_gpus: int = 0,
    timeout_s: float = 240.0,
    variables: Mapping[str, str] | None = None,
    dying: tuple[int, ...] = (),
) -> list[Any]:
    """Run ``function(rank, *args)`` on processes of their own; results in rank order.

    Args:
        num_hosts: How many.
        function: What each rank does.
        args: For it, by pickle.
        ranks_per_host: Processes of each.
        card: Between them; None leaves NVSHMEM alone.
        num_gpus: Of this machine; 0 runs on the CPU, over gloo.
        timeout_s: Bound of all of it.
        variables: Further ones of the environment.
        dying: Ranks whose process may die: their result is None.

    Raises:
        HostFailure: Says what each rank raised, which did not answer, and where those stand.
    """
    num_ranks = num_hosts * ranks_per_host
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        sharing = {}
        if 0 < num_gpus < num_ranks:
            percent = 100 // -(-num_ranks // num_gpus)
            sharing = {
                **stack.enter_context(mps()),
                "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent),
            }
        processes, pipes = [], []
        stack.callback(_end, processes)
        for rank in range(num_ranks):
            host, local_rank = divmod(rank, ranks_per_host)
            place = _Place(
                rank,
                num_ranks,
                f"softnode{host}",
                local_rank,
                str(folder / "store"),
                "nccl" if num_gpus else "gloo",
            )
            environment = {
                **_sockets(place.host),
                **(card.environment() if card else {}),
                **_gpus(place, ranks_per_host, num_gpus),
                **sharing,
                **(variables or {}),
            }
            mine, theirs = mp.get_context("spawn").Pipe()
            process = mp.get_context("spawn").Process(target=_serve, args=(place, theirs))
            with _environment(environment):
                process.start()
            theirs.close()
            processes.append(process)
            pipes.append(mine)
        for pipe in pipes:
            pipe.send((function, args))
        return _answers(pipes, processes, folder, deadline, dying)


def _answers(
    pipes: list[multiprocessing.connection.Connection],
    processes: list[mp.process.BaseProcess],
    folder: Path,
    deadline: float,
    dying: tuple[int, ...],
) -> list[Any]:
    answers: dict[int, tuple[bool, Any]] = {}
    while len(answers) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = mp.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in answers]
            stacks = _stacks(late, processes, folder)
            raise HostFailure("\n".join([f"ranks {late} are late", *_failures(answers), *stacks]))
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                answers[rank] = pipe.recv()
            except EOFError:
                answers[rank] = (rank in dying, None if rank in dying else "the process died")
        if failures := _failures(answers):
            raise HostFailure("\n".join(failures))
    return [answers[rank][1] for rank in range(len(pipes))]


def _stacks(
    late: list[int], processes: list[mp.process.BaseProcess], folder: Path
) -> Iterator[str]:
    """Where these ranks stand."""
    for rank in late:
        os.kill(processes[rank].pid, _SHOW_STACKS)
    time.sleep(1.0)
    for rank in late:
        path = folder / f"stacks-{rank}"
        yield f"rank {rank}:\n{path.read_text()}" if path.exists() else f"rank {rank}: not begun"


def _failures(answers: dict[int, tuple[bool, Any]]) -> list[str]:
    return [f"rank {rank}:\n{answers[rank][1]}" for rank in sorted(answers) if not answers[rank][0]]


def _end(processes: list[mp.process.BaseProcess]) -> None:
    """Ranks end by themselves when they have answered; whoever has not is killed."""
    deadline = time.monotonic() + _ENDS_WITHIN_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


def _serve(place: _Place, pipe: multiprocessing.connection.Connection) -> None:
    """Become a rank on a host, and do what comes through the pipe."""
    _die_with_the_tests()
    if _unshare() != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWUTS)")
    socket.sethostname(place.host)
    stacks = open(Path(place.store).with_name(f"stacks-{place.rank}"), "w")  # noqa: SIM115
    faulthandler.register(_SHOW_STACKS, stacks, all_threads=True)
    try:
        function, args = pipe.recv()  # imports its module, and torch with it
        _join(place)
        answer = (True, function(place.rank, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    os._exit(0)  # in order NVSHMEM and NCCL might wait for each other


def _join(place: _Place) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if place.backend == "nccl":
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        place.backend,
        store=dist.FileStore(place.store, place.num_ranks),
        rank=place.rank,
        world_size=place.num_ranks,
        timeout=timedelta(seconds=120),
    )


def _sockets(host: str) -> dict[str, str]:
    return {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_HOSTID": host,
        "OMP_NUM_THREADS": "1",
    }


def _gpus(place: _Place, ranks_per_host: int, num_gpus: int) -> dict[str, str]:
    """Return what a rank sees: the GPUs of its host, or one that it shares."""
    if not num_gpus:
        return {"CUDA_VISIBLE_DEVICES": ""}
    if place.num_ranks > num_gpus:
        return {"CUDA_VISIBLE_DEVICES": str(place.rank % num_gpus)}
    first = place.rank - place.local_rank
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(first, first + ranks_per_host)))}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Give variables to processes that are started meanwhile: LD_PRELOAD is read at their start."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _die_with_the_tests() -> None:
    """Whoever kills pytest must not leave hosts behind that hold the GPUs."""
    tests = mp.parent_process()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if tests is None or not tests.is_alive():  # they were gone before
        os._exit(1)


def _unshare() -> int:
    return ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUTS)
