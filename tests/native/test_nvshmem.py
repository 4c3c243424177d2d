"""The library for nodes over NVSHMEM: how it is built, what is in it, how it is loaded and refused.

Nothing here needs a GPU. What needs the built library is skipped without nvcc or NVSHMEM's wheel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from build_tools import fake_nvcc, output_of, tool
from setuptools.dist import Distribution
from setuptools.errors import CompileError

from ep_comm import _native
from ep_comm._native import header, nvshmem
from ep_comm.errors import EPArgumentError, EPStateError

NODES = (
    *("ep_nodes_plan", "ep_nodes_dispatch", "ep_nodes_combine"),
    *("ep_nodes_low_latency_dispatch", "ep_nodes_low_latency_combine"),
)


@pytest.fixture
def fresh_loader():
    """Lets a test load anew, and leaves no trace of it in the cache."""
    nvshmem._load.cache_clear()
    yield
    nvshmem._load.cache_clear()


@pytest.fixture
def wheel(nvcc) -> Path:
    folders = [folder for folder in nvshmem._wheel_folders() if (folder / "include").exists()]
    if not folders:
        pytest.skip("library for NVSHMEM NOT tested: no NVSHMEM wheel on this machine")
    return folders[0]


@pytest.fixture
def library(wheel) -> nvshmem.NvshmemLibrary:
    """The loaded library. Where there are nvcc and the wheel, that it is not built is a failure."""
    loaded = _native.load_nvshmem()
    assert loaded is not None, _native.nvshmem_unusable_reason()
    return loaded


# ---- What is in it -------------------------------------------------------------------------------


def test_it_is_of_the_wheels_version(library, wheel, setup_module):
    assert library.version == setup_module.nvshmem_version(wheel)
    assert _native.nvshmem_unusable_reason() is None
    assert f"EP_NVSHMEM={library.version}\0".encode() in library.path.read_bytes()


def test_exports_only_its_api(library):
    lines = output_of(tool("nm"), "-D", "--defined-only", library.path).splitlines()
    exported = {line.split()[-1] for line in lines}
    assert exported == nvshmem.SHARED | set(header.NVSHMEM_FUNCTIONS)
    assert nvshmem.SHARED < set(header.FUNCTIONS) and set(NODES) < exported


def test_needs_neither_driver_nor_a_path(library):
    dynamic = output_of(tool("readelf"), "-d", library.path)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert nvshmem.HOST_LIBRARY in needed
    assert not [name for name in needed if "cuda" in name or "torch" in name or "python" in name]
    assert "PATH" not in dynamic


def test_holds_kernels_for_its_architectures(library, nvcc, setup_module):
    cuobjdump = tool("cuobjdump", nvcc)
    for arch in library.cuda_archs:
        usage = output_of(cuobjdump, "--dump-resource-usage", f"-arch=sm_{arch}", library.path)
        kernels = ("send", "relay", "receive", "dispatch", "combine", "raise")
        for kernel in (*kernels, "low_latency_dispatch", "low_latency_combine"):
            assert re.search(rf"Function \S*{kernel}_kernel", usage), (arch, kernel)
    if "EP_COMM_CUDA_ARCHS" not in os.environ:
        assert ",".join(library.cuda_archs) == setup_module.DEFAULT_CUDA_ARCHS


def test_a_dispatch_and_a_plan_have_room_on_one_sm(library, nvcc):
    """In PROTOCOL.md all blocks that wait for one another are on the GPU together."""
    usage = output_of(tool("cuobjdump", nvcc), "--dump-resource-usage", library.path)
    registers = re.findall(r"Function \S*?(\w+?)_kernel\S*\s+REG:(\d+)", usage)
    most = {
        kernel: max(
            int(count)
            for name, count in registers
            if name.endswith(kernel) and "low_latency" not in name
        )
        for kernel in ("send", "relay", "receive", "dispatch")
    }
    threads = {"dispatch": 256}
    on_one_sm = {kernel: count * threads.get(kernel, 512) for kernel, count in most.items()}
    for plan in ("send", "relay", "receive"):
        assert on_one_sm["dispatch"] + on_one_sm[plan] <= 65536, (plan, most)


# ---- What works without a GPU --------------------------------------------------------------------


def test_where_things_stand_is_the_same(library):
    both = [library, _native.load()]
    args = header.NodesLayoutArgs(64, 256, 4, 2, 2)
    first, second = (bytes(each.nodes_offsets(args)) for each in both)
    assert first == second and any(first)


def test_before_there_is_a_world(library):
    assert not library.is_up()
    with pytest.raises(EPStateError, match="libep_comm_nvshmem: NVSHMEM is not initialised"):
        library.world()
    for call in (
        lambda: library.allocate(512),
        lambda: library.free(512),
        lambda: library.finalize(),
        lambda: library.raise_flag(512, 1, 0, 0),
    ):
        with pytest.raises(EPStateError, match="ep_nvshmem_init has not been called"):
            call()
    with pytest.raises(EPArgumentError, match="rank 2 of 2 ranks"):
        library.initialize(None, 2, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would make a world")
def test_without_a_gpu_there_is_an_error_and_no_exit(library):
    """In a process of its own: NVSHMEM's libraries like to end the one that they are in."""
    code = """
    from ep_comm import _native
    library = _native.load_nvshmem()
    unique_id = library.new_id()
    assert len(unique_id) == 128 and any(unique_id)
    for call in (lambda: library.initialize(unique_id, 0, 1), library.is_consistent):
        try:
            call()
        except Exception as error:
            print(type(error).__name__, error)
    """
    env = {**os.environ, "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert re.match(r"EPStateError libep_comm_nvshmem: ep_nvshmem_init: .*\(cudaError\w+\)", first)
    assert re.match(r"EPStateError libep_comm_nvshmem: ep_nvshmem_consistent: .*cudaError", second)


# ---- Loader --------------------------------------------------------------------------------------


def test_a_library_that_was_not_built(monkeypatch, fresh_loader, tmp_path):
    monkeypatch.setattr(nvshmem, "LIBRARY_PATH", tmp_path / "libep_comm_nvshmem.so")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert _native.load_nvshmem() is None
    reason = _native.nvshmem_unusable_reason()
    assert "libep_comm_nvshmem.so was not built: NVSHMEM or nvcc was not found" in reason
    assert "pip install 'ep_comm[nvshmem-cu12]'" in reason


@pytest.mark.parametrize(("cuda", "extra"), [(None, "cu13"), ("12.8", "cu12"), ("13.0", "cu13")])
def test_a_missing_wheel_is_named_by_its_extra(library, monkeypatch, fresh_loader, cuda, extra):
    monkeypatch.setattr(nvshmem, "HOST_LIBRARY", "libnvshmem_host.so.none")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert _native.load_nvshmem() is None
    assert f"pip install 'ep_comm[nvshmem-{extra}]'" in _native.nvshmem_unusable_reason()


def test_where_nothing_of_nvidia_is_installed(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(nvshmem.importlib.util, "find_spec", missing)
    assert nvshmem._wheel_folders() == []


def missing(name: str):
    raise ModuleNotFoundError(name)


def test_a_library_of_another_header_is_refused(library, monkeypatch, fresh_loader):
    monkeypatch.setattr(header, "DIGEST", "0" * 64)
    assert _native.load_nvshmem() is None
    assert "was built from another ep_comm.h" in _native.nvshmem_unusable_reason()


def test_a_wheel_of_another_version_is_refused_by_name(library, tmp_path):
    lib = tmp_path / "nvidia" / "nvshmem" / "lib"
    lib.mkdir(parents=True)
    undefined = output_of(tool("nm"), "-D", "--undefined-only", library.path)
    stubs = set(re.findall(r"U (nvshmem\w+)", undefined)) - {"nvshmemx_vendor_get_version_info"}
    source = tmp_path / "host.c"
    source.write_text(
        "void nvshmemx_vendor_get_version_info(int* major, int* minor, int* patch) {\n"
        "  *major = 3; *minor = 14; *patch = 15;\n}\n"
        + "".join(f"void {name}(void) {{}}\n" for name in sorted(stubs))
    )
    symbols = tmp_path / "versions"
    symbols.write_text("NVSHMEM { global: *; };\n")
    host = lib / nvshmem.HOST_LIBRARY
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{host.name}", f"-Wl,--version-script={symbols}"]
    subprocess.run([tool("gcc"), *flags, source, "-o", host], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from ep_comm import _native; print(_native.nvshmem_unusable_reason())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (
        f"was built with NVSHMEM {library.version}, and {host} is 3.14.15: they have to be the same"
    ) in result.stdout
    assert f"nvidia-nvshmem-cu13=={library.version}" in result.stdout


# ---- setup.py ------------------------------------------------------------------------------------

# Leaves its arguments in `calls`, and in its output what the sources would leave there. Fails where
# a file `fails` says so for the library over NVSHMEM.
NVCC = """
    case "$*" in *--dryrun*) exit 0 ;; esac
    case "$*" in *EP_NETWORK_NVSHMEM*) [ ! -e "$CUDA_HOME/fails" ] || exit 3 ;; esac
    echo "$@" >> "$CUDA_HOME/calls"
    version=$(cat "$CUDA_HOME/version")
    while [ $# -gt 0 ]; do
        case $1 in
            -DEP_CUDA_ARCHS=*) archs=${1#-D} ;;
            -o) printf '%s\\0EP_NVSHMEM=%s\\0' "$archs" "$version" > "$2" ;;
        esac
        shift
    done"""


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Path:
    """A machine with an nvcc, and NVSHMEM 3.4.5 among the packages of Python."""
    fake_nvcc(monkeypatch, tmp_path, NVCC)
    monkeypatch.delenv("EP_COMM_CUDA_ARCHS", raising=False)
    monkeypatch.delenv("EP_COMM_NVSHMEM_HOME", raising=False)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path / "site")])
    install_nvshmem(tmp_path, "3.4.5")
    return tmp_path


