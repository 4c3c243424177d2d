"""A script of Megatron's own, unchanged, through the launcher.

`megatron_standin` has the script. With megatron-core 0.16, whose wheel has no
``megatron.training``, it stands in a folder with one of our own and that wheel's
``megatron.core``, as in a clone.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from example_runs import environment

STANDIN = Path(__file__).parents[1] / "megatron_standin"
STEPS = 3
FLAGS = f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --seq-length 16
    --max-position-embeddings 16 --position-embedding-type rope --vocab-size 63
    --micro-batch-size 2 --global-batch-size 4 --train-iters {STEPS} --lr 1e-2 --save-interval 100
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-router-dtype fp32
    --expert-model-parallel-size 2 --mtp-num-layers 1 --transformer-impl local
    --use-cpu-initialization --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion --no-rope-fusion --disable-bias-linear --swiglu --hidden-dropout 0
    --attention-dropout 0 --distributed-backend gloo --tokenizer-type NullTokenizer
""".split()


def need_megatron() -> None:
    """Skip the test module where there is none; not imported, as processes of ours start without.

    (`megatron` alone would be the tests' folder.)
    """
    if importlib.util.find_spec("megatron.core") is None:
        pytest.skip("needs megatron-core", allow_module_level=True)


def make_script(folder: Path) -> Path:
    """The stand-in, put into a folder from which a whole megatron can be imported."""
    core = Path(importlib.util.find_spec("megatron.core").origin).parent
    if not (core.parent / "training").is_dir():
        (folder / "megatron").mkdir()
        (folder / "megatron" / "core").symlink_to(core)
        (folder / "megatron" / "training").symlink_to(STANDIN / "training")
    (folder / "pretrain_standin.py").write_bytes((STANDIN / "pretrain_standin.py").read_bytes())
    return folder / "pretrain_standin.py"


def run(script: Path, *flags: object) -> SimpleNamespace:
    """The script through the launcher, on two processes without a GPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "ep_comm.megatron.launch", str(script), *FLAGS, *map(str, flags)]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment(), "WANDB_MODE": "offline"},
        start_new_session=True,  # so that a hanging run can be ended with all its processes
    )
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return SimpleNamespace(code=process.returncode, output=output, seconds=time.monotonic() - start)
