"""Builds the libraries in ep_comm/_native/ with nvcc; everything else is in pyproject.toml.

They have a C ABI and use neither torch's nor Python's headers, so this file imports neither and the
wheel fits every Python 3 of the platform. Without nvcc the package installs without libraries;
where nvcc is found, a failure of it fails the install.

libep_comm_nvshmem.so is built where NVSHMEM's wheel is found too: among the packages of the Python
that pip installs for, even while pip builds in an environment of its own. torch brings the wheel,
so most have not asked for this library: if it cannot be built, the package installs without it.

Environment:
    CUDA_HOME: CUDA toolkit to use; otherwise nvcc from PATH, then /usr/local/cuda.
    EP_COMM_CUDA_ARCHS: architectures to compile for, comma-separated; default "90a,100a". Those
        that nvcc does not know are left out with a warning; that none is left is an error.
    EP_COMM_NVSHMEM_HOME: folder with NVSHMEM's include/ and lib/, where it is not found by itself;
        a library that cannot be built with it is an error. "none" leaves the library out.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "90a,100a"  # Hopper, Blackwell
DEFAULT_CUDA_HOME = "/usr/local/cuda"
NVSHMEM_HOST = "lib/libnvshmem_host.so.3"  # of every version 3
HEADER = ROOT / "ep_comm" / "_native" / "ep_comm.h"  # Python reads it too


def sources(pattern: str, *without: Path) -> list[str]:
    paths = (ROOT / "csrc").rglob(pattern)
    return sorted(str(path.relative_to(ROOT)) for path in paths if path.parent not in without)


NVSHMEM_SOURCES = ROOT / "csrc" / "nvshmem"
DEPENDS = [str(HEADER.relative_to(ROOT)), *sources("*.cuh")]
LIBRARY = Extension(
    name="ep_comm._native.libep_comm",
    sources=sources("*.cu", NVSHMEM_SOURCES),
    depends=DEPENDS,
)
NVSHMEM_LIBRARY = Extension(
    name="ep_comm._native.libep_comm_nvshmem",
    sources=[
        *("csrc/abi.cu", "csrc/host.cu", "csrc/load.cu"),
        *(f"csrc/nodes/{name}.cu" for name in ("combine/combine", "dispatch", "layout", "plan")),
        *(f"csrc/nodes/low_latency/{name}.cu" for name in ("combine", "dispatch")),
        *(f"csrc/nvshmem/{name}.cu" for name in ("calls", "world")),
    ],
    depends=DEPENDS,
)
NOT_BUILT = """\
******************************************************************************************
ep_comm: nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda).
         The CUDA library was NOT built; the reference backend is what is left.
         To build it, install a CUDA toolkit, set CUDA_HOME, and install ep_comm again.
******************************************************************************************"""


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None. Looks in CUDA_HOME, then PATH, then /usr/local/cuda."""

    def in_home(home: str) -> str | None:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))

    cuda_home = os.environ.get("CUDA_HOME")
    return (cuda_home and in_home(cuda_home)) or shutil.which("nvcc") or in_home(DEFAULT_CUDA_HOME)


def find_nvshmem() -> Path | None:
    """Return the folder with NVSHMEM's include/ and lib/, or None."""
    home = os.environ.get("EP_COMM_NVSHMEM_HOME", "")
    if home == "none":
        return None
    if home:
        folder = Path(home)
        if not is_nvshmem(folder):
            raise CompileError(
                f"EP_COMM_NVSHMEM_HOME={home!r} has no include/nvshmem.h and {NVSHMEM_HOST}: "
                "expected a folder such as .../site-packages/nvidia/nvshmem, or none."
            )
        return folder
    # pip's environment to build in has this Python, but not its packages on sys.path.
    folders = (Path(path, "nvidia", "nvshmem") for path in (*sys.path, *site.getsitepackages()))
    return next(filter(is_nvshmem, folders), None)