def install_nvshmem(machine: Path, version: str) -> None:
    home = machine / "site" / "nvidia" / "nvshmem"
    for name in ("include/nvshmem.h", "lib/libnvshmem_host.so.3", "include/non_abi/version"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    lines = [f"#define NVSHMEM_VENDOR_{part}_VERSION {number}\n" for part, number in parts]
    (home / "include" / "non_abi" / "nvshmem_version.h").write_text("".join(lines))
    (machine / "version").write_text(version)


def build(setup_module, machine: Path) -> set[str]:
    """Run the build; return the files that it made, all of them new or up to date."""
    extensions = [setup_module.LIBRARY, setup_module.NVSHMEM_LIBRARY]
    command = setup_module.BuildNative(Distribution({"ext_modules": extensions}))
    command.build_lib, command.build_temp = str(machine / "lib"), str(machine / "temp")
    command.ensure_finalized()
    command.run()
    made = {path.name for path in (machine / "lib").rglob("*.so")}
    assert made == {Path(path).name for path in command.get_outputs()}
    return made


def calls(machine: Path) -> list[str]:
    return (machine / "calls").read_text().splitlines()


BOTH = {"libep_comm.so", "libep_comm_nvshmem.so"}


def test_it_is_built_where_the_wheel_is(setup_module, machine):
    assert build(setup_module, machine) == BOTH
    plain, *over_nvshmem = calls(machine)
    assert "csrc/nvshmem" not in plain and "NVSHMEM" not in plain
    for command in over_nvshmem:
        assert (
            f"-DEP_NETWORK_NVSHMEM -rdc=true -isystem={machine}/site/nvidia/nvshmem/inc" in command
        )
    assert "-lnvshmem_device" in command and command.endswith("-l:libnvshmem_host.so.3")
    named = [word for command in over_nvshmem for word in command.split() if word.endswith(".cu")]
    assert sorted(named) == sorted(setup_module.NVSHMEM_LIBRARY.sources)
    assert all((setup_module.ROOT / name).exists() for name in named)


def test_it_is_built_again_for_another_wheel(setup_module, machine):
    build(setup_module, machine)
    before = calls(machine)
    assert build(setup_module, machine) == BOTH and calls(machine) == before  # is up to date
    install_nvshmem(machine, "3.8.0")
    assert build(setup_module, machine) == BOTH
    assert calls(machine) == before + before[1:]


@pytest.mark.parametrize("how", ["no wheel", "none"])
def test_without_the_wheel_there_is_the_other_library(setup_module, monkeypatch, machine, how):
    build(setup_module, machine)
    if how == "none":
        monkeypatch.setenv("EP_COMM_NVSHMEM_HOME", "none")
    else:
        (machine / "site" / "nvidia" / "nvshmem" / "include" / "nvshmem.h").unlink()
    assert build(setup_module, machine) == {"libep_comm.so"}


def test_an_nvshmem_that_does_not_fit_costs_only_its_library(setup_module, machine, caplog):
    (machine / "fails").touch()
    assert build(setup_module, machine) == {"libep_comm.so"}
    assert "no operations between nodes over NVSHMEM: " in caplog.text


def test_an_nvshmem_that_was_named_has_to_fit(setup_module, monkeypatch, machine):
    monkeypatch.setenv("EP_COMM_NVSHMEM_HOME", str(machine / "site" / "nvidia" / "nvshmem"))
    (machine / "fails").touch()
    with pytest.raises(CompileError, match="nvcc failed with status 3"):
        build(setup_module, machine)
    monkeypatch.setenv("EP_COMM_NVSHMEM_HOME", str(machine))
    with pytest.raises(CompileError, match="has no include/nvshmem.h and lib/libnvshmem_host.so.3"):
        build(setup_module, machine)


def test_the_version_for_tests_is_that_of_setup_venv(setup_module):
    text = (setup_module.ROOT / "pyproject.toml").read_text()
    assert len(re.findall(r"nvidia-nvshmem-cu13==[0-9.]*", text)) == 1  # scripts/setup_venv.sh
