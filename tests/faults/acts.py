"""A step of all operations, and what one rank does in the middle of it instead (`table`)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from table import TIMEOUT_S, VICTIM, Fault

from ep_comm import Buffer, EPConfig, EPError
from ep_comm.backends.reference import messages
from ep_comm.job.meeting import meet
from ep_comm.job.store import default_store

SIZES = dict(num_experts=6, hidden=512, max_tokens_per_rank=8, num_topk=2, low_latency_tokens=8)
TOPK = torch.tensor([[0, 5], [4, 1], [2, -1], [3, 0], [1, 2]])
STAND_STILL_S = 1.0
# Device and backend, by transport.
_ON = {"gloo": ("cpu", "auto"), "NVLink": ("cuda", "nvlink"), "network": ("cuda", "nodes")}
_TELLS_S = 20.0  # for what ranks leave in the store
At = Callable[[str], None]


class Found(NamedTuple):
    """What a rank that the fault did not happen to saw of it.

    Attributes:
        error: Type of the error; "" where all went on.
        text: Its message.
        late_ranks: As the error says.
        seconds: From the fault to the error.
        steps: Complete and right ones after the fault.
    """

    error: str
    text: str
    late_ranks: tuple[int, ...]
    seconds: float
    steps: int


class Given(NamedTuple):
    """What a rank passes; one that does something else passes something else."""

    rows: torch.dtype = torch.bfloat16
    num_topk: int = 2
    alignment: int | None = 8
    layout: str = "expert"
    has_weights: bool = False
    room: int = 6
    combines: str = "own"  # handle; or "other"; or "first", instead of a dispatch
    buffer: int = 0


OTHERWISE = {
    "aligns otherwise": Given(alignment=4),
    "has the other layout": Given(alignment=None, layout="rank"),
    "has fewer experts a token": Given(num_topk=1),
    "dispatches other rows": Given(rows=torch.float16),
    "sends probabilities": Given(has_weights=True),
    "combines another handle": Given(combines="other"),
    "combines instead": Given(combines="first"),
    "uses another Buffer": Given(buffer=1),
    "has more room in low latency": Given(room=7),
}


def step(buffers: list[Buffer], at: At, given: Given, earlier: Any, device: str) -> Any:
    """Dispatch, combine, backward, low latency; every value is checked. Returns the dispatch."""
    buffer = buffers[given.buffer]
    topk = TOPK[:, : given.num_topk].contiguous().to(device)
    x = torch.arange(5.0, device=device)[:, None].expand(5, 512).to(given.rows).contiguous()
    hits = (topk >= 0).sum(1, keepdim=True)
    weights = torch.ones(topk.shape, device=device) if given.has_weights else None
    at("before dispatch")
    if given.combines == "first":
        buffer.combine(earlier.recv_x, earlier.handle)
    leaf = x.clone().requires_grad_()
    out = buffer.dispatch(
        leaf, topk, weights, layout=given.layout, expert_alignment=given.alignment
    )
    at("before experts")
    y = 2 * out.recv_x
    at("before combine")
    handle = earlier.handle if given.combines == "other" else out.handle
    z = buffer.combine(y, handle).combined_x
    at("before backward")
    z.sum().backward()
    at("before low-latency dispatch")
    with torch.no_grad():
        rows = x.bfloat16()
        sent = buffer.low_latency_dispatch(rows, topk, given.room, 6, use_fp8=False)
        at("before low-latency combine")
        ones = torch.ones_like(topk, dtype=torch.float32)
        back = buffer.low_latency_combine(sent.recv_x, topk, ones, sent.handle).combined_x
    buffer.synchronize()
    assert torch.equal(z, 2 * hits * x), "combine"
    assert torch.equal(leaf.grad, (2 * hits).expand_as(x).to(x.dtype)), "backward"
    assert torch.equal(back, hits * rows), "low latency"
    return out


def play(rank: int, fault: Fault) -> Found | str | None:
    """Take steps, the second with the fault. The victim returns what it raised itself, if it can.

    All other ranks stay until each of them has seen what comes of it: nobody is to be named for
    having gone.
    """
    store = default_store()
    others = [r for r in range(dist.get_world_size()) if r != VICTIM]
    store.set(f"pid/{rank}", str(os.getpid()))
    meet(dist.group.WORLD, "begin", None, 60.0)
    with contextlib.ExitStack() as at_the_end:
        if fault.what.startswith("stands still") and rank == 0:
            waker = threading.Thread(target=_wake, args=(store, fault))
            waker.start()
            at_the_end.callback(waker.join)
        return _see(rank, others, fault, store)


def _see(rank: int, others: list[int], fault: Fault, store: dist.Store) -> Found | str | None:
    is_victim = rank == VICTIM
    try:
        with contextlib.ExitStack() as buffers:
            _take_steps(is_victim, fault, store, buffers)
        return Found("", "", (), 0.0, 2)
    except (EPError, ValueError, MemoryError, RuntimeError) as error:
        if is_victim:
            if fault.error:
                store.wait([f"saw/{r}" for r in others], timedelta(seconds=_TELLS_S))
            return f"{type(error).__name__}: {error}"
        if not isinstance(error, EPError):
            raise
        took = time.monotonic() - float(store.get("fault"))
        store.set(f"saw/{rank}", "1")
        store.wait([f"saw/{r}" for r in others], timedelta(seconds=_TELLS_S))
        late = getattr(error, "late_ranks", ())
        return Found(type(error).__name__, str(error), late, took, 0)


def _take_steps(
    is_victim: bool, fault: Fault, store: dist.Store, stack: contextlib.ExitStack
) -> None:
    device, backend = _ON[fault.over]
    config = EPConfig(**SIZES, timeout_s=TIMEOUT_S, backend=backend)

    def happens() -> None:
        if not store.check(["fault"]):  # once
            store.set("fault", repr(time.monotonic()))
            ACTS[fault.what](device)

    if is_victim and fault.place == "before Buffer":
        happens()
    if is_victim and fault.what == "makes another Buffer":
        store.set("fault", repr(time.monotonic()))
        config = dataclasses.replace(config, hidden=1024)
    count = 2 if fault.what == "uses another Buffer" else 1
    buffers = [stack.enter_context(Buffer(None, config)) for _ in range(count)]
    first = step(buffers, lambda place: None, Given(), None, device)
    meet(dist.group.WORLD, "go on", None, 60.0)
    given, at, inside = Given(), lambda place: None, contextlib.nullcontext()
    if is_victim and fault.what in OTHERWISE:
        given = OTHERWISE[fault.what]
        store.set("fault", repr(time.monotonic()))
    elif is_victim and fault.place.startswith("in "):
        inside = _inside(fault.place, happens)
    elif is_victim:

        def at(place: str) -> None:
            if place == fault.place:
                happens()

    with inside:
        step(buffers, at, given, first, device)
        step(buffers, lambda place: None, Given(), first, device)  # what nobody waited for is said


@contextlib.contextmanager
def _inside(place: str, happens: Callable[[], None]) -> Iterator[None]:
    """Have it happen inside an operation, as soon as that has told others that it runs."""
    words = place.removeprefix("in ").split(" of ")
    if len(words) == 2:
        phase, op = words
        begin = messages.Exchange.__init__

        def exchange(
            self: Any, transport: Any, send: Any, recv: Any, rows: Any, of: Any, name: str
        ):
            if (of.op, name) == (op, phase):
                happens()
            begin(self, transport, send, recv, rows, of, name)

        with mock.patch.object(messages.Exchange, "__init__", exchange):
            yield
        return
    name = {"low-latency dispatch": "low_latency_dispatch"}.get(words[0], words[0])
    call = getattr(Buffer, name)

    def launched(self: Buffer, *args: Any, **options: Any) -> Any:
        if name == "dispatch":
            options["num_worst_tokens"] = 256  # the host waits for nothing
        result = call(self, *args, **options)
        happens()  # its kernels run
        return result

    with mock.patch.object(Buffer, name, launched):
        yield


def _wake(store: dist.Store, fault: Fault) -> None:
    """Have a process that stands still go on, soon or when all others have said what they saw."""
    keys = ["fault"]
    if fault.error:
        keys += [f"saw/{r}" for r in range(dist.get_world_size()) if r != VICTIM]
    while not store.check(keys):  # to wait would keep the store from this rank's other thread
        time.sleep(0.02)
    time.sleep(STAND_STILL_S)
    os.kill(int(store.get(f"pid/{VICTIM}")), signal.SIGCONT)


def _die(device: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stand_still(device: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise(device: str) -> None:
    raise ValueError("an expert of this rank")


def _run_out_of_memory(device: str) -> None:
    torch.empty(2**50, dtype=torch.uint8, device=device)


def _break_gpu(device: str) -> None:
    beyond = torch.tensor([7], device=device)
    torch.ones(2, device=device)[beyond].sum().item()


def _lose_links(device: str) -> None:
    """End this process's connections to other ranks; that to the store goes on."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as end:
                if end.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                # A socket that listens has no peer: the end of it would end gloo's process.
                if str(end.getpeername()[1]) != os.environ["MASTER_PORT"]:
                    end.shutdown(socket.SHUT_RDWR)


ACTS: dict[str, Callable[[str], None]] = {
    "is killed": _die,
    "stands still": _stand_still,
    "stands still for a second": _stand_still,
    "raises in its forward": _raise,
    "runs out of memory": _run_out_of_memory,
    "breaks its GPU": _break_gpu,
    "loses its links": _lose_links,
}
