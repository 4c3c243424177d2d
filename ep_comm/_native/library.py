"""Libraries of this package through ctypes: files with the C ABI of ``ep_comm.h``."""

from __future__ import annotations

import ctypes
from pathlib import Path

from ep_comm._native import header
from ep_comm._native.header import EP_ERR_ARGUMENT, EP_OK
from ep_comm.errors import EPArgumentError, EPStateError

_MAILBOX_ARRIVED = 1
_MAILBOX_CUDA_ERROR = 3


class UnusableLibrary(Exception):
    """The library is missing or does not fit; the text says what to do about it."""


def _digest_of(dll: ctypes.CDLL) -> str:
    """Return the `DIGEST` of the header that the library was built from, calling nothing else."""
    dll.ep_header_digest.restype = ctypes.c_char_p
    return dll.ep_header_digest().decode()


class Library:
    """A library that is loaded and was built from the same ``ep_comm.h`` as is here.

    It has what every library has: errors, loading and launching kernels, operations between nodes.

    Attributes:
        path: File that was loaded.
        cuda_archs: GPU architectures that it holds code for, such as ``("90a", "100a")``.
    """

    def __init__(self, path: Path, functions: dict[str, tuple[type, list[type]]]) -> None:
        """Load `path`, and say what the `functions` that it has to have take and return."""
        try:
            dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise UnusableLibrary(f"{path} cannot be loaded: {error}") from error
        if not hasattr(dll, "ep_header_digest") or _digest_of(dll) != header.DIGEST:
            raise UnusableLibrary(
                f"{path} was built from another ep_comm.h than this ep_comm has: rebuild it by "
                "reinstalling ep_comm."
            )
        for name, (restype, argtypes) in functions.items():
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
            EPStateError: A call of CUDA or of NVSHMEM failed.
        """
        if status == EP_OK:
            return
        text = self._last_error
        if status == EP_ERR_ARGUMENT:
            raise EPArgumentError(f"{self.path.stem}: {text}")
        raise EPStateError(f"{self.path.stem}: {text} (status {status})")

    @property
    def _last_error(self) -> str:
        return self._dll.ep_last_error().decode(errors="replace")

    def launch(self, function: str, args: ctypes.Structure, stream: int) -> None:
        """Call one of the functions that take a struct of arguments and a stream.

        Args:
            function: Such as ``"ep_layout"``.
            args: Its struct from `ep_comm._native.header`.
            stream: ``cudaStream_t`` as an integer, of the current device.

        Raises:
            EPArgumentError, EPStateError: As `check`.
        """
        status = getattr(self._dll, function)(args, stream)
        if status != EP_OK:
            self.check(status)

    def load_kernels(self) -> None:
        """Load every kernel on the current device, before any of them may spin."""
        self.check(self._dll.ep_load_kernels())

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

    def stream_wait(self, waiting: int, other: int, event: int) -> None:
        """Order `waiting` behind all that is on stream `other` now, through `event`."""
        self.check(self._dll.ep_stream_wait(waiting, other, event))

    def event_wait(self, waiting: int, event: int) -> None:
        """Order the stream `waiting` behind what a ``cudaEvent_t`` was recorded behind."""
        self.check(self._dll.ep_event_wait(waiting, event))

    def mailbox_wait(self, args: header.MailboxArgs) -> bool:
        """Wait on the host for a plan's counts, and add them up; the GIL is free meanwhile.

        Returns:
            False after the timeout, or where a kernel reported a fault.

        Raises:
            EPStateError: The stream has a CUDA error.
        """
        answer = self._dll.ep_mailbox_wait(args)
        if answer == _MAILBOX_CUDA_ERROR:
            self.check(header.EP_ERR_CUDA)
        return answer == _MAILBOX_ARRIVED

    def _checked_bytes(self, num_bytes: int) -> int:
        if num_bytes < 0:
            self.check(EP_ERR_ARGUMENT)
        return num_bytes


class NativeLibrary(Library):
    """``libep_comm.so``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, header.FUNCTIONS)

    def layout_workspace_bytes(self, num_tokens: int, num_experts: int, num_ranks: int) -> int:
        """Return the bytes of device memory that a layout needs besides its outputs.

        Raises:
            EPArgumentError: A size is out of bounds.
        """
        return self._checked_bytes(
            self._dll.ep_layout_workspace_bytes(num_tokens, num_experts, num_ranks)
        )

    def plan_scratch_bytes(self, max_tokens: int, num_experts: int, num_ranks: int) -> int:
        """Return the bytes of device memory that plans of up to these sizes need.

        Raises:
            EPArgumentError: A size is out of bounds.
        """
        return self._checked_bytes(
            self._dll.ep_plan_scratch_bytes(max_tokens, num_experts, num_ranks)
        )

    def buffer_offsets(self, args: header.BufferLayoutArgs) -> header.BufferOffsets:
        """Return where things stand in the symmetric memory of every rank of a buffer.

        Raises:
            EPArgumentError: A size is out of bounds.
        """
        offsets = header.BufferOffsets()
        self.check(self._dll.ep_buffer_layout(args, ctypes.byref(offsets)))
        return offsets

    def copies_reason(self) -> str | None:
        """Return what the driver lacks for copies with flags behind them, or None."""
        return None if self._dll.ep_check_copies() == EP_OK else self._last_error

    def plan(self, args: header.PlanArgs, stream: int, side_stream: int, event: int) -> None:
        """Launch a plan: its layout on `stream`, the rest on `side_stream`, behind `event`."""
        self.check(self._dll.ep_plan(args, stream, side_stream, event))