def is_nvshmem(folder: Path) -> bool:
    return (folder / "include" / "nvshmem.h").exists() and (folder / NVSHMEM_HOST).exists()


def nvshmem_version(folder: Path) -> str:
    """Return the version of the NVSHMEM in `folder`, such as "3.4.5"."""
    header = folder / "include" / "non_abi" / "nvshmem_version.h"
    text = header.read_text() if header.exists() else ""
    numbers = dict(re.findall(r"define NVSHMEM_VENDOR_(\w+)_VERSION (\d+)", text))
    return ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))


def wanted_archs() -> list[str]:
    """Return the architectures to compile for, such as ``["90a", "100a"]``."""
    text = os.environ.get("EP_COMM_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)
    archs = [arch.strip() for arch in text.split(",")]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise CompileError(
                f"EP_COMM_CUDA_ARCHS={text!r}: {arch!r} is no architecture; expected something "
                f"like {DEFAULT_CUDA_ARCHS!r}"
            )
    return archs


def known_archs(nvcc: str, archs: list[str]) -> list[str]:
    """Return those of `archs` that `nvcc` knows, and warn of the others."""
    unknown = [arch for arch in archs if not knows(nvcc, arch)]
    known = [arch for arch in archs if arch not in unknown]
    if not known:
        raise CompileError(
            f"{nvcc} knows none of the architectures {', '.join(archs)}: install a newer CUDA "
            "toolkit, or name others in EP_COMM_CUDA_ARCHS."
        )
    for arch in unknown:
        log.warning(
            f"ep_comm: {nvcc} does not know sm_{arch}: the CUDA library is built without it, and "
            "such GPUs get the reference backend."
        )
    return known


def knows(nvcc: str, arch: str) -> bool:
    """Ask nvcc without compiling: its lists (--list-gpu-arch) leave out names such as sm_90a."""
    command = [nvcc, gencode(arch), "--dryrun", "-cubin", LIBRARY.sources[0]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "unsupported gpu architecture" not in result.stderr.lower()


def gencode(arch: str) -> str:
    """Return the flag that compiles for `arch`."""
    return f"-gencode=arch=compute_{arch},code=sm_{arch}"


def nvcc_command(nvcc: str, archs: list[str]) -> list[str]:
    """Return the command that compiles, without what and into what."""
    return [
        nvcc,
        *map(gencode, archs),
        f"-DEP_CUDA_ARCHS={'+'.join(archs)}",
        f"-DEP_HEADER_DIGEST={hashlib.sha256(HEADER.read_bytes()).hexdigest()}",
        "-Icsrc",
        f"-I{HEADER.parent}",
        "-O3",
        "-std=c++17",
        "-lineinfo",
        "--threads=0",
        # No exception may cross a C ABI; without them the library needs less of libstdc++ too.
        "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-Wall,-Wextra",
    ]


def link_flags(output: Path) -> list[str]:
    """Return what makes a shared library of it."""
    return ["-Xlinker=--as-needed", "-shared", "-cudart=static", "-o", str(output)]


def nvshmem_commands(command: list[str], folder: Path, temp: Path, output: Path) -> list[list[str]]:
    """Return the commands, as `command` begins, that build the library over NVSHMEM."""
    calls, calls_object = "csrc/nvshmem/calls.cu", str(temp / "calls.o")
    rest = [source for source in NVSHMEM_LIBRARY.sources if source != calls]
    command = [*command, "-DEP_NETWORK_NVSHMEM", "-rdc=true", f"-isystem={folder / 'include'}"]
    link = [
        *link_flags(output),
        f"-L{folder / 'lib'}",
        "-lnvshmem_device",
        # Another library with NVSHMEM in it has functions of the same names: each has to call its
        # own, for it has device memory of its own.
        "-Xlinker=--exclude-libs,ALL",
        # Python loads it first (ep_comm/_native/nvshmem.py), so there is no path to it in here.
        f"-l:{Path(NVSHMEM_HOST).name}",
    ]
    return [
        # A plan's kernel has 64 registers at most (csrc/network/nvshmem.cuh), so what it calls too.
        [*command, "-maxrregcount=64", "-dc", calls, "-o", calls_object],
        [*command, *rest, calls_object, *link],
    ]


def is_current(output: Path, ext: Extension, texts: list[str]) -> bool:
    """Return whether `output` is newer than all it is made of, and holds these C strings."""
    inputs = [ROOT / path for path in [*ext.sources, *ext.depends, "setup.py"]]
    if not output.exists() or output.stat().st_mtime < max(p.stat().st_mtime for p in inputs):
        return False
    built = output.read_bytes()
    return all(f"{text}\0".encode() in built for text in texts)


class BuildNative(build_ext):
    """Runs nvcc in place of the C compiler that setuptools would run."""

    def run(self) -> None:
        self.nvcc = find_nvcc()
        self.nvshmem = find_nvshmem() if self.nvcc else None
        if self.nvcc is None:
            log.warning(NOT_BUILT)
            self.leave_out(LIBRARY)
        if self.nvshmem is None:
            self.leave_out(NVSHMEM_LIBRARY)
        super().run()

    def leave_out(self, ext: Extension) -> None:
        # An earlier build's library would end up in a wheel that is to have none.
        Path(self.build_lib, self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        # So that nobody looks for the file.
        self.extensions = [each for each in self.extensions if each.name != ext.name]

    def build_extensions(self) -> None:
        for ext in self.extensions.copy():
            try:
                self.build_extension(ext)
            except CompileError as error:
                if ext.name != NVSHMEM_LIBRARY.name or os.environ.get("EP_COMM_NVSHMEM_HOME"):
                    raise
                log.warning(f"ep_comm: no operations between nodes over NVSHMEM: {error}")
                self.leave_out(ext)

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        archs = known_archs(self.nvcc, wanted_archs())
        # csrc/abi.cu leaves this text, a C string, in the library; csrc/nvshmem/world.cu the other.
        texts = [f"EP_CUDA_ARCHS={'+'.join(archs)}"]
        command, temp = nvcc_command(self.nvcc, archs), Path(self.build_temp).resolve()
        if ext.name == NVSHMEM_LIBRARY.name:
            texts.append(f"EP_NVSHMEM={nvshmem_version(self.nvshmem)}")
            commands = nvshmem_commands(command, self.nvshmem, temp, output)
        else:
            commands = [[*command, *ext.sources, *link_flags(output)]]
        if is_current(output, ext, texts) and not self.force:
            return
        for folder in (output.parent, temp):
            folder.mkdir(parents=True, exist_ok=True)
        for command in commands:
            log.info(" ".join(command))
            result = subprocess.run(command, cwd=ROOT)
            if result.returncode != 0:
                raise CompileError(
                    f"{self.nvcc} failed with status {result.returncode}; its messages are above. "
                    f"EP_COMM_CUDA_ARCHS chooses the architectures (now {','.join(archs)})."
                )

    def get_ext_filename(self, fullname: str) -> str:
        # No Python ABI in the name: the library does not use it.
        return os.path.join(*fullname.split(".")) + ".so"


class BuildPython(build_py):
    """Puts configs/ into the package: ep_comm/pretrain/config_files.py looks for it there."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "ep_comm", "pretrain", "configs")
            folder.mkdir(parents=True, exist_ok=True)
            for config in (ROOT / "configs").glob("*.yaml"):
                self.copy_file(str(config), str(folder / config.name))


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>, or py3-none-any where there is no library in it."""

    def get_tag(self) -> tuple[str, str, str]:
        if find_nvcc() is None:
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[LIBRARY, NVSHMEM_LIBRARY],
    cmdclass={
        "build_ext": BuildNative,
        "build_py": BuildPython,
        "bdist_wheel": PlatformWheel,
    },
)
