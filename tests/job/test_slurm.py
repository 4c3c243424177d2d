"""Runs that are stopped and go on: SIGTERM, SLURM's environment, and jobs in a real SLURM."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")
psutil = pytest.importorskip("psutil")

from example_runs import (  # noqa: E402
    EXAMPLES,
    NEW,
    ROOT,
    SMALL,
    assert_refused,
    end_of_pretrain,
    environment,
    losses,
    pretrain,
    torchrun,
    train,
    wait_for_step,
)
from ranks import run_ranks  # noqa: E402

from ep_comm.errors import EPArgumentError  # noqa: E402
from ep_comm.job.ranks import job_name, rank_variables, whole  # noqa: E402
from ep_comm.pretrain.log import LOG_FILE, read_log  # noqa: E402

SCRIPTS = ROOT / "scripts" / "slurm"
LATEST = "latest_checkpointed_iteration.txt"
STEPS = 120  # long enough to be stopped on the way
RUN = [*SMALL, "--train-iters", str(STEPS), "--eval-interval", "50"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    train(run_dir, *RUN)
    return run_dir


def assert_same_numbers(run_dir: Path, uninterrupted: Path) -> None:
    """Bit by bit: every step and validation once, and the same."""
    names = ("iteration", "lm loss", "grad-norm", "lm loss validation")
    numbers = [
        [[r.get(name) for name in names] for r in read_log(folder / LOG_FILE) if r["type"] != kind]
        for folder, kind in ((run_dir, "start"), (uninterrupted, "start"))
    ]
    assert numbers[0] == numbers[1]
    assert len(losses(run_dir)) == STEPS


def starts(run_dir: Path) -> list[int]:
    """Step after which the run was started or resumed, each time."""
    return [r["iteration"] for r in read_log(run_dir / LOG_FILE) if r["type"] == "start"]


# --------------------------------------------------------------------------- stopped under torchrun


def send_term_to_rank_1(torchrun_process: subprocess.Popen) -> None:
    children = psutil.Process(torchrun_process.pid).children()
    (rank_1,) = [child for child in children if child.environ().get("RANK") == "1"]
    rank_1.terminate()


def send_to_all(torchrun_process: subprocess.Popen, signum: int) -> None:
    """Also to processes that ranks have started."""
    parent = psutil.Process(torchrun_process.pid)
    for process in [parent, *parent.children(recursive=True)]:
        process.send_signal(signum)


def killed_in_save(rank: int, flags: list[str]) -> None:
    """Train, write half a checkpoint, then all ranks die as if by `kill -9`."""
    from ep_comm.megatron import cpu

    cpu.enable()
    from megatron.core import dist_checkpointing

    save = dist_checkpointing.save

    def half(state, folder):
        save(state, folder)
        dist.barrier()
        largest = max(os.scandir(folder), key=lambda entry: entry.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 3)
        os.kill(os.getpid(), signal.SIGKILL)

    dist_checkpointing.save = half
    pretrain(rank, flags)


def test_a_run_stopped_in_every_way_repeats_the_uninterrupted_one(tmp_path, uninterrupted):
    run_dir, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    flags = [*RUN, "--save", checkpoints, "--load", checkpoints, "--run-dir", run_dir]

    def stop_one_rank(process: subprocess.Popen) -> None:
        wait_for_step(run_dir, 3)
        send_term_to_rank_1(process)

    result = torchrun(*flags, meanwhile=stop_one_rank)
    assert result.code == 1  # torchrun's, for whatever code
    assert "exitcode  : 75" in result.output, result.output
    assert f"no checkpoint in {checkpoints} yet: from the start\n" in result.output
    first = int((checkpoints / LATEST).read_text())
    assert 3 <= first == max(losses(run_dir)) < STEPS
    assert (
        f"asked to stop: stopped after step {first} of {STEPS}; --load {checkpoints}"
        in result.output
    )

    def stop_all(process: subprocess.Popen) -> None:
        wait_for_step(run_dir, first + 13)  # a checkpoint has been written, as planned
        send_to_all(process, signal.SIGTERM)  # as SLURM does

    result = torchrun(*flags, "--save-interval", 10, meanwhile=stop_all)
    second = int((checkpoints / LATEST).read_text())
    assert first + 13 <= second == max(losses(run_dir)) < STEPS, result.output
    assert f"asked to stop: stopped after step {second} of {STEPS}" in result.output

    def press_ctrl_c(process: subprocess.Popen) -> None:
        wait_for_step(run_dir, second + 3)
        send_to_all(process, signal.SIGINT)  # as a terminal does

    result = torchrun(*flags, meanwhile=press_ctrl_c)
    third = int((checkpoints / LATEST).read_text())
    assert second + 3 <= third == max(losses(run_dir)) < STEPS, result.output
    assert f"asked to stop: stopped after step {third} of {STEPS}" in result.output

    words = [*map(str, flags), "--save-interval", str(third + 5)]
    assert run_ranks(2, killed_in_save, words, dying=(0, 1), **NEW) == [None, None]
    (half_written,) = checkpoints.glob("*.tmp")
    assert half_written.name == f"iter_{third + 5:07d}.tmp"

    train(run_dir, *flags)
    assert starts(run_dir) == [0, first, second, third, third]
    assert_same_numbers(run_dir, uninterrupted)


def test_nothing_outlives_killed_workers(tmp_path):
    checkpoints = tmp_path / "checkpoints"

    def kill_workers(process: subprocess.Popen) -> None:
        while not (checkpoints / LATEST).exists():
            assert process.poll() is None
            time.sleep(0.1)
        launcher = psutil.Process(process.pid)
        descendants = launcher.children(recursive=True)
        for worker in launcher.children():
            worker.kill()
        _, alive = psutil.wait_procs(descendants, timeout=10)
        assert not alive

    flags = ["--run-dir", tmp_path / "run", "--save", checkpoints, "--save-interval", 2]
    result = torchrun(*RUN, *flags, meanwhile=kill_workers)
    assert "SIGKILL" in result.output


def stopped(rank: int, flags: list[str]) -> tuple[object, str, str]:
    """Train; rank 1 gets SIGTERM in its second step."""
    from ep_comm.pretrain import loop

    original, steps = loop.train_step, iter(range(1, STEPS))

    def train_step(*args):
        if next(steps) == 2 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    loop.train_step = train_step
    return end_of_pretrain(rank, flags)


def test_a_stopped_run_without_save_says_that_nothing_is_saved(tmp_path):
    results = run_ranks(2, stopped, [*RUN, "--run-dir", str(tmp_path)], **NEW)
    assert [code for code, _, _ in results] == [75, 75]
    assert max(losses(tmp_path)) == 2
    said = "".join(said + output for _, said, output in results)
    assert f"stopped after step 2 of {STEPS}; nothing is saved" in said


# ------------------------------------------------------------------------------ SLURM's environment


def task(**changes: str) -> dict[str, str]:
    """Environment of the last of four srun tasks on two nodes, and `changes`."""
    return {
        "SLURM_JOB_ID": "70123",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "MASTER_ADDR": "node7",
        **changes,
    }


@pytest.mark.parametrize("value", ["", "-1", "one", "1.5", "\u0661"])
def test_variables_that_are_no_numbers(value):
    with pytest.raises(EPArgumentError, match="variable RANK must be a whole number, got "):
        whole({"RANK": value}, "RANK", 0)
    assert whole({"RANK": "07"}, "RANK") == 7 and whole({}, "RANK", 3) == 3
    with pytest.raises(EPArgumentError, match="SLURM_NODEID must be a whole number, got 'x'"):
        rank_variables(task(SLURM_NODEID="x"))


def test_the_name_of_a_job():
    step = {**task(SLURM_STEP_ID="4"), **rank_variables(task())}
    assert job_name(step) == "step 4 of SLURM's job 70123"
    assert job_name({**step, "RANK": "0"}) == "SLURM's job 70123"  # mpirun's
    assert job_name({**step, "TORCHELASTIC_RUN_ID": "x"}) == "torchrun's job 'x'"
    assert job_name({}) == "a job without a name"


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "9", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}


def test_ranks_of_srun_tasks():
    assert rank_variables(task()) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "20123",
    }
    uneven = task(SLURM_STEP_TASKS_PER_NODE="3,1", MASTER_PORT="9999", RANK="3")
    assert rank_variables(uneven)["LOCAL_WORLD_SIZE"] == "1"
    assert rank_variables(uneven)["MASTER_PORT"] == "9999"
    ports = [
        rank_variables(task(SLURM_JOB_ID=job, SLURM_STEP_ID=step))["MASTER_PORT"]
        for job in ("70123", "70124", "70125")
        for step in ("0", "1", "2", "4294967290")  # the last is salloc's own step
    ]
    assert len(set(ports)) == 12 and ports[0] == "20123"
    assert all(20_000 <= int(port) < 30_000 for port in ports)
    alone = task(SLURM_STEP_NUM_NODES="1", SLURM_STEP_TASKS_PER_NODE="4", SLURM_NODEID="0")
    for nodes, first in (("gpu[07-08,11],cpu1", "gpu07"), ("a-1", "a-1"), ("n[3,5]", "n3")):
        found = rank_variables(without_address(task(SLURM_STEP_NODELIST=nodes)))
        assert found["MASTER_ADDR"] == first
    assert rank_variables(without_address(alone))["MASTER_ADDR"] == "localhost"


def without_address(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name != "MASTER_ADDR"}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script's
        task(SLURM_STEP_TASKS_PER_NODE="1(x2)", GROUP_WORLD_SIZE="2", **TORCHRUN),
    ],
    ids=["no SLURM", "no task", "torchrun on each node"],
)
def test_nothing_to_take_from_slurm(variables):
    assert rank_variables(variables) == {}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (task(WORLD_SIZE="8"), ["WORLD_SIZE is 8", "4 tasks", "unset WORLD_SIZE", "--ntasks"]),
        (task(RANK="0"), ["RANK is 0", "srun says 3", "unset RANK"]),
        (task(LOCAL_RANK="3"), ["LOCAL_RANK is 3", "srun says 1"]),
        (task(GROUP_WORLD_SIZE="2", **TORCHRUN), ["2 torchruns on this node", "8 processes"]),
        (
            task(SLURM_STEP_TASKS_PER_NODE="1(x2)", GROUP_WORLD_SIZE="1", **TORCHRUN),
            ["torchrun on 2 nodes", "a job of 1", "--nnodes=2"],
        ),
    ],
)
def test_contradictions_are_named(variables, words):
    with pytest.raises(EPArgumentError) as error:
        rank_variables(variables)
    assert all(word in str(error.value) for word in words), error.value


def test_a_contradiction_ends_all_ranks_with_one_line(tmp_path):
    script = tmp_path / "in_a_step.py"
    in_a_step = task(SLURM_NODEID="0", SLURM_LOCALID="0", SLURM_PROCID="0")
    script.write_text(f"""if True:
        import os, sys
        sys.path.insert(0, {str(EXAMPLES)!r})
        os.environ.update({in_a_step})
        from pretrain_moe import main
        main()
    """)
    assert_refused(torchrun(*RUN, script=script), "srun started 2 torchruns on this node")


# -------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("script", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", script], check=True, cwd=ROOT)


class Cluster:
    """A SLURM that `local_cluster.sh` has started."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self._log = folder, log
        path = f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"
        self._environment = {**environment(), "PATH": path, "SLURM_CONF": f"{folder}/slurm.conf"}

    def submit(self, *command: object, **variables: object) -> str:
        """Submit a job with ``sbatch *command``; returns its id."""
        flags = ["--parsable", "--output", self._log, *command]
        variables = {name: str(value) for name, value in variables.items()}
        return self.run("sbatch", *flags, **variables)

    def run(self, *command: object, **variables: str) -> str:
        return subprocess.run(
            [*map(str, command)],
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**self._environment, **variables},
        ).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        fields = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, *states: str, timeout: float = 300) -> dict[str, str]:
        """Wait until `job` is in one of `states`, for good; returns what SLURM says of it."""
        end = time.monotonic() + timeout
        while (fields := self.job(job))["JobState"] not in states:
            assert time.monotonic() < end, f"job {job} is {fields['JobState']}: {self.log()}"
            time.sleep(0.2)
        return fields

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


