"""Build the card: ``build(folder)`` compiles both transports against the headers of the wheel.

NVSHMEM looks its transports up by the names of libraries. Each of ours is called like one of
NVSHMEM's, and is loaded before by LD_PRELOAD.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

CARD = Path(__file__).resolve().parent / "card"
MADE_FOR = "3.4.5"  # the plug-in interface, and the structures of IBGDA's device code
WHEELS = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
_FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror"),
    "-Wno-invalid-offsetof",  # of NVSHMEM's structures, which are plain enough
    # Both transports may be in one process: neither may see the other's symbols.
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-gnu-unique"),
]


class Transport(NamedTuple):
    """One of the two.

    Attributes:
        name: Of the source, and of the result.
        stands_for: The library of NVSHMEM whose place it takes.
    """

    name: str
    stands_for: str


PROXY = Transport("proxy", "nvshmem_transport_ucx.so.3")
IBGDA = Transport("ibgda", "nvshmem_transport_ibgda.so.3")


def missing() -> str | None:
    """Return what is missing to build the card, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    if find_headers() is None:
        return f"needs the headers of NVSHMEM: pip install {WHEELS[0]}=={MADE_FOR}"
    found = [found for wheel in WHEELS if (found := _version(wheel))]
    if MADE_FOR not in found:
        return f"THE SOFTWARE NETWORK CARD IS FOR NVSHMEM {MADE_FOR}, installed: {found}"
    return None


def find_headers() -> Path | None:
    """Return the wheel's folder of headers; nothing of it is loaded."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "nvshmem" / "include"
        if folder.is_dir():
            return folder
    return None


def build(folder: Path) -> dict[str, Path]:
    """Compile into `folder`; return the library of each transport by its name."""
    return {each.name: _library(folder, each) for each in (PROXY, IBGDA)}


def build_loopback(folder: Path, transport: Transport, include: Path | None = None) -> Path:
    """Compile the program that sends between two cards in host memory; return it."""
    program = folder / f"loopback_{transport.name}"
    flags = ["-DSOFTNIC_NO_CUDA", *(["-DSOFTNIC_IBGDA"] if transport == IBGDA else [])]
    sources = [CARD / "loopback.cpp", *_sources(transport)]
    _compile([*flags, *map(str, sources)], include or find_headers(), program)
    return program


def _library(folder: Path, transport: Transport) -> Path:
    library = folder / f"softnic_{transport.name}.so"
    flags = ["-shared", "-Wl,-Bsymbolic", f"-Wl,-soname,{transport.stands_for}"]
    _compile([*flags, *map(str, _sources(transport))], find_headers(), library)
    return library


def _sources(transport: Transport) -> list[Path]:
    return [CARD / "card.cpp", CARD / f"{transport.name}.cpp"]


def _compile(arguments: list[str], include: Path | None, target: Path) -> None:
    folders = [f"-I{CARD}", f"-I{CARD / 'stub'}", *([f"-isystem{include}"] if include else [])]
    command = ["g++", *_FLAGS, *folders, *arguments, "-o", str(target), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _version(wheel: str) -> str | None:
    try:
        return version(wheel)
    except PackageNotFoundError:
        return None
