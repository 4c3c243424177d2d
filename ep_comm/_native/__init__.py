"""The CUDA library ``libep_comm.so`` through ctypes: loaded once, checked against csrc/ep_comm.h.

The library has a plain C ABI and needs neither an NVIDIA driver nor torch to load, so importing
this module says on any machine whether the installed build fits this Python code.

    native = load()          # None where there is no usable library; status() says why
    native.check(native.layout(args, stream))
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

from ep_comm.errors import EPArgumentError, EPStateError

ABI_VERSION = 1
LIBRARY_PATH = Path(__file__).with_name("libep_comm.so")

# Mirrors of the enums and limits of ep_comm.h; tests/test_native.py compares them with it.
EP_OK = 0
EP_ERR_ARGUMENT = 1
EP_ERR_CUDA = 2
EP_INPUT_TOPK_INT32 = 0
EP_INPUT_TOPK_INT64 = 1
EP_INPUT_ROUTING_MAP = 2
EP_ROUTING_OK = 0
EP_ROUTING_OUT_OF_RANGE = 1
EP_ROUTING_DUPLICATE = 2
EP_ROUTING_TOO_MANY = 3
EP_MAX_TOPK = 32
EP_MAX_EXPERTS = 4096
EP_MAX_RANKS = 1024


class LayoutArgs(ctypes.Structure):
    """``ep_layout_args``: device pointers and sizes of one routing layout; see ep_comm.h."""

    _fields_ = [
        ("input", ctypes.c_void_p),
        ("topk_idx_out", ctypes.c_void_p),
        ("num_tokens_per_rank", ctypes.c_void_p),
        ("num_tokens_per_expert", ctypes.c_void_p),
        ("is_token_in_rank", ctypes.c_void_p),
        ("send_slot", ctypes.c_void_p),
        ("error", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("num_topk", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("num_ranks", ctypes.c_int32),
        ("input_kind", ctypes.c_int32),
    ]


_STRUCTS: dict[str, type[ctypes.Structure]] = {"ep_layout_args": LayoutArgs}

# Name -> (result, arguments) of every function but ep_abi_version, which is looked up before any
# other: a library of another version may lack some of these.
_FUNCTIONS: dict[str, tuple[type, list[type]]] = {
    "ep_cuda_archs": (ctypes.c_char_p, []),
    "ep_last_error": (ctypes.c_char_p, []),
    "ep_struct_layout": (
        ctypes.c_int32,
        [ctypes.c_char_p, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32],
    ),
    "ep_layout_workspace_bytes": (
        ctypes.c_int64,
        [ctypes.c_int64, ctypes.c_int32, ctypes.c_int32],
    ),
    "ep_layout": (ctypes.c_int32, [ctypes.POINTER(LayoutArgs), ctypes.c_void_p]),
}


class _UnusableLibrary(Exception):
    """The library is missing or does not fit; the text says what to do about it."""


class NativeLibrary:
    """A loaded ``libep_comm.so`` whose ABI version and struct layouts have been verified.

    Attributes:
        path: File that was loaded.
        abi_version: ABI version of the library, equal to `ABI_VERSION`.
        cuda_archs: GPU architectures that it holds code for, such as ``("90a", "100a")``.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise _UnusableLibrary(
                f"{path} was not built (no nvcc at install time); the reference backend is what is "
                "left. To build it, reinstall ep_comm where nvcc is on PATH or CUDA_HOME is set."
            )
        try:
            dll = ctypes.CDLL(str(path))
            dll.ep_abi_version.restype = ctypes.c_int32
            self.abi_version: int = dll.ep_abi_version()
            if self.abi_version != ABI_VERSION:
                raise _UnusableLibrary(
                    f"{path} has ABI version {self.abi_version}, this ep_comm needs version "
                    f"{ABI_VERSION}: rebuild it by reinstalling ep_comm."
                )
            for name, (restype, argtypes) in _FUNCTIONS.items():
                function = getattr(dll, name)
                function.restype = restype
                function.argtypes = argtypes
        except (OSError, AttributeError) as error:
            raise _UnusableLibrary(f"{path} cannot be loaded: {error}") from error
        self.path = path
        self._dll = dll
        self.cuda_archs: tuple[str, ...] = tuple(dll.ep_cuda_archs().decode().split("+"))
        for struct_name, mirror in _STRUCTS.items():
            self._verify_struct(struct_name, mirror)

    def _verify_struct(self, name: str, mirror: type[ctypes.Structure]) -> None:
        fields = [field[0] for field in mirror._fields_]
        expected = [ctypes.sizeof(mirror), *(getattr(mirror, field).offset for field in fields)]
        values = (ctypes.c_int32 * len(expected))()
        count = self._dll.ep_struct_layout(name.encode(), values, len(expected))
        if count != len(expected) or list(values) != expected:
            raise _UnusableLibrary(
                f"{self.path} lays out {name} as {list(values)} ({count} values: size, then "
                f"offsets of its fields), this ep_comm as {expected}: rebuild it by reinstalling "
                "ep_comm."
            )

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
        """Bytes of device memory that `layout` needs besides its outputs.

        Raises:
            EPArgumentError: A size is out of bounds.
        """
        num_bytes = self._dll.ep_layout_workspace_bytes(num_tokens, num_experts, num_ranks)
        if num_bytes < 0:
            self.check(EP_ERR_ARGUMENT)
        return num_bytes

    def layout(self, args: LayoutArgs, stream: int) -> int:
        """Launch the routing layout on `stream` (a ``cudaStream_t`` as an integer).

        Returns:
            The status, for `check`.
        """
        return self._dll.ep_layout(ctypes.byref(args), stream)


@functools.cache
def _load() -> tuple[NativeLibrary | None, str]:
    try:
        library = NativeLibrary(LIBRARY_PATH)
    except _UnusableLibrary as error:
        if LIBRARY_PATH.exists():
            # Built, yet unusable: not what the user expects, so do not fall back in silence.
            warnings.warn(f"ep_comm runs without its CUDA library: {error}", stacklevel=3)
        return None, str(error)
    archs = ", ".join(f"sm_{arch}" for arch in library.cuda_archs)
    return library, f"{library.path} (ABI version {library.abi_version}, {archs})"


def load() -> NativeLibrary | None:
    """The CUDA library, or None where there is no usable one. Loads at the first call only."""
    return _load()[0]


def status() -> str:
    """What `load` loaded (path, ABI version, architectures), or why it did not."""
    return _load()[1]
