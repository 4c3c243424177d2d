"""examples/pretrain_moe.py, as users start it: torchrun, two processes, no GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
sys.path.insert(0, str(ROOT / "examples"))

from moe_config import PretrainConfig, parse_args  # noqa: E402
from moe_launch import UserError  # noqa: E402
from moe_log import LOG_FILE, read_log  # noqa: E402

TINY = ["--config", str(CONFIGS / "tiny-cpu.yaml")]
LATEST = "latest_checkpointed_iteration.txt"
# Smaller still, for tests that do not look at tiny-cpu's own losses. The decay is fixed, so that
# runs of different length share their first steps.
SMALL = [*TINY, "--num-layers", "1", "--seq-length", "64", "--micro-batch-size", "2"]
SMALL += ["--global-batch-size", "8", "--lr-decay-iters", "20", "--eval-iters", "1"]


def environment() -> dict[str, str]:
    """No GPU, and no W&B settings of whoever runs the tests."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("WANDB")},
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def torchrun(*flags: object, processes: int = 2, timeout: float = 120) -> SimpleNamespace:
    """Run the example; returns its exit code, output and duration."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(ROOT / "examples" / "pretrain_moe.py")]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,  # so that a hanging run can be ended with all its processes
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return SimpleNamespace(code=process.returncode, output=output, seconds=time.monotonic() - start)


def train(run_dir: Path, *flags: object) -> dict[int, float]:
    """Run the example to its end; returns the loss of each step."""
    result = torchrun(*flags, "--run-dir", run_dir)
    assert result.code == 0, result.output
    return losses(run_dir)


def losses(run_dir: Path) -> dict[int, float]:
    return {r["iteration"]: r["lm loss"] for r in records(run_dir, "train")}


def records(run_dir: Path, kind: str) -> list[dict]:
    return [r for r in read_log(run_dir / LOG_FILE) if r["type"] == kind]


def largest_difference(a: dict[int, float], b: dict[int, float], *, steps: int) -> float:
    return max(abs(a[i] - b[i]) for i in range(1, steps + 1))


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory):
    """Run directory of tiny-cpu with given flags; equal runs are made once."""
    made: dict[tuple, Path] = {}

    def run(dispatcher: str, *flags: str) -> Path:
        key = (dispatcher, *flags)
        if key not in made:
            run_dir = tmp_path_factory.mktemp("tiny-cpu") / dispatcher
            flags += ("--wandb-project", "ep_comm-test") if dispatcher == "alltoall" else ()
            train(run_dir, *TINY, "--moe-token-dispatcher", dispatcher, *flags)
            made[key] = run_dir
        return made[key]

    return run


# --------------------------------------------------------------------------------- what it learns


@pytest.mark.parametrize("dispatcher", ["alltoall", "deepep"])
def test_tiny_cpu_learns(tiny_runs, dispatcher):
    loss = losses(tiny_runs(dispatcher))
    assert len(loss) == 60
    assert loss[1] > 5 and loss[60] < 3.3


def test_deepep_matches_alltoall(tiny_runs):
    ours, theirs = losses(tiny_runs("deepep")), losses(tiny_runs("alltoall"))
    assert largest_difference(ours, theirs, steps=10) <= 1e-6
    assert largest_difference(ours, theirs, steps=60) <= 1e-4


def test_fp8_dispatch_ends_within_one_percent(tiny_runs):
    fp8, alltoall = (
        records(tiny_runs(*args), "valid")[-1]["lm loss validation"]
        for args in (("deepep", "--ep-fp8-dispatch"), ("alltoall",))
    )
    assert fp8 == pytest.approx(alltoall, rel=0.01)


def test_allgather_matches_alltoall(tiny_runs, tmp_path):
    flags = ["--moe-token-dispatcher", "allgather", "--train-iters", "5", "--lr-decay-iters", "60"]
    loss = train(tmp_path, *TINY, *flags, "--eval-iters", "0")
    assert largest_difference(loss, losses(tiny_runs("alltoall")), steps=5) <= 1e-6


def test_gradient_accumulation_gives_the_same_step(tiny_runs, tmp_path):
    flags = ["--moe-token-dispatcher", "deepep", "--train-iters", "3", "--lr-decay-iters", "60"]
    train(tmp_path, *TINY, *flags, "--eval-iters", "0", "--micro-batch-size", "2")
    for many, one in zip(
        records(tmp_path, "train"), records(tiny_runs("deepep"), "train")[:3], strict=True
    ):
        # Not exactly: the balancing loss is a product of means over a microbatch.
        assert many["lm loss"] == pytest.approx(one["lm loss"], rel=1e-3)
        assert many["grad-norm"] == pytest.approx(one["grad-norm"], rel=1e-2)


# ------------------------------------------------------------------ repeating and resuming exactly


def test_deepep_repeats_itself(tiny_runs, tmp_path):
    flags = ["--moe-token-dispatcher", "deepep", "--train-iters", "5", "--lr-decay-iters", "60"]
    loss = train(tmp_path, *TINY, *flags, "--eval-iters", "0")
    assert largest_difference(loss, losses(tiny_runs("deepep")), steps=5) == 0


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory: pytest.TempPathFactory):
    """Flags, run directory and checkpoints, of steps 3 and 6, of a run of six steps."""
    made: dict[tuple, SimpleNamespace] = {}

    def run(*flags: str) -> SimpleNamespace:
        if flags not in made:
            folder = tmp_path_factory.mktemp("checkpointed")
            run = SimpleNamespace(run_dir=folder / "run", checkpoints=folder / "checkpoints")
            run.flags = [*SMALL, "--train-iters", "6", "--moe-token-dispatcher", *flags]
            save = ["--save", run.checkpoints, "--save-interval", "3"]
            train(run.run_dir, *run.flags, *save)
            made[flags] = run
        return made[flags]

    return run


DISTRIBUTED = ("alltoall", "--use-distributed-optimizer", "--overlap-grad-reduce")


@pytest.mark.parametrize(
    "flags", [DISTRIBUTED, ("deepep", "--bf16", "--ep-overlap-wgrad")], ids=" ".join
)
def test_resumed_run_repeats_the_uninterrupted_one(checkpointed, tmp_path, flags):
    whole = checkpointed(*flags)
    # As if the run had been killed while it wrote the last checkpoint.
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(whole.checkpoints, checkpoints)
    (checkpoints / "iter_0000006").rename(checkpoints / "iter_0000006.tmp")
    (checkpoints / LATEST).write_text("3\n")

    save_and_load = ["--save", checkpoints, "--load", checkpoints]
    resumed = train(tmp_path / "run", *whole.flags, *save_and_load)
    assert resumed == {i: losses(whole.run_dir)[i] for i in (4, 5, 6)}
    validations = [records(folder, "valid")[-1] for folder in (tmp_path / "run", whole.run_dir)]
    assert validations[0] == validations[1]
    assert (checkpoints / LATEST).read_text() == "6\n"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["iter_0000003", "iter_0000006", LATEST]


# ---------------------------------------------------------------------------------------- its logs


def test_log_has_everything(tiny_runs):
    start = records(tiny_runs("deepep"), "start")[0]
    assert start["dispatcher"] == "deepep" and start["processes"] == 2
    assert {"ep_comm", "torch", "megatron-core"} <= start["versions"].keys()
    PretrainConfig(**start["config"])  # can be read back
    steps = records(tiny_runs("deepep"), "train")
    assert [r["iteration"] for r in steps] == list(range(1, 61))
    for record in steps:
        assert record.keys() >= {
            *("lm loss", "grad-norm", "learning-rate", "iteration-time", "throughput"),
            *("ep/dispatch-ms", "ep/combine-ms", "ep/expert-ms"),
            *("ep/imbalance-rank", "ep/imbalance-expert", "ep/wire-mib"),
        }
        assert record["ep/wire-mib"] > 0
        assert record["ep/imbalance-rank"] >= 1 and record["ep/imbalance-expert"] >= 1
    assert [r["iteration"] for r in records(tiny_runs("deepep"), "valid")] == [30, 60]


def test_log_of_a_restarted_run(tmp_path):
    path = tmp_path / LOG_FILE
    lines = [{"type": "start", "iteration": 0}]
    lines += [{"type": "train", "iteration": i, "run": 1} for i in (1, 2, 3)]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"type": "tra')  # killed
    with path.open("a") as file:
        file.write('\n{"type": "start", "iteration": 2}\n')
        file.write('{"type": "train", "iteration": 3, "run": 2}\n')
    kept = [(r["iteration"], r["run"]) for r in read_log(path) if r["type"] == "train"]
    assert kept == [(1, 1), (2, 1), (3, 2)]


def test_wandb_without_a_key_writes_an_offline_run(tiny_runs):
    pytest.importorskip("wandb")
    (path,) = tiny_runs("alltoall").glob("wandb/offline-run-*/run-*.wandb")
    history: dict[str, list[float]] = {}
    for record in wandb_records(path):
        for item in record.history.item:
            name = item.key or ".".join(item.nested_key)
            history.setdefault(name, []).append(json.loads(item.value_json))
    assert history["lm loss"] == list(losses(tiny_runs("alltoall")).values())
    assert len(history["lm loss validation"]) == 2
    assert {"grad-norm", "learning-rate", "iteration-time", "throughput"} <= history.keys()


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a W&B file: a 7-byte header, then protobufs framed as in a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, block, parts = path.read_bytes(), 7, 1 << 15, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # too little for a chunk's header: padding
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the only chunk, or the last one, of a record
            yield Record.FromString(parts)
            parts = b""


# ------------------------------------------------------------------------------------- bad requests


def assert_refused(result: SimpleNamespace, *words: str) -> None:
    """One line that says what is wrong, a nonzero exit code, soon, and no stack trace of ours."""
    assert result.code != 0
    errors = re.findall(r"^error: .*$", result.output, flags=re.MULTILINE)
    assert len(errors) == 1, result.output
    for word in words:
        assert word in errors[0]
    assert str(ROOT) + "/examples/moe_" not in result.output  # no frame of a stack trace
    assert re.search(r"exitcode\s*: 2\b", result.output), result.output
    assert result.seconds < 60


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--moe-token-dispatcher", "deepeep"], ["deepeep", "deepep", "alltoall", "allgather"]),
        (["--num-experts", "9"], ["num_experts 9", "expert_model_parallel_size 2"]),
        (["--num-exprts", "8"], ["--num-exprts", "--num-experts"]),
        (["--lr", "fast"], ["lr", "number", "fast"]),
        (["--moe-router-topk", "9"], ["moe_router_topk 9", "num_experts 8"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_bad_flags(flags, words):
    with pytest.raises(UserError) as error:
        parse_args([*TINY, *flags])
    assert all(word in str(error.value) for word in words), error.value


def test_unknown_config_key(tmp_path):
    config = tmp_path / "typo.yaml"
    config.write_text((CONFIGS / "tiny-cpu.yaml").read_text() + "moe_router_top_k: 2\n")
    result = torchrun("--config", config, "--run-dir", tmp_path / "run")
    assert_refused(result, "moe_router_top_k", str(config), "moe_router_topk")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--expert-model-parallel-size", "4"], ["2 processes", "expert_model_parallel_size 4"]),
        (["--global-batch-size", "6"], ["global_batch_size 6", "2 processes"]),
    ],
    ids=["experts", "batch"],
)
def test_world_size_that_does_not_fit(flags, words):
    config = parse_args([*TINY, "--micro-batch-size", "2", *flags])
    with pytest.raises(UserError) as error:
        config.num_microbatches(world_size=2)
    assert all(word in str(error.value) for word in words), error.value


def test_all_ranks_stop_when_only_rank_0_can_see_why(tmp_path):
    flags = ["--data-path", tmp_path / "missing.txt", "--run-dir", tmp_path / "run"]
    assert_refused(torchrun(*TINY, *flags), "missing.txt", "no such file")
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_model(checkpointed):
    run = checkpointed(*DISTRIBUTED)
    folder = run.checkpoints.parent
    before = contents(folder)
    flags = [*run.flags, "--run-dir", run.run_dir, "--load", run.checkpoints]
    assert_refused(
        torchrun(*flags, "--num-experts", "4"), "another run", "num_experts is 8 there and 4 here"
    )
    assert contents(folder) == before


def test_bad_data_and_folders(checkpointed, tmp_path):
    """Refused before anything is built or written; one process sees all of these in turn."""
    checkpoints = checkpointed(*DISTRIBUTED).checkpoints
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "one.txt").write_text("a line\n" * 100)
    (tmp_path / "broken.bin").write_text("x")
    (tmp_path / "broken.idx").write_text("this is no index file")
    (tmp_path / "half.bin").write_text("x")
    cases = {
        "--data-path empty.txt": ["empty.txt", "is empty"],
        "--data-path nothing-*.txt": ["nothing-*.txt", "no such file"],
        "--data-path short.txt": ["of 6 tokens", "seq_length + 1 = 65", "--seq-length"],
        "--data-path one.txt": ["0 of 701 tokens are for validation", "--eval-iters 0"],
        "--data-path broken": ["broken", "--vocab-size"],
        "--data-path broken --vocab-size 9": ["broken.idx", "no Megatron index"],
        "--data-path half": ["half.idx", "missing"],
        "--load nowhere": ["nowhere", "no checkpoint"],
        f"--save {checkpoints}": ["already holds checkpoints", "iteration 6", "--load"],
    }
    before = contents(tmp_path), contents(checkpoints)
    code = """if True:
        import sys
        import torch.distributed as dist
        from ep_comm.megatron import cpu
        cpu.enable()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        from moe_config import parse_args
        from moe_launch import UserError
        from moe_train import pretrain
        for line in sys.stdin:
            try:
                pretrain(parse_args(line.split()))
            except UserError as error:
                print("error:", error, flush=True)
    """
    common = [*SMALL, "--expert-model-parallel-size", "1"]
    common += ["--data-cache-path", str(tmp_path.parent / "cache")]
    result = subprocess.run(
        [sys.executable, "-c", code],
        input="".join(f"{' '.join(common)} {case}\n" for case in cases),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"},
    )
    errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(cases), result.stdout + result.stderr
    for error, (case, words) in zip(errors, cases.items(), strict=True):
        assert all(word in error for word in words), (case, error)
    assert (contents(tmp_path), contents(checkpoints)) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
