"""The README's commands and its example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from free_port import free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
_FIRST_SCREEN = 45  # lines, of which the widest has _WIDTH columns
_WIDTH = 120


def example() -> str:
    """The script that the README shows."""
    (block,) = re.findall(r"^```python\n(# moe\.py.*?)^```", README, re.S | re.M)
    return block


def run_example(
    folder: Path, source: str, *, num_ranks: int = 2, **environment: str
) -> tuple[list[int], str]:
    """Run it as torchrun would: the ranks' exit codes and what they printed."""
    script = folder / "moe.py"
    script.write_text(source)
    port = free_port()
    job = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_ranks)
    ]
    try:
        output = "".join(process.communicate(timeout=120)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], output


def test_example_on_two_cpu_ranks(tmp_path):
    codes, output = run_example(tmp_path, example(), CUDA_VISIBLE_DEVICES="")
    assert codes == [0, 0], output
    assert "Buffer(rank 0 of 2, reference" in output


@pytest.mark.multi_gpu
def test_example_on_two_gpus(tmp_path):
    codes, output = run_example(tmp_path, example())
    assert codes == [0, 0], output


def test_example_asserts_something(tmp_path):
    wrong = example().replace("rows * (first + i + 1)", "rows * (first + i)")
    assert wrong != example()
    codes, output = run_example(tmp_path, wrong, num_ranks=1, CUDA_VISIBLE_DEVICES="")
    assert 0 not in codes and "Tensor-likes are not close" in output


def test_first_screen_says_what_a_newcomer_needs():
    lines = README.splitlines()[:_FIRST_SCREEN]
    first = "\n".join(lines)
    for needed in (
        "pip install", "examples/pretrain_moe.py", "--moe-token-dispatcher deepep", "`ep_comm`",
        "NCCL alltoall ÷ ep_comm", "sometimes it is slower", "docs/training.md",
    ):  # fmt: skip
        assert needed in first, needed
    # The honest sentence comes before the microseconds.
    assert first.index("sometimes it is slower") < first.index("µs")
    prose = [line for line in lines if not line.startswith("|")]
    assert max(map(len, prose)) <= _WIDTH


def test_ci_runs_the_command_of_the_readme():
    assert "bash scripts/test.sh" in README
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
