"""scripts/two_nodes.sh, as its users start it: one command on each of two hosts, here over gloo."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from free_port import free_port
from softnic import hosts

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "two_nodes.sh"


def test_it_says_how_it_is_started():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "error: bash scripts/two_nodes.sh FIRST_HOST NUMBER" in done.stderr


@pytest.mark.e2e
@pytest.mark.skipif(hosts.missing() is not None, reason=str(hosts.missing()))
def test_both_commands_pass(tmp_path):
    port = free_port()
    environment = {
        **os.environ,
        **dict(BACKEND="reference", PROCESSES="1", CASES="3", PORT=str(port)),
        **dict(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        "OUT": str(tmp_path),
    }
    started = [
        subprocess.Popen(
            ["unshare", "--uts", "bash", "-c", f"hostname node{i}; bash {SCRIPT} 127.0.0.1 {i}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    for i, process in enumerate(started):
        assert process.returncode == 0, outputs[i]
        assert f"== host {i}: all of it passed" in outputs[i]
    assert "node0:0 → node1:0" in outputs[0] and "case 2: right, reference over gloo" in outputs[0]
    assert {path.name for path in tmp_path.iterdir()} >= {"doctor-0.txt", "bench-1.txt"}
