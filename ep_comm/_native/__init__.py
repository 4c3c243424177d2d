"""The CUDA library ``libep_comm.so`` through ctypes: loaded once, built from this ``ep_comm.h``.

The library has a plain C ABI and needs no NVIDIA driver to load, so `status` says on any machine
whether there is a build that fits.

    native = load_for(tensor.device)   # None where that cannot use it; unusable_reason says why
    native.launch("ep_layout", args, stream)
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from ep_comm._native import header
from ep_comm._native.header import EP_ERR_ARGUMENT, EP_OK
from ep_comm.errors import EPArgumentError, EPStateError

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY_PATH = PACKAGE / "_native" / "libep_comm.so"

_MAILBOX_ARRIVED = 1
_MAILBOX_CUDA_ERROR = 3


class _UnusableLibrary(Exception):
    """The library is missing or does not fit; the text says what to do about it."""


def _digest_of(dll: ctypes.CDLL) -> str:
    """Return the `DIGEST` of the header that the library was built from, calling nothing else."""
    dll.ep_header_digest.restype = ctypes.c_char_p
    return dll.ep_header_digest().decode()


class NativeLibrary:
    """A loaded ``libep_comm.so`` that was built from the same ``ep_comm.h`` as is here.

    Attributes:
        path: File that was loaded.
        cuda_archs: GPU architectures that it holds code for, such as ``("90a", "100a")``.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise _UnusableLibrary(_why_there_is_none(path))
        try:
            dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise _UnusableLibrary(f"{path} cannot be loaded: {error}") from error
        if not hasattr(dll, "ep_header_digest") or _digest_of(dll) != header.DIGEST:
            raise _UnusableLibrary(
                f"{path} was built from another ep_comm.h than this ep_comm has: rebuild it by "
                "reinstalling ep_comm."
            )
        for name, (restype, argtypes) in header.FUNCTIONS.items():
            function = getattr(dll, name)
            function.restype = restype
            function.argtypes = argtypes
        self.path = path
        self._dll = dll
        self.cuda_archs: tuple[str, ...] = tuple(dll.ep_cuda_archs().decode().split("+"))

    @property
    def arch_names(self) -> str:
        """`cuda_archs` for a message, such as "sm_90a, sm_100a"."""
        return ", ".join(f"sm_{arch}" for arch in self.cuda_archs)

    def check(self, status: int) -> None:
        """Raise if a function of the library returned anything but ``EP_OK``.

        Raises:
            EPArgumentError: The library refused an argument before it launched anything.
            EPStateError: A CUDA call failed.
        """
        if status == EP_OK:
            return
        text = self._dll.ep_last_error().decode(errors="replace")
        if status == EP_ERR_ARGUMENT:
            raise EPArgumentError(f"libep_comm: {text}")
        raise EPStateError(f"libep_comm: {text} (status {status})")

    def layout_workspace_bytes(self, num_tokens: int, num_experts: int, num_ranks: int) -> int:
        """Return the bytes of device memory that a layout needs besides its outputs.

        Raises:
            EPArgumentError: A size is out of bounds.
        """
        return self._checked_bytes(
            self._dll.ep_layout_workspace_bytes(num_tokens, num_experts, num_ranks)
        )

    def launch(self, function: str, args: ctypes.Structure, stream: int) -> None:
        """Call one of the functions that take a struct of arguments and a stream.

        Args:
            function: Such as ``"ep_layout"``.
            args: Its struct from `ep_comm._native.header`.
            stream: ``cudaStream_t`` as an integer, of the current device.

        Raises:
            EPArgumentError, EPStateError: As `check`.
        """
        self.check(getattr(self._dll, function)(args, stream))

    def load_kernels(self) -> None:
        """Load every kernel on the current device, before any of them may spin."""
        self.check(self._dll.ep_load_kernels())

    def plan_scratch_bytes(self, max_tokens: int, num_experts: int, num_ranks: int) -> int:
        """Return the bytes of device memory that plans of up to these sizes need.

        Raises:
            EPArgumentError: A size is out of bounds.
        """
        return self._checked_bytes(
            self._dll.ep_plan_scratch_bytes(max_tokens, num_experts, num_ranks)
        )

    def nodes_plan_scratch_bytes(
        self, max_tokens: int, num_experts: int, num_nodes: int, ranks_per_node: int
    ) -> int:
        """Return the bytes of device memory that plans between nodes need.

        Raises:
            EPArgumentError: A size is out of bounds.
        """
        return self._checked_bytes(
            self._dll.ep_nodes_plan_scratch_bytes(
                max_tokens, num_experts, num_nodes, ranks_per_node
            )
        )

    def _checked_bytes(self, num_bytes: int) -> int:
        if num_bytes < 0:
            self.check(EP_ERR_ARGUMENT)
        return num_bytes

    def buffer_offsets(self, args: header.BufferLayoutArgs) -> header.BufferOffsets:
        """Return where things stand in the symmetric memory of every rank of a buffer.

        Raises:
            EPArgumentError: A size is out of bounds.
        """
        offsets = header.BufferOffsets()
        self.check(self._dll.ep_buffer_layout(args, ctypes.byref(offsets)))
        return offsets

    def nodes_offsets(self, args: header.NodesLayoutArgs) -> header.NodesOffsets:
        """Return where things stand in the memory of every rank of a buffer between nodes.

        Raises:
            EPArgumentError: A size is out of bounds.
        """
        offsets = header.NodesOffsets()
        self.check(self._dll.ep_nodes_layout(args, ctypes.byref(offsets)))
        return offsets

    def nodes_plan(
        self, args: header.NodesPlanArgs, stream: int, side_stream: int, event: int
    ) -> None:
        """Launch a plan between nodes, as `plan` does."""
        self.check(self._dll.ep_nodes_plan(args, stream, side_stream, event))

    def plan(self, args: header.PlanArgs, stream: int, side_stream: int, event: int) -> None:
        """Launch a plan: its layout on `stream`, the rest on `side_stream`, behind `event`."""
        self.check(self._dll.ep_plan(args, stream, side_stream, event))

    def stream_wait(self, waiting: int, other: int, event: int) -> None:
        """Order `waiting` behind all that is on stream `other` now, through `event`."""
        self.check(self._dll.ep_stream_wait(waiting, other, event))

    def mailbox_wait(
        self, mailbox: int, fault: int, epoch: int, timeout_s: float, stream: int
    ) -> bool:
        """Wait on the host for a plan's counts; the GIL is free meanwhile.

        Returns:
            False after the timeout, or where a kernel reported a fault.

        Raises:
            EPStateError: The stream has a CUDA error.
        """
        answer = self._dll.ep_mailbox_wait(mailbox, fault, epoch, int(timeout_s * 1e9), stream)
        if answer == _MAILBOX_CUDA_ERROR:
            self.check(header.EP_ERR_CUDA)
        return answer == _MAILBOX_ARRIVED


