"""How setup.py builds for an nvcc that does not know every architecture."""

from __future__ import annotations

import pytest
from build_tools import build_command, fake_nvcc
from setuptools.errors import CompileError

# Knows sm_90a alone, as an nvcc of CUDA 12.4 would. Leaves its arguments in `calls`, and in its
# output what csrc/abi.cu would leave there.
OLD_NVCC = """
    case "$*" in *compute_100a*)
        echo "nvcc fatal   : Unsupported gpu architecture 'compute_100a'" >&2
        exit 1 ;;
    esac
    case "$*" in *--dryrun*) exit 0 ;; esac
    echo "$@" >> "$CUDA_HOME/calls"
    while [ $# -gt 0 ]; do
        case $1 in -DEP_CUDA_ARCHS=*) archs=${1#-D} ;; -o) printf '%s\\0' "$archs" > "$2" ;; esac
        shift
    done"""


def test_an_architecture_that_nvcc_lacks_is_left_out(setup_module, monkeypatch, tmp_path, caplog):
    fake_nvcc(monkeypatch, tmp_path, OLD_NVCC)
    monkeypatch.delenv("EP_COMM_CUDA_ARCHS", raising=False)
    build_command(setup_module, tmp_path / "lib").run()
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "arch=compute_90a,code=sm_90a -DEP_CUDA_ARCHS=90a " in call
    assert "nvcc does not know sm_100a: the CUDA library is built without it" in caplog.text
    assert "sm_90a:" not in caplog.text
    build_command(setup_module, tmp_path / "lib").run()  # is up to date
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_no_architecture_that_nvcc_knows_fails_the_build(setup_module, monkeypatch, tmp_path):
    fake_nvcc(monkeypatch, tmp_path, OLD_NVCC)
    monkeypatch.setenv("EP_COMM_CUDA_ARCHS", "100a")
    with pytest.raises(CompileError, match="nvcc knows none of the architectures 100a: install"):
        build_command(setup_module, tmp_path / "lib").run()
    assert not (tmp_path / "calls").exists()


def test_the_real_nvcc_is_asked_and_answers(setup_module, nvcc):
    assert setup_module.knows(str(nvcc), "90a")
    assert not setup_module.knows(str(nvcc), "20")
