"""examples/pretrain_moe.py: resuming exactly, elsewhere, and what cannot be resumed."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")

from example_runs import (  # noqa: E402
    NEW,
    SMALL,
    contents,
    losses,
    pretrain,
    records,
    train,
)
from ranks import RankFailure, run_ranks  # noqa: E402

from ep_comm.job.files import lock  # noqa: E402

LATEST = "latest_checkpointed_iteration.txt"


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
GATHERING = (*DISTRIBUTED, "--overlap-param-gather", "--manual-gc", "--manual-gc-interval", "2")


def killed_while_it_saved(checkpoints: Path, folder: Path) -> Path:
    """A copy of the checkpoints of steps 3 and 6 in which the later one is incomplete."""
    copy = folder / "checkpoints"
    shutil.copytree(checkpoints, copy)
    (copy / "iter_0000006").rename(copy / "iter_0000006.tmp")
    (copy / LATEST).write_text("3\n")
    return copy


@pytest.mark.parametrize(
    "flags",
    [DISTRIBUTED, GATHERING, ("ep_comm", "--bf16", "--ep-overlap-wgrad")],
    ids=["distributed", "gathering", "wgrad"],
)
def test_resumed_run_repeats_the_uninterrupted_one(checkpointed, tmp_path, flags):
    whole = checkpointed(*flags)
    checkpoints = killed_while_it_saved(whole.checkpoints, tmp_path)
    save_and_load = ["--save", checkpoints, "--load", checkpoints]
    resumed = train(tmp_path / "run", *whole.flags, *save_and_load)
    assert resumed == {i: losses(whole.run_dir)[i] for i in (4, 5, 6)}
    validations = [records(folder, "valid")[-1] for folder in (tmp_path / "run", whole.run_dir)]
    assert validations[0] == validations[1]
    assert (checkpoints / LATEST).read_text() == "6\n"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == [".lock", "iter_0000003", "iter_0000006", LATEST]


def test_gathering_during_the_forward_pass_changes_nothing(checkpointed):
    """Neither to the losses nor to the parameters in a checkpoint, written before a next one."""
    gathering, plain = (checkpointed(*flags) for flags in (GATHERING, DISTRIBUTED))
    assert losses(gathering.run_dir) == losses(plain.run_dir)
    assert records(gathering.run_dir, "valid") == records(plain.run_dir, "valid")
    folders = [run.checkpoints / "iter_0000003" for run in (gathering, plain)]
    assert run_ranks(1, names_that_differ, *folders, **NEW) == [[]]


def names_that_differ(rank: int, first: Path, second: Path) -> list[str]:
    """Of tensors in two checkpoints."""
    from ep_comm.megatron import cpu

    cpu.enable()
    from megatron.core.dist_checkpointing import load_plain_tensors

    ours, theirs = load_plain_tensors(str(first)), load_plain_tensors(str(second))
    tensors = [name for name, value in ours.items() if hasattr(value, "dtype")]
    assert "output_layer.weight" in tensors
    return [name for name in tensors if not ours[name].equal(theirs[name])]


@pytest.mark.parametrize(
    ("flags", "other", "tolerance"),
    [
        (DISTRIBUTED, ("ep_comm", "--ep-overlap-wgrad"), 1e-5),
        (("ep_comm", "--bf16", "--ep-overlap-wgrad"), ("alltoall", "--no-ep-overlap-wgrad"), 5e-3),
    ],
    ids=["alltoall to ep_comm", "ep_comm to alltoall"],
)
def test_resumed_with_another_dispatcher(checkpointed, tmp_path, flags, other, tolerance):
    whole = checkpointed(*flags)
    checkpoints = killed_while_it_saved(whole.checkpoints, tmp_path)
    other_flags = ["--load", checkpoints, "--moe-token-dispatcher", *other]
    assert_goes_on(train(tmp_path / "run", *whole.flags, *other_flags), whole, [4, 5, 6], tolerance)


def test_resumed_with_other_expert_parallel_sizes(checkpointed, tmp_path):
    """EP 2 on two processes, then EP 8 on eight, then one process with all experts."""
    whole = checkpointed(*DISTRIBUTED, "--micro-batch-size", "1")
    checkpoints = killed_while_it_saved(whole.checkpoints, tmp_path)
    flags = [*whole.flags, "--save", checkpoints, "--load", checkpoints]
    flags += ["--moe-token-dispatcher", "ep_comm", "--expert-model-parallel-size"]
    ep8 = train(tmp_path / "ep8", *flags, 8, "--train-iters", 4, processes=8)
    assert_goes_on(ep8, whole, [4], 1e-5)
    ep1 = train(tmp_path / "ep1", *flags, 1, processes=1)
    assert_goes_on(ep1, whole, [5, 6], 1e-5)


# What differs between Megatron's optimizers in a checkpoint, and how far rounding takes the losses.
OPTIMIZERS = {
    "FP32": ((), 1e-5),
    "BF16": (("--bf16",), 5e-3),
    "distributed FP32": (("--use-distributed-optimizer",), 1e-5),
    "distributed BF16": (("--bf16", "--use-distributed-optimizer"), 5e-3),
}
EP = "--expert-model-parallel-size"


@pytest.mark.parametrize("optimizer", ["FP32", "BF16"])
def test_resumed_on_one_process(checkpointed, tmp_path, optimizer):
    """The distributed optimizer is above; without it the state is grouped by where experts are."""
    flags, tolerance = OPTIMIZERS[optimizer]
    whole = checkpointed("alltoall", *flags)
    checkpoints = killed_while_it_saved(whole.checkpoints, tmp_path)
    resumed = train(tmp_path / "run", *whole.flags, "--load", checkpoints, EP, 1, processes=1)
    assert_goes_on(resumed, whole, [4, 5, 6], tolerance)


@pytest.mark.e2e
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("there", [(1, 1), (4, 2)], ids="{0[0]}-processes-ep{0[1]}".format)
def test_resumed_with_any_other_ranks(tmp_path, optimizer, there):
    """A checkpoint of any number of processes goes on with any other, and expert-parallel size."""
    flags, tolerance = OPTIMIZERS[optimizer]
    flags = [*SMALL, "--train-iters", 6, "--moe-token-dispatcher", "alltoall", *flags]
    processes, expert_parallel = there
    whole = SimpleNamespace(run_dir=tmp_path / "whole", checkpoints=tmp_path / "checkpoints")
    save = ["--save", whole.checkpoints, "--save-interval", 3]
    train(whole.run_dir, *flags, *save, EP, expert_parallel, processes=processes)
    checkpoints = killed_while_it_saved(whole.checkpoints, tmp_path / "copy")
    for processes, expert_parallel in [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]:
        run_dir = tmp_path / f"{processes} processes EP {expert_parallel}"
        load = ["--load", checkpoints, EP, expert_parallel]
        resumed = train(run_dir, *flags, *load, processes=processes)
        same = (processes, expert_parallel) == there
        assert_goes_on(resumed, whole, [4, 5, 6], 0 if same else tolerance)


def assert_goes_on(
    resumed: dict[int, float], whole: SimpleNamespace, steps: list[int], tolerance: float
) -> None:
    """The resumed run did these steps, with the losses of the uninterrupted one."""
    assert list(resumed) == steps
    for step in steps:
        assert resumed[step] == pytest.approx(losses(whole.run_dir)[step], rel=tolerance)


def test_checkpoint_of_another_model(checkpointed):
    run = checkpointed(*DISTRIBUTED)
    folder = run.checkpoints.parent
    before = contents(folder)
    refused = "UserError: .* another run.* num_experts is 8 there and 4 here"
    with pytest.raises(RankFailure, match=refused):
        train(run.run_dir, *run.flags, "--load", run.checkpoints, "--num-experts", "4")
    assert contents(folder) == before


def test_resumed_with_moved_data_and_another_batch_size(checkpointed, tmp_path):
    whole = checkpointed(*DISTRIBUTED)
    checkpoints = killed_while_it_saved(whole.checkpoints, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 1000)
    changed = ["--load", checkpoints, "--data-path", text, "--global-batch-size", "4"]
    with pytest.raises(RankFailure, match="--load-despite data_path global_batch_size"):
        train(tmp_path / "refused", *whole.flags, *changed)
    allowed = ["--load-despite", "global_batch_size", "data_path"]
    resumed = train(tmp_path / "run", *whole.flags, *changed, *allowed)
    assert list(resumed) == [4, 5, 6]
    rates = {r["iteration"]: r["learning-rate"] for r in records(whole.run_dir, "train")}
    for record in records(tmp_path / "run", "train"):
        assert record["learning-rate"] == rates[record["iteration"]]


def test_only_the_latest_checkpoints_are_kept(tmp_path):
    flags = [*SMALL, "--train-iters", "4", "--save", tmp_path / "save", "--save-interval", "1"]
    train(tmp_path / "run", *flags, "--keep-checkpoints", "2", "--eval-iters", "0")
    names = sorted(path.name for path in (tmp_path / "save").iterdir())
    assert names == [".lock", "iter_0000003", "iter_0000004", LATEST]


@pytest.mark.parametrize("flag", ["--run-dir", "--save"])
def test_two_runs_in_one_folder(tmp_path, flag):
    folder = tmp_path / "folder"
    folder.mkdir()
    held = lock(folder / ".lock", flag)
    flags = [*SMALL, "--train-iters", "1", flag, folder]
    with pytest.raises(RankFailure, match=f"{flag} {folder} is in use by process {os.getpid()} on"):
        run_ranks(2, pretrain, [str(flag) for flag in flags], **NEW)
    os.close(held)
    assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("damaged", ["common.pt", "__0_0.distcp"])
def test_damaged_checkpoint(checkpointed, tmp_path, damaged):
    run = checkpointed(*DISTRIBUTED)
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(run.checkpoints, checkpoints)
    path = checkpoints / "iter_0000006" / damaged
    if not path.exists():
        pytest.skip(f"this Megatron-Core's checkpoints have no {damaged}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RankFailure) as failure:
        train(tmp_path / "run", *run.flags, "--load", checkpoints)
    error = f"ep_comm.job.exits.UserError: checkpoint {path.parent} cannot be read: "
    assert str(failure.value).count(error) == 2  # on both ranks
    assert not (tmp_path / "run").exists()


def test_finished_run_has_nothing_to_do(checkpointed, tmp_path):
    run = checkpointed(*DISTRIBUTED)
    flags = [*run.flags, "--run-dir", str(tmp_path), "--load", str(run.checkpoints)]
    output, _ = run_ranks(2, printed_by, flags, **NEW)
    assert f"resumed at step 6 from {run.checkpoints / 'iter_0000006'}\n" in output
    assert "already at step 6 of 6: nothing to do\n" in output
    assert losses(tmp_path) == {}


def printed_by(rank: int, flags: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        pretrain(rank, flags)
    return output.getvalue()
