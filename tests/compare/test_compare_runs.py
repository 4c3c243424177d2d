"""``ep-comm compare`` as users start it: it trains, is interrupted, goes on."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")
pytest.importorskip("wandb")

from example_runs import SMALL, environment, losses, records, train, wandb_records  # noqa: E402

from ep_comm.compare.plan import VARIANTS  # noqa: E402
from ep_comm.pretrain.flags import parse_args  # noqa: E402
from ep_comm.pretrain.log_file import LOG_FILE  # noqa: E402

STEPS, SAVE_INTERVAL = 30, 10
FLAGS = [*SMALL, "--save-interval", str(SAVE_INTERVAL), "--eval-interval", "15"]


def command(out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "ep_comm.cli", "compare", *FLAGS, "--steps", str(STEPS)),
        *("--variants", "alltoall,ep_comm", "--out", str(out), "--wandb-project", "ep_comm-test"),
    ]


def wait_until(condition, process: subprocess.Popen, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_flags_of_the_example(variant):
    config = parse_args([*SMALL, "--use-distributed-optimizer", *VARIANTS[variant]])
    assert variant.startswith(config.moe_token_dispatcher)
    wire = (config.ep_fp8_dispatch, config.ep_fp8_grad_dispatch)
    assert wire == (variant in ("ep_comm-fp8", "ep_comm-fp8-all"),) * 2
    assert bool(config.fp8_format) == (variant in ("ep_comm-fp8-experts", "ep_comm-fp8-all"))


def test_interrupted_comparison_goes_on(tmp_path):
    out = tmp_path / "out"
    run = out / "ep_comm"
    first = subprocess.Popen(
        command(out), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until(
        lambda: (
            (run / LOG_FILE).exists()
            and (run / "checkpoints" / "latest_checkpointed_iteration.txt").exists()
            and max(losses(run), default=0) >= SAVE_INTERVAL + 2
        ),
        first,
    )
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 128 + signal.SIGINT, output
    assert "interrupted (SIGINT): the same command goes on from here" in output
    assert "Traceback" not in output
    reached = max(losses(run))
    assert reached < STEPS and not (out / "report.md").exists()
    finished = (out / "alltoall" / LOG_FILE).read_bytes()
    assert not (out / "alltoall" / "checkpoints").exists()

    again = subprocess.run(command(out), env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "alltoall: finished before\n" in again.stdout
    assert f"ep_comm: going on, it had reached step {reached}\n" in again.stdout
    assert (out / "alltoall" / LOG_FILE).read_bytes() == finished
    starts = [r["iteration"] for r in records(run, "start")]
    assert starts[0] == 0 and SAVE_INTERVAL <= starts[1] <= reached and len(starts) == 2

    # As if it had never been interrupted.
    flags = [*FLAGS, "--train-iters", STEPS, "--moe-token-dispatcher", "ep_comm"]
    assert losses(run) == train(tmp_path / "whole", *flags)
    validations = [
        {r["iteration"]: r["lm loss validation"] for r in records(folder, "valid")}
        for folder in (run, tmp_path / "whole")
    ]
    assert validations[0] == validations[1] and list(validations[0]) == [15, 30]

    document = json.loads((out / "report.json").read_text())
    ep_comm = document["variants"]["ep_comm"]
    assert ep_comm["difference"]["largest"] < 1e-4
    assert ep_comm["final_valid_loss"] == validations[0][STEPS]
    check_wandb(out, again.stdout)


def check_wandb(out: Path, output: str) -> None:
    """One run a variant, all in one group; the printed command has them, with every step."""
    (sync,) = (line for line in output.splitlines() if line.startswith("wandb sync "))
    folders = {Path(word).parents[1].name: Path(word) for word in shlex.split(sync)[2:]}
    group = json.loads((out / "plan.json").read_text())["group"]
    assert list(folders) == ["alltoall", "ep_comm"]
    for variant, folder in folders.items():
        written = wandb_records(folder)
        (run,) = written["run"]
        assert (run["run_group"], run["project"]) == (group, "ep_comm-test")
        assert run["tags"] == ["compare", variant]
        assert run["display_name"] == f"tiny-cpu-{variant}"
        assert run["config"]["update"]["moe_token_dispatcher"] == variant
        ids = {r["wandb_run_id"] for r in records(out / variant, "start")}
        assert ids == {run["run_id"]}  # also of the run that was begun before
        history = {r["step"]["num"]: r["item"]["lm loss"] for r in written["history"]}
        assert history == losses(out / variant)
        assert len(written["history"]) == STEPS
    parts = sorted((out / "ep_comm" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and folders["ep_comm"] == parts[-1]
