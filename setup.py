"""Builds ep_comm/_native/libep_comm.so with nvcc; everything else is in pyproject.toml.

The library has a C ABI and uses neither torch's nor Python's headers, so this file imports neither
and the wheel fits every Python 3 of the platform. Without nvcc the package installs without the
library; where nvcc is found, a failure of it fails the install.

Environment:
    CUDA_HOME: CUDA toolkit to use; otherwise nvcc from PATH, then /usr/local/cuda.
    EP_COMM_CUDA_ARCHS: architectures to compile for, comma-separated; default "90a,100a". Those
        that nvcc does not know are left out with a warning; that none is left is an error.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
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
HEADER = ROOT / "ep_comm" / "_native" / "ep_comm.h"  # Python reads it too
LIBRARY = Extension(
    name="ep_comm._native.libep_comm",
    sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu")),
    depends=sorted(
        str(path.relative_to(ROOT)) for path in [HEADER, *(ROOT / "csrc").rglob("*.cuh")]
    ),
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


def nvcc_command(nvcc: str, archs: list[str], output: Path) -> list[str]:
    """Return the command that compiles and links all of csrc into one shared library."""
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
        "-Xlinker=--as-needed",
        "-shared",
        "-cudart=static",
        "-o",
        str(output),
        *LIBRARY.sources,
    ]


def is_current(output: Path, archs: list[str]) -> bool:
    """Return whether `output` is newer than all it is made of, and holds code for just `archs`."""
    inputs = [ROOT / path for path in [*LIBRARY.sources, *LIBRARY.depends, "setup.py"]]
    if not output.exists() or output.stat().st_mtime < max(p.stat().st_mtime for p in inputs):
        return False
    # csrc/abi.cu leaves this text, a C string, in the library.
    return f"EP_CUDA_ARCHS={'+'.join(archs)}\0".encode() in output.read_bytes()


class BuildNative(build_ext):
    """Runs nvcc in place of the C compiler that setuptools would run."""

    def run(self) -> None:
        self.nvcc = find_nvcc()
        if self.nvcc is None:
            log.warning(NOT_BUILT)
            # An earlier build's library would end up in a wheel that is tagged as having none.
            Path(self.build_lib, self.get_ext_filename(LIBRARY.name)).unlink(missing_ok=True)
            self.extensions = []  # so that nobody looks for the file
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        archs = known_archs(self.nvcc, wanted_archs())
        if is_current(output, archs) and not self.force:
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        command = nvcc_command(self.nvcc, archs, output)
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
    ext_modules=[LIBRARY],
    cmdclass={
        "build_ext": BuildNative,
        "build_py": BuildPython,
        "bdist_wheel": PlatformWheel,
    },
)
