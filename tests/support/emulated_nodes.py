"""Ranks of several nodes without a GPU: the backend between nodes, its kernels run on the CPU.

tests/emulation compiles csrc for the CPU. What the backend asks of torch.cuda is answered here.
Each operation is waited for as soon as it is launched, for torch frees memory of the CPU at once;
or, with `unwaited`, all memory is kept until the end.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cases
import torch
from virtual_nodes import all_ranks

from ep_comm import EPConfig, _native
from ep_comm._native import NativeLibrary, header
from ep_comm.backends.nodes.backend import NodesBackend
from ep_comm.backends.nodes.memory import NodesMemory
from ep_comm.backends.nvlink import streams as nvlink_streams
from ep_comm.backends.requests import Pending, PlanRequest

NUM_SMS = 1024  # all ranks have room for all operations


def is_capturing() -> bool:
    """Whether a graph is captured: replaced by a test that has one."""
    return False


class EmulatedLibrary(NativeLibrary):
    """The functions of the interface that tests/emulation compiles."""

    def __init__(self, path: Path) -> None:
        dll = ctypes.CDLL(str(path))
        for name, (restype, argtypes) in header.FUNCTIONS.items():
            if hasattr(dll, name):
                function = getattr(dll, name)
                function.restype, function.argtypes = restype, argtypes
        dll.emulation_synchronize.argtypes = [ctypes.c_void_p]
        dll.emulation_waits.restype = ctypes.c_char_p
        self.path, self._dll = path, dll
        self.cuda_archs = ("cpu",)
        self.unwaited = False

    def launch(self, function: str, args: ctypes.Structure, stream: int) -> None:
        """Call the function; wait for a low-latency operation, for nothing else here does."""
        super().launch(function, args, stream)
        if "low_latency" in function and not self.unwaited:
            self.synchronize(stream)

    def synchronize(self, stream: int) -> None:
        self._dll.emulation_synchronize(stream)

    def delay(self, up_to_us: int) -> None:
        """Have each copy on a stream come up to that much later, at random; warps begin later."""
        self._dll.emulation_delay(up_to_us)

    def tear_words(self, tears: bool) -> None:
        """Have each word of 16 bytes written in two halves, for a control."""
        self._dll.emulation_tear_words(tears)

    def waits(self) -> str:
        """Return what the threads of all ranks did at the first fault since the last call."""
        return self._dll.emulation_waits().decode()


class _Stream:
    numbers = itertools.count(1)

    def __init__(self, native: EmulatedLibrary) -> None:
        self.cuda_stream = next(self.numbers)
        self._native = native

    def synchronize(self) -> None:
        self._native.synchronize(self.cuda_stream)


class Emulated:
    """What makes of a backend for GPUs one whose kernels run on the CPU."""

    unwaited = False
    kept: list = []

    @staticmethod
    def _current_device() -> torch.device:
        return torch.device("cpu")

    def check_device(self, name: str, rows: torch.Tensor) -> None:
        pass

    def synchronize(self) -> None:
        self._streams.synchronize()
        self.memory.check()

    def plan(self, request: PlanRequest) -> Any:
        routing = super().plan(request)
        self.native.synchronize(routing.stream)  # the host selects probabilities by its experts
        return routing

    def _pending(self, result: Any, asynchronous: bool, keep: tuple) -> Pending:
        if self.unwaited:
            self.kept.append((result, keep))
        else:
            self._streams.synchronize()
            self.memory.check_fault()
        return Pending(result)


class _EmulatedBackend(Emulated, NodesBackend):
    memories: list[tuple[NodesMemory, header.NodesOffsets]] = []

    def __init__(self, memory: NodesMemory, config: EPConfig) -> None:
        super().__init__(memory, config)
        self.memories.append((memory, self.offsets))


class _UnwaitedBackend(_EmulatedBackend):
    unwaited = True


def _name_of(address: int) -> str:
    """Say where in a rank's memory an address is."""
    for memory, offsets in _EmulatedBackend.memories:
        starts = (memory.tensor.data_ptr(), memory.network.memory)
        for start, total in zip(starts, (offsets.total, offsets.network_total), strict=True):
            if not start <= address < start + total:
                continue
            names = [name for name, _ in offsets._fields_ if not name.endswith(("half", "region"))]
            split = names.index("network_credits")
            names = names[:split] if total == offsets.total else names[split:-2]
            starts_of = {name: getattr(offsets, name) for name in names}
            for name in [
                name for name, of_kinds in starts_of.items() if not isinstance(of_kinds, int)
            ]:
                of_kinds = starts_of.pop(name)
                starts_of |= {f"{name}[{kind}]": at for kind, at in enumerate(of_kinds)}
            before = [name for name, at in starts_of.items() if at <= address - start]
            name = max(before, key=starts_of.__getitem__)
            return f"rank {memory.rank}'s {name} + {address - start - starts_of[name]}"
    return f"{address:#x}"