@pytest.fixture(scope="module")
def started_cluster() -> Iterator[Path]:
    # Not under pytest's folder: munge's socket needs a short path.
    with tempfile.TemporaryDirectory(prefix="slurm-") as parent:
        os.chmod(parent, 0o755)
        command = [SCRIPTS / "local_cluster.sh", "start", Path(parent) / "cluster"]
        subprocess.run(command, check=True)
        yield command[2]
        subprocess.run([command[0], "stop", command[2]], check=True)
        assert not command[2].exists()


@pytest.fixture
def cluster(started_cluster, tmp_path) -> Cluster:
    return Cluster(started_cluster, tmp_path / "slurm.out")


@pytest.mark.slurm
def test_a_preempted_job_goes_on_and_repeats_the_uninterrupted_run(
    cluster, tmp_path, uninterrupted
):
    """By the site (another job takes the node), and by a signal, as before the time limit."""
    run_dir = tmp_path / "run"
    job = cluster.submit(
        *("--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"),
        *(SCRIPTS / "pretrain_moe.sbatch", *RUN),
        CONFIG=SMALL[1],
        RUN_DIR=run_dir,
        SAVE_INTERVAL=20,
    )
    wait_for_step(run_dir, 22)  # a checkpoint has been written, as planned
    cluster.run("scancel", "--signal=TERM", job)
    wait_for_step(run_dir, wait_for_start(run_dir, 2) + 3)
    urgent = cluster.submit("--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=true")
    assert cluster.wait(job, "PENDING", "COMPLETED")["JobState"] == "PENDING", cluster.log()
    cluster.wait(urgent, "COMPLETED")

    fields = cluster.wait(job, "COMPLETED", "FAILED")
    assert fields["JobState"] == "COMPLETED" and fields["Restarts"] == "2", cluster.log()
    assert "== stopped, requeued\n" in cluster.log()
    assert cluster.log().count("DUE TO PREEMPTION") == 1
    assert len(starts(run_dir)) == 3 and 22 <= starts(run_dir)[1] < starts(run_dir)[2] < STEPS
    assert_same_numbers(run_dir, uninterrupted)
    ranks = [(run_dir / "ranks" / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert "asked to stop: stopped after step" in ranks[0] and "resumed at step" in ranks[0]
    assert "resumed at step" not in ranks[1]


def wait_for_start(run_dir: Path, number: int, *, timeout: float = 300) -> int:
    """Wait for the run's `number`-th start; returns the step after which it was."""
    end = time.monotonic() + timeout
    while len(starts(run_dir)) < number:
        assert time.monotonic() < end, f"no start {number} within {timeout} s"
        time.sleep(0.1)
    return starts(run_dir)[number - 1]


@pytest.mark.slurm
def test_only_stopped_jobs_are_requeued(cluster, tmp_path):
    """With a step that takes a second to stop, in place of training."""
    marker = tmp_path / "started"
    step = f"trap 'sleep 1; exit ${{CODE}}' TERM; touch {marker}; sleep 60 & wait"
    script = tmp_path / "job.sbatch"
    script.write_text(f"""#!/bin/bash
        #SBATCH --requeue
        source {SCRIPTS}/requeue.sh
        run_requeuable 75 srun bash -c "$STEP"
    """)

    def outcome(*stop: str, code: int) -> tuple[str, str]:
        marker.unlink(missing_ok=True)
        job = cluster.submit(script, STEP=step, CODE=code)
        while not marker.exists():
            time.sleep(0.1)
        cluster.run(*stop, job)
        fields = cluster.wait(job, "PENDING", "FAILED", "CANCELLED")
        if fields["JobState"] != "PENDING":
            time.sleep(2)  # if it came back, it would do so by now
            fields = cluster.job(job)
        cluster.run("scancel", job)
        return fields["JobState"], fields["Restarts"]

    assert outcome("scancel", "--signal=TERM", code=75) == ("PENDING", "1")
    assert outcome("scancel", "--signal=TERM", "--batch", code=75) == ("PENDING", "1")
    assert outcome("scontrol", "requeue", code=75) == ("PENDING", "1")
    assert outcome("scancel", "--signal=TERM", code=1) == ("FAILED", "0")
    assert outcome("scancel", code=75) == ("CANCELLED", "0")
