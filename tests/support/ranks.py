"""Groups of real processes that run a test function as the ranks of one process group.

Starting a process costs two seconds of importing torch, and four with Megatron. So processes are
forked from one that has imported the libraries, and nothing else (`_LIBRARIES`); and each group
size is started once and then runs one function after another::

    outputs = run_ranks(3, my_function, argument)   # my_function(rank, argument) on three ranks

`my_function` must be importable (top level of a module). Its result comes back by pickle; an
exception on any rank fails the call with that rank's traceback.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import multiprocessing as mp
import multiprocessing.connection
import multiprocessing.context
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shared_gpu import gpu_of

DEFAULT_TIMEOUT_S = 120.0  # for what takes seconds: other programs may use the machine too
_GLOO_ENDS_WITHIN_S = 5.0  # NCCL may wait for other ranks: its processes are not asked to end

# Imported before processes are forked: what takes long of what torch, Megatron and the example
# import, and keeps no state of its own. Missing ones are passed over.
_LIBRARIES = [
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor"),
    *("pydantic", "pytest", "rich.progress", "wandb"),
]

# Pools whose processes have Megatron too, on the CPU. They are forked from one more process, the
# nursery, which has called `_import_megatron` and runs `run_ranks` in our place.
_WITH_MEGATRON = ("exposed", "megatron", "megatron-fp8", "meter", "training")
_NURSERY = "nursery"  # the backend of its group of one
_IMPORTS_WITHIN_S = 120.0


def _context() -> multiprocessing.context.BaseContext:
    """Where there are GPUs each process starts anew: what libraries do to a GPU is not forked."""
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    if _import_megatron.cache_info().currsize:
        return mp.get_context("fork")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    return context


_groups: dict[tuple[int, str, str], RankGroup] = {}


class RankFailure(Exception):
    """A rank raised; carries every failed rank's traceback."""


class RankGroup:
    """`num_ranks` processes with a gloo, an NCCL or no group, waiting for functions to run."""

    def __init__(self, num_ranks: int, backend: str) -> None:
        context = _context()
        self._ends_within_s = _GLOO_ENDS_WITHIN_S if backend == "gloo" else 0.0
        self._rendezvous = tempfile.TemporaryDirectory()
        store = str(Path(self._rendezvous.name) / "store")
        self._pipes, self._processes = [], []
        for rank in range(num_ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, num_ranks, backend, store, theirs))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float, dying: tuple[int, ...]
    ) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < len(self._pipes):
            waiting = [pipe for r, pipe in enumerate(self._pipes) if r not in answers]
            ready = mp.connection.wait(waiting, timeout=timeout_s)
            if not ready:
                missing = [r for r in range(len(self._pipes)) if r not in answers]
                late = f"ranks {missing} did not finish within {timeout_s} s"
                raise RankFailure("\n".join([late, *_failures(answers)]))
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = (rank in dying, None if rank in dying else "the process died")
        if failures := _failures(answers):
            raise RankFailure("\n".join(failures))
        return [answers[r][1] for r in range(len(self._pipes))]

    def stop(self) -> None:
        """Idle processes end by themselves, and with them those that Megatron started in them."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # that process is gone
                pipe.send(None)  # forked processes have this end too: closing it says nothing
            pipe.close()
        end = time.monotonic() + self._ends_within_s
        for process in self._processes:
            process.join(max(0, end - time.monotonic()))
            process.kill()
            process.join()
        self._rendezvous.cleanup()


def _failures(answers: dict[int, tuple[bool, Any]]) -> list[str]:
    return [f"rank {r}:\n{answers[r][1]}" for r in sorted(answers) if not answers[r][0]]


def run_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    fresh: bool = False,
    pool: str = "",
    backend: str = "gloo",
    dying: tuple[int, ...] = (),
) -> list[Any]:
    """Run ``function(rank, *args)`` on `num_ranks` ranks; results in rank order.

    `fresh` uses processes of its own, for tests that damage their group. `pool` names processes
    that only tests of that name share, for tests that change their process; those of
    `_WITH_MEGATRON` have imported Megatron, fresh ones too. With `backend` "nccl" rank r has GPU r,
    with "" they have no group. The processes of `dying` may die: their result is None.
    """
    if _is_from_nursery(pool):
        options = dict(timeout_s=timeout_s, fresh=fresh, pool=pool, backend=backend, dying=dying)
        bound = num_ranks * timeout_s + _IMPORTS_WITHIN_S
        call = functools.partial(run_ranks, num_ranks, function, *args, **options)
        ((results, failure),) = run_ranks(1, _in_nursery, call, timeout_s=bound, backend=_NURSERY)
        if failure:
            raise RankFailure(failure)
        return results
    if fresh:
        group = RankGroup(num_ranks, backend)
        try:
            return group.run(function, *args, timeout_s=timeout_s, dying=dying)
        finally:
            group.stop()
    key = (num_ranks, pool, backend)
    if key not in _groups:
        _groups[key] = RankGroup(num_ranks, backend)
    try:
        return _groups[key].run(function, *args, timeout_s=timeout_s, dying=())
    except RankFailure:
        _groups.pop(key).stop()  # a failed rank leaves the others out of step
        raise


def stop_pool(pool: str) -> None:
    """End the processes of `pool`; a later `run_ranks` starts new ones."""
    if _is_from_nursery(pool):
        if (1, "", _NURSERY) in _groups:
            run_ranks(1, _in_nursery, functools.partial(stop_pool, pool), backend=_NURSERY)
        return
    for key in [key for key in _groups if key[1] == pool]:
        _groups.pop(key).stop()


def _is_from_nursery(pool: str) -> bool:
    is_nursery = _import_megatron.cache_info().currsize
    return pool in _WITH_MEGATRON and not is_nursery and not torch.cuda.is_available()


def _in_nursery(rank: int, call: Callable[[], Any]) -> tuple[Any, str]:
    """Call it; return the result, or what ranks failed with: the nursery itself is sound."""
    _import_megatron()
    try:
        return call(), ""
    except RankFailure as failure:
        return None, str(failure)


@functools.cache
def _import_megatron() -> None:
    """What trainings import. What is missing is missed where it is used."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        importlib.import_module("ep_comm.megatron.cpu").enable()
        importlib.import_module("ep_comm.pretrain.loop")


def _serve(
    rank: int,
    num_ranks: int,
    backend: str,
    store: str,
    pipe: multiprocessing.connection.Connection,
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: no collection has to look at it, and copy its pages
    if backend == "nccl":
        torch.cuda.set_device(gpu_of(rank))
    if backend in ("gloo", "nccl"):
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, num_ranks),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=DEFAULT_TIMEOUT_S),
        )
    while (task := _next_task(pipe)) is not None:
        function, args = task
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    if backend == _NURSERY:
        _stop_all()


def _next_task(pipe: multiprocessing.connection.Connection) -> tuple[Callable, tuple] | None:
    with contextlib.suppress(EOFError):
        return pipe.recv()
    return None


@atexit.register
def _stop_all() -> None:
    for group in _groups.values():
        group.stop()