@contextmanager
def emulated_cuda(library: Path) -> Iterator[EmulatedLibrary]:
    """Answer what backends ask of torch.cuda, and give them the kernels of `library`."""
    native = EmulatedLibrary(library)
    first = _Stream(native)

    class Here(threading.local):
        stream = first

    here = Here()

    @contextmanager
    def on_stream(stream: _Stream):
        here.stream = stream
        yield

    def synchronize(streams: nvlink_streams.Streams) -> None:
        for stream in (here.stream.cuda_stream, streams.side):
            native.synchronize(stream)

    zeros = torch.zeros
    answers = {
        "Event": lambda: mock.Mock(cuda_event=next(_Stream.numbers)),
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "stream": on_stream,
        "current_stream": lambda *_: here.stream,
        "synchronize": lambda *_: here.stream.synchronize(),
        "is_current_stream_capturing": lambda: is_capturing(),
        "get_device_properties": lambda _: SimpleNamespace(
            multi_processor_count=NUM_SMS, name="a CPU"
        ),
    }
    with ExitStack() as stack:
        for patch in (
            mock.patch.multiple(torch.cuda, **answers),
            mock.patch.object(
                torch, "zeros", lambda *size, pin_memory=None, **how: zeros(*size, **how)
            ),
            mock.patch.object(nvlink_streams, "raw_stream", lambda _: here.stream.cuda_stream),
            mock.patch.object(nvlink_streams.Streams, "synchronize", synchronize),
            mock.patch.object(_native, "load", lambda: native),
            mock.patch.object(cases, "before_host_waits", lambda: None),
        ):
            stack.enter_context(patch)
        nvlink_streams.in_flight.cache_clear()
        try:
            yield native
        finally:
            native.waits()  # a fault of this run is none of the next one's
            native.delay(0)
            native.tear_words(False)
            Emulated.kept.clear()
            nvlink_streams.in_flight.cache_clear()


def run_emulated_nodes(
    library: Path,
    num_nodes: int,
    ranks_per_node: int,
    function: Callable[..., Any],
    config: EPConfig,
    *args: Any,
    carried: bool = True,
    network_us: int = 100,
    early_flags: bool = False,
    delay_us: int = 0,
    num_sms: int = 4,
    unwaited: bool = False,
    make_memory: Callable[[int], Any] | None = None,
) -> list[Any]:
    """As `run_virtual_nodes`, with the kernels of `library`."""
    with emulated_cuda(library) as native:
        native.unwaited = unwaited
        streams = [_Stream(native) for _ in range(3 * num_nodes * ranks_per_node + 2)]
        try:
            return all_ranks(
                "cpu", _UnwaitedBackend if unwaited else _EmulatedBackend, streams, num_nodes,
                ranks_per_node, function, config, args, carried, network_us, early_flags, delay_us,
                False, num_sms, make_memory,
            )  # fmt: skip
        finally:
            waits = native.waits()
            if waits:
                print("Threads of all ranks at the first fault:")
                print(re.sub(r"at (0x\w+)", lambda at: "at " + _name_of(int(at[1], 16)), waits))
            _EmulatedBackend.memories.clear()
