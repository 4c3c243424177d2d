"""The CUDA library: how it is built, what it exports, what it depends on, how it is loaded.

Nothing here needs a GPU. What needs the built library is skipped where there is no nvcc.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_tools import build_command, fake_nvcc, output_of, tool
from setuptools.dist import Distribution
from setuptools.errors import CompileError

from ep_comm import _native
from ep_comm._native import header
from ep_comm.errors import EPArgumentError, EPStateError


@pytest.fixture
def fresh_loader():
    """Lets a test load anew, and leaves no trace of it in the cache."""
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()


# ---- Header --------------------------------------------------------------------------------------


def test_header_is_c11(tmp_path):
    source = tmp_path / "header.c"
    source.write_text(
        '#include "ep_comm.h"\nint64_t size(void) { return sizeof(ep_layout_args); }\n'
    )
    gcc = tool("gcc")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{header.PATH.parent}"]
    subprocess.run([gcc, *flags, "-c", source, "-o", tmp_path / "header.o"], check=True)


def test_header_is_read_as_a_compiler_reads_it(tmp_path):
    """Sizes, offsets and constants in C against those in Python."""
    wanted = dict(header.CONSTANTS)
    for name, struct in header.STRUCTS.items():
        wanted[f"sizeof({name})"] = ctypes.sizeof(struct)
        for field, *_ in struct._fields_:
            wanted[f"offsetof({name}, {field})"] = getattr(struct, field).offset
            wanted[f"sizeof((({name}*)0)->{field})"] = getattr(struct, field).size
    assert len(header.STRUCTS) >= 14 and len(wanted) > 300
    lines = "".join(f'  printf("%ld\\n", (long)({what}));\n' for what in wanted)
    source = tmp_path / "sizes.c"
    source.write_text(
        '#include "ep_comm.h"\n#include <stddef.h>\n#include <stdio.h>\n'
        f"int main(void) {{\n{lines}  return 0;\n}}\n"
    )
    binary = tmp_path / "sizes"
    subprocess.run(
        [
            tool("gcc"),
            f"-I{header.PATH.parent}",
            source,
            "-o",
            binary,
            "-Wl,--unresolved-symbols=ignore-all",
        ],
        check=True,
    )
    got = dict(zip(wanted, map(int, output_of(binary).split()), strict=True))
    assert got == wanted


def test_what_the_header_does_not_declare():
    with pytest.raises(AttributeError, match="ep_comm.h declares no EP_NOTHING"):
        header.EP_NOTHING  # noqa: B018


def test_whatever_is_read_from_the_header_is_declared_there():
    """What only runs on GPUs is found here too: no type checker knows these names."""
    sources = [path.read_text() for path in Path(_native.__file__).parents[1].rglob("*.py")]
    used = {name for text in sources for name in re.findall(r"\bheader\.([A-Z]\w+)", text)}
    assert len(used) > 40
    assert [name for name in sorted(used) if not hasattr(header, name)] == []


# ---- Built library -------------------------------------------------------------------------------


def test_the_library_is_built_from_the_header(library):
    # The constructor compares the digests, so a library that loaded has passed.
    assert str(library.path) in _native.status()


def test_exports_only_its_api(library):
    lines = output_of(tool("nm"), "-D", "--defined-only", library.path).splitlines()
    exported = {line.split()[-1] for line in lines}
    assert exported == set(header.FUNCTIONS)


def test_needs_neither_driver_nor_cuda_runtime(library):
    dynamic = output_of(tool("readelf"), "-d", library.path)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert needed, dynamic
    assert not [name for name in needed if "cuda" in name or "torch" in name or "python" in name]


def test_loads_without_torch_in_a_bare_interpreter(library):
    code = (
        f"import ctypes; print(ctypes.CDLL({str(library.path)!r}).ep_plan_scratch_bytes(8, 3, 2))"
    )
    assert output_of(sys.executable, "-S", "-c", code).strip() == "-1"


def test_holds_code_for_its_architectures(library, nvcc, setup_module):
    listing = output_of(tool("cuobjdump", nvcc), "--list-elf", library.path)
    assert set(re.findall(r"\.(sm_\w+)\.cubin", listing)) == {f"sm_{a}" for a in library.cuda_archs}
    if "EP_COMM_CUDA_ARCHS" not in os.environ:
        assert ",".join(library.cuda_archs) == setup_module.DEFAULT_CUDA_ARCHS


def test_refuses_bad_arguments_before_any_launch(library):
    def refusal(**fields: int) -> str:
        args = {"num_tokens": 1, "num_topk": 1, "num_experts": 4, "num_ranks": 2, **fields}
        with pytest.raises(EPArgumentError) as raised:
            library.launch("ep_layout", header.LayoutArgs(**args), 0)
        return str(raised.value)

    assert refusal(num_topk=33) == "libep_comm: num_topk = 33 is not in [1, 32]"
    assert refusal(num_tokens=-1) == "libep_comm: num_tokens = -1 is not in [0, 2147483647]"
    assert "num_ranks = 1025 is not in [1, 1024]" in refusal(num_ranks=1025)
    assert "num_experts = 5 is not in [1, 4096] and a multiple of num_ranks = 2" in refusal(
        num_experts=5
    )
    assert "input_kind = 3" in refusal(input_kind=3)
    assert "input is NULL" in refusal()
    pointers = [name for name, kind in header.LayoutArgs._fields_ if kind is ctypes.c_void_p]
    given = dict.fromkeys(pointers, 16)
    assert "is_token_in_rank is NULL" in refusal(**given | {"is_token_in_rank": 0})
    assert "workspace is not aligned to 16 bytes" in refusal(**given | {"workspace": 8})
    assert "workspace has 0 bytes, " in refusal(**given)
    with pytest.raises(EPArgumentError, match="num_experts = 7 "):
        library.layout_workspace_bytes(1, 7, 2)


def test_a_word_needs_a_partner(library):
    def refusal(**fields: int) -> str:
        peers = header.Peers(rank=1, num_ranks=2)
        args = {"partner": 0, "first": 1, "num_round_trips": 5, **fields}
        with pytest.raises(EPArgumentError) as raised:
            library.launch("ep_ping", header.PingArgs(peers=peers, **args), 0)
        return str(raised.value)

    assert refusal(partner=1) == "libep_comm: partner = 1 is no other rank of 2"
    assert refusal(partner=2) == "libep_comm: partner = 2 is no other rank of 2"
    assert "first = 0 and num_round_trips = 5 must be positive" in refusal(first=0)
    assert "num_round_trips = 0 must be positive" in refusal(num_round_trips=0)


def test_nobody_is_busy_for_less_than_no_time(library):
    with pytest.raises(EPArgumentError, match="duration_ns = -1 is negative"):
        library.launch("ep_busy", header.BusyArgs(duration_ns=-1), 0)


@pytest.mark.gpu
def test_other_work_says_when_it_ran(library):
    library.load_kernels()
    stamps = torch.zeros(3, 2, dtype=torch.int64, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    for row in stamps:
        args = header.BusyArgs(stamps_ns=row.data_ptr(), duration_ns=200_000)
        library.launch("ep_busy", args, stream)
    begins, ends = stamps.cpu().unbind(1)
    assert ((ends - begins >= 200_000) & (ends - begins < 2_000_000)).all()
    assert (begins[1:] >= ends[:-1]).all() and (begins > 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch on pointers to host memory")
def test_reports_cuda_failures(library):
    memory = (ctypes.c_int32 * 8)()
    address = ctypes.addressof(memory)
    args = header.LayoutArgs(
        num_tokens_per_rank=address,
        num_tokens_per_expert=address,
        error=address,
        num_topk=1,
        num_experts=1,
        num_ranks=1,
    )
    with pytest.raises(EPStateError, match=r"ep_layout: place_kernel: .* \(cudaError\w+\)"):
        library.launch("ep_layout", args, 0)


# ---- Loader --------------------------------------------------------------------------------------


def mailbox_args(mailbox: header.Mailbox, fault: header.Fault, **changes) -> header.MailboxArgs:
    """Of plan 3 on two ranks, with three local experts."""
    address = ctypes.addressof(mailbox)
    mailbox.ticket = 3
    mailbox.num_recv_tokens[:3] = 5, 2**30, 99
    mailbox.num_tokens_per_expert[:4] = 2**30, 0, 17, 99
    how = dict(ticket=3, num_ranks=2, num_experts=3, alignment=16, timeout_ns=0)
    return header.MailboxArgs(
        mailbox=address,
        fault=ctypes.addressof(fault),
        received=address + header.Mailbox.num_recv_tokens.offset,
        expert_rows=address + header.Mailbox.num_tokens_per_expert.offset,
        **{**how, **changes},
    )


@pytest.mark.parametrize(("alignment", "padded"), [(1, 17), (16, 32), (4096, 4096)])
def test_counts_that_have_come_are_added_up(library, alignment, padded):
    mailbox, fault = header.Mailbox(), header.Fault()
    args = mailbox_args(mailbox, fault, alignment=alignment)
    assert library.mailbox_wait(args)
    assert (args.num_received, args.num_expert_rows) == (2**30 + 5, 2**30 + padded)


@pytest.mark.parametrize(("ticket", "has_come"), [(3, True), (4, False)])
def test_a_wait_for_counts_ends_with_a_fault(library, ticket, has_come):
    """And does not look for one where the counts are there."""
    mailbox, fault = header.Mailbox(), header.Fault(code=header.EP_FAULT_TIMEOUT)
    args = mailbox_args(mailbox, fault, ticket=ticket, timeout_ns=10**12)
    assert library.mailbox_wait(args) == has_come
    assert bool(args.num_received) == has_come


def test_missing_library_is_no_surprise(monkeypatch, fresh_loader, tmp_path, recwarn):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_native, "LIBRARY_PATH", tmp_path / "libep_comm.so")
    assert _native.load() is None
    assert "was not built" in _native.status() and "reference backend" in _native.status()
    assert not recwarn.list


@pytest.mark.parametrize("what", ["older", "other"])
def test_library_of_another_header_is_refused(what, monkeypatch, library, fresh_loader, tmp_path):
    if what == "other":
        monkeypatch.setattr(header, "DIGEST", "0" * 64)
    else:  # a library without the function that says what it was built from
        source = tmp_path / "old.c"
        source.write_text("int ep_abi_version(void) { return 8; }\n")
        path = tmp_path / "libep_comm.so"
        subprocess.run([tool("gcc"), "-shared", "-fPIC", source, "-o", path], check=True)
        monkeypatch.setattr(_native, "LIBRARY_PATH", path)
    with pytest.warns(UserWarning, match="runs without its CUDA library"):
        assert _native.load() is None
    assert "was built from another ep_comm.h than this ep_comm has: rebuild it" in _native.status()


def test_broken_library_is_refused(monkeypatch, fresh_loader, tmp_path):
    broken = tmp_path / "libep_comm.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_native, "LIBRARY_PATH", broken)
    with pytest.warns(UserWarning, match="cannot be loaded"):
        assert _native.load() is None


@pytest.mark.parametrize(
    "arch, capability, runs",
    [
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100a", (10, 3), False),
        ("100f", (10, 3), True),
        ("90", (9, 0), True),
        ("86", (8, 9), True),
        ("86", (8, 0), False),
        ("86", (9, 0), False),
    ],
)
def test_code_runs_where_cuda_says(arch, capability, runs):
    assert _native._runs_on(arch, capability) == runs


def test_a_gpu_without_code_does_without_the_library(monkeypatch, library):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: [(9, 0), (8, 0)][gpu])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: ["H200", "A100"][gpu])
    monkeypatch.setattr(_native, "_has_code", _native._has_code.__wrapped__)
    monkeypatch.setattr(library, "cuda_archs", ("90a", "100a"))
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert _native.load_for(first) is library and _native.unusable_reason(0) is None
    assert _native.load_for(second) is None and _native.load_for(torch.device("cpu")) is None
    assert _native.unusable_reason(1) == (
        "GPU 1, A100, is sm_80; the CUDA library has code for sm_90a, sm_100a"
    )


# ---- setup.py ------------------------------------------------------------------------------------


def test_without_nvcc_setup_says_so_and_succeeds(setup_module, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(setup_module, "DEFAULT_CUDA_HOME", str(tmp_path))
    command = build_command(setup_module, tmp_path)
    left_over = tmp_path / "ep_comm" / "_native" / "libep_comm.so"
    left_over.parent.mkdir(parents=True)
    left_over.touch()
    command.run()
    assert not left_over.exists()
    assert "The CUDA library was NOT built; the reference backend is what is left" in caplog.text
    assert command.get_outputs() == []
    wheel = setup_module.PlatformWheel(Distribution({"ext_modules": [setup_module.LIBRARY]}))
    assert wheel.get_tag() == ("py3", "none", "any")


def test_failing_nvcc_fails_the_build(setup_module, monkeypatch, tmp_path):
    fake_nvcc(monkeypatch, tmp_path, "exit 3")
    monkeypatch.setenv("EP_COMM_CUDA_ARCHS", "90a")
    with pytest.raises(CompileError, match=r"nvcc failed with status 3.*\(now 90a\)"):
        build_command(setup_module, tmp_path).run()


def test_compiles_only_what_is_out_of_date(setup_module, monkeypatch, tmp_path):
    # Leaves a line in `calls`, and in its output what csrc/abi.cu would leave there.
    script = """
    case "$*" in *--dryrun*) exit 0 ;; esac
    echo called >> "$CUDA_HOME/calls"
    while [ $# -gt 0 ]; do
        case $1 in -DEP_CUDA_ARCHS=*) archs=${1#-D} ;; -o) printf '%s\\0' "$archs" > "$2" ;; esac
        shift
    done"""
    fake_nvcc(monkeypatch, tmp_path, script)

    def calls_after_build(archs: str) -> int:
        monkeypatch.setenv("EP_COMM_CUDA_ARCHS", archs)
        build_command(setup_module, tmp_path / "lib").run()
        return len((tmp_path / "calls").read_text().splitlines())

    assert calls_after_build("90a") == 1
    assert calls_after_build("90a") == 1
    assert calls_after_build("90a, 100a") == 2
    os.utime(tmp_path / "lib" / "ep_comm" / "_native" / "libep_comm.so", (0, 0))
    assert calls_after_build("90a,100a") == 3


def test_bad_architecture_is_named(setup_module, monkeypatch, tmp_path):
    fake_nvcc(monkeypatch, tmp_path, "exit 0")
    monkeypatch.setenv("EP_COMM_CUDA_ARCHS", "90a,hopper")
    with pytest.raises(CompileError, match="'hopper' is no architecture; expected something like"):
        build_command(setup_module, tmp_path).run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(row_bytes=24), "24 bytes"),
        (dict(row_bytes=0), "0 bytes"),
        (dict(chunk_rows=16, chunks_per_unit=3), "48 rows a unit"),
        (dict(num_blocks=0), "0 blocks"),
        (dict(push_percent=101), "101 %"),
        (dict(dtype=7), "dtype = 7"),
    ],
)
def test_a_combine_that_cannot_be_is_refused_before_its_launch(library, change, message):
    sizes = dict(row_bytes=64, chunk_rows=4, chunks_per_unit=1, num_blocks=8, push_percent=40)
    args = header.CombineArgs(**{**sizes, **change})
    with pytest.raises(EPArgumentError, match=message):
        library.launch("ep_combine", args, 0)