def _why_there_is_none(path: Path) -> str:
    tree = PACKAGE.parent
    other_folders = [folder for folder in sys.path if Path(folder).resolve() != tree]
    hidden = PathFinder.find_spec(PACKAGE.name, other_folders)
    if hidden and hidden.origin:
        package = Path(hidden.origin).parent
        if (package / "_native" / path.name).exists():
            return (
                f"{path} was not built: this is the source tree in {tree}; the installed package "
                f"is in {package}. Run from elsewhere, or pip install -e {tree}."
            )
    return (
        f"{path} was not built (no nvcc at install time); the reference backend is what is "
        "left. To build it, reinstall ep_comm where nvcc is on PATH or CUDA_HOME is set."
    )


@functools.cache
def _load() -> tuple[NativeLibrary | None, str]:
    try:
        library = NativeLibrary(LIBRARY_PATH)
    except _UnusableLibrary as error:
        if LIBRARY_PATH.exists() or torch.cuda.is_available():
            # Not what the user expects, so do not fall back in silence. Where nothing was built and
            # there is no GPU, nothing is lost.
            warnings.warn(f"ep_comm runs without its CUDA library: {error}", stacklevel=3)
        return None, str(error)
    return library, f"{library.path} ({library.arch_names})"


def load() -> NativeLibrary | None:
    """Return the CUDA library, or None where there is no usable one. The first call loads it."""
    return _load()[0]


def load_for(device: torch.device) -> NativeLibrary | None:
    """Return the CUDA library, or None where `device` is no GPU that can use it."""
    library = load() if device.type == "cuda" else None
    return library if library is not None and _has_code(library.cuda_archs, device.index) else None


def unusable_reason(gpu: int) -> str | None:
    """Return why GPU number `gpu` cannot use the library, or None where it can."""
    library = load()
    if library is None:
        return status()
    if _has_code(library.cuda_archs, gpu):
        return None
    name, (major, minor) = torch.cuda.get_device_name(gpu), torch.cuda.get_device_capability(gpu)
    text = f"GPU {gpu}, {name}, is sm_{major}{minor}; the CUDA library has code for "
    return text + library.arch_names


@functools.cache
def _has_code(archs: tuple[str, ...], gpu: int) -> bool:
    capability = torch.cuda.get_device_capability(gpu)
    return any(_runs_on(arch, capability) for arch in archs)


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Return whether a GPU runs machine code for `arch`.

    It runs on later minor versions too, unless it is "a", for one version alone.
    """
    major, minor = divmod(int(arch.rstrip("af")), 10)
    if arch.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def status() -> str:
    """Return what `load` loaded (path, architectures), or why it loaded nothing."""
    return _load()[1]
