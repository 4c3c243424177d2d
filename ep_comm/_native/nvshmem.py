"""The library ``libep_comm_nvshmem.so``: operations between nodes over NVSHMEM, and its world.

It is there where NVSHMEM's wheel was found when ep_comm was built, and needs the wheel of the same
version. Like the other one it needs no NVIDIA driver to load.

    native = load_nvshmem()            # None where there is none; nvshmem_unusable_reason says why
    native.initialize(unique_id, rank, num_ranks)
    address = native.allocate(num_bytes)
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from pathlib import Path

import torch

from ep_comm._native import header
from ep_comm._native.library import Library, UnusableLibrary

LIBRARY_PATH = Path(__file__).with_name("libep_comm_nvshmem.so")
HOST_LIBRARY = "libnvshmem_host.so.3"


# Functions of libep_comm.so that this library has too.
SHARED = {
    "ep_header_digest",
    "ep_cuda_archs",
    "ep_last_error",
    "ep_load_kernels",
    "ep_stream_wait",
    "ep_event_wait",
    "ep_mailbox_wait",
    "ep_nodes_layout",
    "ep_nodes_plan_scratch_bytes",
    "ep_nodes_plan",
    "ep_nodes_dispatch",
    "ep_nodes_combine",
    "ep_nodes_low_latency_dispatch",
    "ep_nodes_low_latency_combine",
}


def _version_name(number: int) -> str:
    """Return "3.4.5" for 30405."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


class NvshmemLibrary(Library):
    """``libep_comm_nvshmem.so``, with an NVSHMEM of the version that it was built with.

    One process has one NVSHMEM world. Its functions belong to the current CUDA device, the same
    one in all calls. "Collective": all ranks of the world call it, and wait there for one another
    without a bound.

    Attributes:
        version: NVSHMEM's version, such as ``"3.4.5"``.
    """

    def __init__(self, path: Path) -> None:
        host_path = _load_host_library()
        own = {name: kinds for name, kinds in header.FUNCTIONS.items() if name in SHARED}
        super().__init__(path, {**own, **header.NVSHMEM_FUNCTIONS})
        compiled, loaded = ctypes.c_int32(), ctypes.c_int32()
        self.check(self._dll.ep_nvshmem_versions(ctypes.byref(compiled), ctypes.byref(loaded)))
        self.version = _version_name(compiled.value)
        if compiled.value != loaded.value:
            raise UnusableLibrary(
                f"{path} was built with NVSHMEM {self.version}, and {host_path} is "
                f"{_version_name(loaded.value)}: they have to be the same. Install ep_comm again, "
                f"or {_package()}=={self.version}."
            )

    def new_id(self) -> bytes:
        """Make the id of a new world, on one rank, which gives it to the others.

        Raises:
            EPStateError: NVSHMEM has no network interface to listen on.
        """
        unique_id = ctypes.create_string_buffer(self._dll.ep_nvshmem_id_bytes())
        self.check(self._dll.ep_nvshmem_new_id(unique_id))
        return unique_id.raw

    def is_up(self) -> bool:
        """Return whether NVSHMEM has been initialised in this process, by whomever."""
        return bool(self._dll.ep_nvshmem_is_up())

    def initialize(self, unique_id: bytes | None, rank: int, num_ranks: int) -> None:
        """Make a world of `num_ranks`, of which this process is `rank`. Collective.

        Where NVSHMEM is up its world is joined: nobody waits, and `unique_id` may be None. This has
        to be called then too.

        Raises:
            EPStateError: NVSHMEM did not initialise, or is up with another world.
        """
        assert unique_id is None or len(unique_id) == self._dll.ep_nvshmem_id_bytes()
        self.check(self._dll.ep_nvshmem_init(unique_id, rank, num_ranks))

    def world(self) -> tuple[int, int]:
        """Return this process's number in the world, and the world's size.

        Raises:
            EPStateError: NVSHMEM is not up.
        """
        pe, num_pes = ctypes.c_int32(), ctypes.c_int32()
        self.check(self._dll.ep_nvshmem_world(ctypes.byref(pe), ctypes.byref(num_pes)))
        return pe.value, num_pes.value

    def allocate(self, num_bytes: int) -> int:
        """Return the address of network memory, the same size on all ranks. Collective.

        It is a multiple of 512. The memory is not zero. Its owner makes it so, and the ranks meet
        after that and before the first operation.

        Raises:
            EPStateError: NVSHMEM has not so much memory, or `initialize` has not been called.
        """
        address = ctypes.c_void_p()
        self.check(self._dll.ep_nvshmem_allocate(num_bytes, ctypes.byref(address)))
        assert address.value is not None
        return address.value

    def free(self, address: int) -> None:
        """Give network memory back. Collective."""
        self.check(self._dll.ep_nvshmem_free(address))

    def finalize(self) -> None:
        """Leave the world; the last user in the process ends it. Collective; not after a fault."""
        self.check(self._dll.ep_nvshmem_finalize())

    def raise_flag(self, address: int, value: int, pe: int, stream: int) -> None:
        """Set the 64 bits of `pe` at the place of `address` in network memory, on a stream.

        Raises:
            EPArgumentError: There is no such PE.
            EPStateError: `initialize` has not been called.
        """
        self.check(self._dll.ep_nvshmem_raise(address, value, pe, stream))

    def is_consistent(self) -> bool:
        """Return whether this GPU takes in a network's writes in the order in which they come.

        Elsewhere kernels have NVSHMEM flush them after each wait for data, which costs time, and is
        done only where NVSHMEM's proxy thread sends: not over IBGDA.

        Raises:
            EPStateError: There is no GPU.
        """
        answer = ctypes.c_int32()
        self.check(self._dll.ep_nvshmem_consistent(ctypes.byref(answer)))
        return bool(answer.value)


