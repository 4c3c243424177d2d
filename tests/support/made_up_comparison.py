"""A comparison that never was: its configuration, its curves and logs, its command, its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ep_comm.cli.app import app
from ep_comm.compare.directory import Directory, locked
from ep_comm.compare.plan import make_plan
from ep_comm.compare.report import make_document, make_page
from ep_comm.compare.statistics import Run, Tolerances, smooth, window_of
from ep_comm.pretrain.log_file import LOG_FILE
from ep_comm.report.document import Page

OFFSETS = {
    "alltoall": 0.0,
    "alltoall-seed2": 0.004,
    "alltoall-seed3": -0.003,
    "ep_comm": 0.001,
    "ep_comm-fp8": 0.2,  # outside of all tolerances
    "ep_comm-fp8-experts": 0.01,
    "ep_comm-fp8-experts-seed2": 0.012,
    "ep_comm-fp8-all": 0.011,
    "ep_comm-fp8-all-seed2": 0.01,
}
START = {"type": "start", "iteration": 0, "versions": {"torch": "2.11.0", "device": "NVIDIA H200"}}


def comparison_page(folder: Path, steps: int = 400, *, equal: bool = False) -> Page:
    """Return it; `equal`: all curves are the same."""
    runs = {}
    for seed, (name, offset) in enumerate(OFFSETS.items()):
        chance = np.random.default_rng(0 if equal else seed)
        curve = 3 + 3 / np.sqrt(np.arange(1, steps + 1)) + 0.002 * chance.standard_normal(steps)
        curve += 0 if equal else offset
        valid = {step: float(curve[step - 1]) + 0.1 for step in range(100, steps + 1, 100)}
        smoothed = smooth(curve, window_of(steps))
        runs[name] = Run(train=curve, smoothed=smoothed, valid=valid, tokens_per_s=123456.0)
    plan: Any = SimpleNamespace(
        config=Path("configs/gcide-100m.yaml"),
        steps=steps,
        processes=4,
        data_seed=None,
        settings={"wandb_project": None},
        skipped={"ep_comm-fp8-all-seed3": "no <GPU> computes block-wise FP8"},
        seed=lambda name: 1233 + int(name.partition("-seed")[2] or 1),
    )
    directory: Any = SimpleNamespace(group="compare", log=lambda name: [START])
    return make_page(make_document(plan, directory, runs, Tolerances()), runs, folder)


STEPS = 100
VARIANTS = "alltoall,alltoall-seed2,ep_comm,ep_comm-fp8"

# A training script as far as a plan needs one: it says what its flags amount to.
SCRIPT = """if True:
    import json, sys
    settings = {
        "train_iters": 50, "eval_iters": 1, "save_interval": None, "seed": 7, "data_seed": None,
        "hidden_size": 512, "expert_model_parallel_size": 2, "lr": 0.1, "wandb_project": None,
        "wandb_save_dir": None, "data_path": [], "bf16": False, "use_distributed_optimizer": False,
        "run_dir": "depends on the variant", "fp8_format": None,
    }
    with open(sys.argv[sys.argv.index("--config") + 1]) as file:
        settings.update(json.load(file))
    flags = sys.argv[1:]
    for flag, value in zip(flags, flags[1:]):
        key = flag.removeprefix("--").replace("-", "_")
        if key in settings:
            value = int(value) if value.isdigit() else value
            settings[key] = [value] if key == "data_path" else value
    if settings["lr"] == "fast":
        print("noise\\nerror: lr must be a number, got 'fast'", file=sys.stderr)
        sys.exit(2)
    if "--print-config" in flags:
        print(json.dumps(settings))
    else:
        print("step 1\\nerror: the sky fell")
        sys.exit(2)
"""


def make_config(folder: Path) -> Path:
    """A configuration in a folder of its own, beside the made-up training script."""
    path = folder / "configs" / "small.yaml"
    path.parent.mkdir()
    path.with_name("train.py").write_text(SCRIPT)
    path.write_text("{}")
    return path


def plan_of(config: Path, *extra: str, **changed: object):
    asked = {"steps": STEPS, "processes": None, "variants": VARIANTS, "wandb_project": None}
    asked |= {"script": config.with_name("train.py"), **changed}
    return make_plan(config=config, extra=extra, **asked)


def losses(offset: float = 0.0, *, at_the_end: float = 0.0) -> np.ndarray:
    """A curve that falls from 6 to 3, `offset` above itself, and `at_the_end` more in the end."""
    steps = np.arange(1, STEPS + 1)
    return 3 + 3 / steps + offset + at_the_end * steps / STEPS


def write_log(run_dir: Path, train: np.ndarray, valid: float | None = None) -> None:
    records = [{"type": "start", "iteration": 0, "versions": {"torch": "1"}}]
    for step, loss in enumerate(train, start=1):
        rate = 10.0 if step < 3 else 1000.0 + step
        records.append(
            {"type": "train", "iteration": step, "lm loss": loss, "tokens-per-second": rate}
        )
    if valid is None:
        valid = train[-1] + 0.5
    records.append({"type": "valid", "iteration": len(train), "lm loss validation": valid})
    run_dir.mkdir(parents=True)
    (run_dir / LOG_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))


def run_of(train: np.ndarray, valid: float | None = None) -> Run:
    return Run(
        train=train,
        smoothed=smooth(train, window_of(len(train))),
        valid={} if valid is None else {len(train): valid},
        tokens_per_s=1.0,
    )


def have_fp8(monkeypatch: pytest.MonkeyPatch, support: tuple[bool, str]) -> None:
    """A GPU, and a Transformer Engine that says what it can compute there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = SimpleNamespace(check_fp8_block_scaling_support=lambda: support)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.fp8", engine)


def compare(config: Path, *flags: object):
    command = ["compare", "--config", config, "--steps", STEPS, "--out", config.parent / "out"]
    command += ["--script", config.with_name("train.py")]
    return CliRunner().invoke(app, [str(word) for word in (*command, *flags)])


def begun(config: Path, curves: dict[str, np.ndarray], *, plan=None):
    """A comparison whose runs have all been trained."""
    out = config.parent / "out"
    with locked(out):
        directory = Directory(out, plan or plan_of(config))
    for name, curve in curves.items():
        write_log(directory.run_dir(name), curve)
    return out


SEED2 = losses(0.04)
CURVES = {
    "alltoall": losses(),
    "alltoall-seed2": SEED2,
    "ep_comm": losses(at_the_end=0.001),
    "ep_comm-fp8": losses(at_the_end=0.002),
}
