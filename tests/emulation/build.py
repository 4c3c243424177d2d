"""Compile kernels for the CPU: `built` returns a library with their C interface.

The sources are csrc's own. Only what is no C++ is rewritten: launches and shared memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ep_comm._native import header

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARY = "libep_comm_emulated.so"
# What a buffer needs for low-latency operations.
LOW_LATENCY = (
    "abi.cu",
    "load.cu",
    "host.cu",
    "buffer_layout.cu",
    "plan/plan.cu",
    "low_latency/dispatch/dispatch.cu",
    "low_latency/combine/combine.cu",
)
SOURCES = (
    *LOW_LATENCY,
    "dispatch/dispatch.cu",
    "dispatch/dense.cu",
    "wire/push.cu",
    "combine/combine.cu",
    "elementwise/columnwise.cu",
    "nodes/layout.cu",
    "nodes/plan.cu",
    "nodes/dispatch.cu",
    "nodes/combine/combine.cu",
    "nodes/low_latency/dispatch.cu",
    "nodes/low_latency/combine.cu",
    "network/adversary.cu",
)
# Of the sizes that low-latency kernels are compiled for, one: all would take g++ 15 seconds.
_SHAPES = re.compile(r"(using CompiledShapes = Shapes<Shape<2048, 2>).*?;", re.S)
_LAUNCH = re.compile(r"([\w\[\]\.]+)<<<(.*?)>>>\((.*?)\);", re.S)


def _rewrite(text: str) -> str:
    # Arguments are evaluated at the launch; the kernel runs later.
    text = _LAUNCH.sub(
        r'emulation::launch("\1", \2, [=, run = [=](const auto&... each) { \1(each...); }, '
        r"all = std::make_tuple(\3)] { std::apply(run, all); });",
        text,
    )
    text = _SHAPES.sub(r"\1>;", text)
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* const \2 = reinterpret_cast<\1*>(emulation::the_block->shared);",
        text,
    )
    return text.replace("__shared__ ", "static thread_local ")


def built() -> Path:
    """Return the library of these sources, in the repository's ``build``; compile it once."""
    key = hashlib.sha256()
    for source in sorted((*(ROOT / "csrc").rglob("*"), *HERE.rglob("*"), header.PATH)):
        if source.is_file() and source.suffix != ".pyc":
            key.update(f"{source.relative_to(ROOT)}\0".encode() + source.read_bytes())
    folder = ROOT / "build" / f"emulation-{key.hexdigest()[:16]}"
    if not folder.exists():
        for old in folder.parent.glob("emulation-*"):
            shutil.rmtree(old)
        folder.parent.mkdir(exist_ok=True)
        # Compiled aside and renamed: a folder with this name is always complete.
        with tempfile.TemporaryDirectory() as objects:
            with tempfile.TemporaryDirectory(
                dir=folder.parent, ignore_cleanup_errors=True
            ) as aside:
                shutil.copy(build(Path(objects)), aside)
                with contextlib.suppress(OSError):  # another process was faster
                    Path(aside).rename(folder)
    return folder / LIBRARY


def build(
    folder: Path, sources: Sequence[str] = SOURCES, fault: tuple[str, str, str] | None = None
) -> Path:
    """Compile into `folder`, and return the library.

    fault: a file, a piece of it that stands there once, and what to put there: for controls.
    """
    for source in (ROOT / "csrc").rglob("*.cu*"):
        text, name = source.read_text(), source.relative_to(ROOT / "csrc")
        if fault is not None and str(name) == fault[0]:
            assert text.count(fault[1]) == 1, f"{fault[1]!r} stands {text.count(fault[1])} times"
            text = text.replace(*fault[1:])
        target = folder / "csrc" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_rewrite(text))
    (folder / "csrc" / "common" / "ptx.cuh").unlink()
    flags = [
        "-std=c++17", "-O1", "-g1", "-w", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden",
        f"-I{HERE / 'include'}", f"-I{folder / 'csrc'}", f"-I{header.PATH.parent}",
        "-DEP_CUDA_ARCHS=cpu", f"-DEP_HEADER_DIGEST={header.DIGEST}",
    ]  # fmt: skip
    objects = []
    pending = []
    for source in (*sources, None):
        path = HERE / "runtime.cpp" if source is None else folder / "csrc" / source
        objects.append(folder / f"{len(objects)}.o")
        command = ["g++", "-x", "c++", "-c", *flags, str(path), "-o", str(objects[-1])]
        pending.append(subprocess.Popen(command))
        if len(pending) == 2:
            assert pending.pop(0).wait() == 0, "g++ failed"
    for process in pending:
        assert process.wait() == 0, "g++ failed"
    library = folder / LIBRARY
    command = ["g++", "-shared", "-pthread", *map(str, objects), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


if __name__ == "__main__":
    import sys

    print(build(Path(sys.argv[1])))
