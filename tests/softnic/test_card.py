"""The network card in software, in host memory: it must be right before it may judge others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from softnic import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
MESSAGES = 200


class Result(NamedTuple):
    wrong_bytes: int
    missing: int
    puts: int
    out_of_order: int


@pytest.fixture(scope="module", params=[build.PROXY, build.IBGDA], ids=lambda t: t.name)
def loopback(request, tmp_path_factory) -> Path:
    if request.param is build.IBGDA and build.find_headers() is None:
        pytest.skip(f"needs the headers of NVSHMEM: pip install {build.WHEELS[0]}")
    return build.build_loopback(tmp_path_factory.mktemp("card"), request.param)


def send(program: Path, limit_s: float = 30, **variables: object) -> Result:
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = [program, str(MESSAGES), str(limit_s)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers = re.findall(r"\d+", done.stdout)
    return Result(*map(int, numbers))


def test_every_byte_is_there_when_its_signal_is(loopback):
    result = send(loopback)
    assert result.wrong_bytes == result.missing == result.out_of_order == 0
    assert result.puts >= 2 * MESSAGES


def test_delayed_and_in_another_order(loopback):
    result = send(loopback, SOFTNIC_REORDER=1, SOFTNIC_DELAY_US=100)
    assert result.wrong_bytes == result.missing == 0 < result.out_of_order


def test_early_signals_are_seen(loopback):
    """The control: a card that is wrong is found out."""
    result = send(loopback, SOFTNIC_EARLY_SIGNALS=1, SOFTNIC_DELAY_US=300)
    assert result.wrong_bytes > 0 and result.out_of_order > 0


def test_nothing_comes_over_a_dead_link(loopback, tmp_path):
    cut = tmp_path / "cut"
    assert send(loopback, SOFTNIC_CUT_FILE=cut).missing == 0
    cut.touch()
    result = send(loopback, limit_s=1, SOFTNIC_CUT_FILE=cut)
    assert result.missing == 2 * MESSAGES and result.puts == 0


def test_a_short_queue_pair_goes_around(loopback):
    result = send(loopback, NVSHMEM_QP_DEPTH=128, NVSHMEM_IBGDA_NUM_RC_PER_PE=1)
    assert result.wrong_bytes == result.missing == 0


def test_both_transports_take_their_places(tmp_path):
    """They have the names by which NVSHMEM looks for its own, and its entry."""
    if build.find_headers() is None:
        pytest.skip(f"needs the headers of NVSHMEM: pip install {build.WHEELS[0]}")
    libraries = build.build(tmp_path)
    assert set(libraries) == {"proxy", "ibgda"}
    for transport in (build.PROXY, build.IBGDA):
        dynamic = subprocess.run(
            ["readelf", "-d", "--dyn-syms", "-W", libraries[transport.name]],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"[{transport.stands_for}]" in dynamic
        exported = re.findall(r"GLOBAL DEFAULT\s+\d+ (\w+)$", dynamic, re.M)
        assert set(exported) >= {"nvshmemt_init", "softnic_count"}


def test_another_version_is_skipped_loudly(monkeypatch):
    monkeypatch.setattr(build, "find_headers", lambda: Path())
    monkeypatch.setattr(build, "_version", lambda wheel: "3.5.19" if "13" in wheel else None)
    assert build.missing() == (
        "THE SOFTWARE NETWORK CARD IS FOR NVSHMEM 3.4.5, installed: ['3.5.19']"
    )
    monkeypatch.setattr(build, "_version", lambda wheel: "3.4.5" if "13" in wheel else None)
    assert build.missing() is None