def _cuda_version() -> str:
    """Return the CUDA version that NVSHMEM's wheel has to be of: that of torch."""
    return (torch.version.cuda or "13").split(".")[0]


def _package() -> str:
    return f"nvidia-nvshmem-cu{_cuda_version()}"


def _extra() -> str:
    return f"'ep_comm[nvshmem-cu{_cuda_version()}]'"


def _wheel_folders() -> list[Path]:
    """Return where NVSHMEM's wheel is installed. Nothing is imported."""
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return []
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def _load_host_library() -> str:
    """Load NVSHMEM's host library, which ours needs; return which one it is.

    One that is in the process already is taken as it is: torch brings one.
    """
    try:
        ctypes.CDLL(HOST_LIBRARY, mode=os.RTLD_NOLOAD | ctypes.RTLD_GLOBAL)
        return f"the {HOST_LIBRARY} that this process has loaded"
    except OSError:
        pass
    for folder in _wheel_folders():
        path = folder / "lib" / HOST_LIBRARY
        if path.exists():
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise UnusableLibrary(f"{path} cannot be loaded: {error}") from error
            return str(path)
    raise UnusableLibrary(
        f"NVSHMEM is not installed: pip install {_extra()}. Its version has to be the one that "
        "ep_comm was built with."
    )


@functools.cache
def _load() -> NvshmemLibrary | str:
    try:
        if not LIBRARY_PATH.exists():
            raise UnusableLibrary(
                f"{LIBRARY_PATH} was not built: NVSHMEM or nvcc was not found when ep_comm was "
                f"installed. pip install {_extra()}, and install ep_comm once more behind that."
            )
        return NvshmemLibrary(LIBRARY_PATH)
    except UnusableLibrary as error:
        return str(error)


def load_nvshmem() -> NvshmemLibrary | None:
    """Return the library, or None where there is no usable one. The first call loads it."""
    library = _load()
    return None if isinstance(library, str) else library


def nvshmem_unusable_reason() -> str | None:
    """Return why there is no usable library, or None where there is one."""
    library = _load()
    return library if isinstance(library, str) else None
