"""The CUDA library ``libep_comm.so`` through ctypes: loaded once, built from this ``ep_comm.h``.

The library has a plain C ABI and needs no NVIDIA driver to load, so `status` says on any machine
whether there is a build that fits.

    native = load_for(tensor.device)   # None where that cannot use it; unusable_reason says why
    native.launch("ep_layout", args, stream)

``libep_comm_nvshmem.so`` has the operations between nodes over NVSHMEM: `load_nvshmem`.
"""

from __future__ import annotations

import functools
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from ep_comm._native.library import NativeLibrary, UnusableLibrary
from ep_comm._native.nvshmem import NvshmemLibrary, load_nvshmem, nvshmem_unusable_reason

__all__ = [
    "NativeLibrary",
    "NvshmemLibrary",
    "load",
    "load_for",
    "load_nvshmem",
    "nvshmem_unusable_reason",
    "status",
    "unusable_reason",
]

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY_PATH = PACKAGE / "_native" / "libep_comm.so"


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
        if not LIBRARY_PATH.exists():
            raise UnusableLibrary(_why_there_is_none(LIBRARY_PATH))
        library = NativeLibrary(LIBRARY_PATH)
    except UnusableLibrary as error:
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
