"""examples/pretrain_moe.py: what it learns, resuming, logs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")

from example_runs import (  # noqa: E402
    CONFIGS,
    SMALL,
    TINY,
    assert_refused,
    contents,
    environment,
    losses,
    pretrain,
    records,
    torchrun,
    train,
    wandb_records,
)
from ranks import RankFailure, run_ranks  # noqa: E402

from ep_comm.job.files import lock  # noqa: E402
from ep_comm.pretrain.config import PretrainConfig  # noqa: E402
from ep_comm.pretrain.log_file import LOG_FILE, read_log, read_whole_log  # noqa: E402

# Measured by the rank that logs them.
OF_EACH_RANK = ("iteration-time", "throughput", "tokens-per-second")
LATEST = "latest_checkpointed_iteration.txt"


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


@pytest.mark.parametrize("dispatcher", ["alltoall", "ep_comm"])
def test_tiny_cpu_learns(tiny_runs, dispatcher):
    loss = losses(tiny_runs(dispatcher))
    assert len(loss) == 60
    assert loss[1] > 5 and loss[60] < 3.3


def test_ep_comm_matches_alltoall(tiny_runs):
    ours, theirs = losses(tiny_runs("ep_comm")), losses(tiny_runs("alltoall"))
    assert largest_difference(ours, theirs, steps=10) <= 1e-6
    assert largest_difference(ours, theirs, steps=60) <= 1e-4


@pytest.mark.e2e
def test_top4_shows_the_order_of_the_sum(tmp_path):
    flags = ["--config", CONFIGS / "tiny-cpu-top4.yaml", "--train-iters", "4", "--eval-iters", "0"]
    flags += ["--lr-decay-iters", "60"]
    ours, theirs = (
        train(tmp_path / name, *flags, "--moe-token-dispatcher", name)
        for name in ("ep_comm", "alltoall")
    )
    assert ours != theirs
    assert largest_difference(ours, theirs, steps=4) <= 1e-6


def test_fp8_dispatch_ends_within_one_percent(tiny_runs):
    fp8, alltoall = (
        records(tiny_runs(*args), "valid")[-1]["lm loss validation"]
        for args in (("ep_comm", "--ep-fp8-dispatch"), ("alltoall",))
    )
    assert fp8 == pytest.approx(alltoall, rel=0.01)


def test_allgather_matches_alltoall(tiny_runs, tmp_path):
    flags = ["--moe-token-dispatcher", "allgather", "--train-iters", "5", "--lr-decay-iters", "60"]
    loss = train(tmp_path, *TINY, *flags, "--eval-iters", "0")
    assert largest_difference(loss, losses(tiny_runs("alltoall")), steps=5) <= 1e-6


def test_gradient_accumulation_gives_the_same_step(tiny_runs, tmp_path):
    flags = ["--moe-token-dispatcher", "ep_comm", "--train-iters", "3", "--lr-decay-iters", "60"]
    train(tmp_path, *TINY, *flags, "--eval-iters", "0", "--micro-batch-size", "2")
    for many, one in zip(
        records(tmp_path, "train"), records(tiny_runs("ep_comm"), "train")[:3], strict=True
    ):
        # Not exactly: the balancing loss is a product of means over a microbatch.
        assert many["lm loss"] == pytest.approx(one["lm loss"], rel=1e-3)
        assert many["grad-norm"] == pytest.approx(one["grad-norm"], rel=1e-2)


@pytest.mark.parametrize("dispatcher", ["alltoall", "ep_comm"])
def test_megatrons_1f1b_overlap_changes_no_bit(tmp_path, dispatcher):
    """Of two micro-batches a step; validation has none to overlap with."""
    flags = [*SMALL, "--bf16", "--train-iters", "3", "--moe-token-dispatcher", dispatcher]
    flags += ["--moe-expert-capacity-factor", "1.25", "--moe-pad-expert-input-to-capacity"]
    plain = train(tmp_path / "plain", *flags)
    overlapped = train(tmp_path / "1f1b", *flags, "--overlap-moe-expert-parallel-comm")
    assert len(plain) == 3 and overlapped == plain


@pytest.mark.parametrize("sizes", [[700], [300_000], [9_000, 20, 800, 3_000]], ids=str)
def test_a_text_of_any_size_has_training_and_validation_data(tmp_path, sizes):
    for number, size in enumerate(sizes):
        text = "".join(f"line {i} of my text\n" for i in range(size // 15))
        (tmp_path / f"{number}.txt").write_text(text[:size])
    data = ["--data-path", str(tmp_path), "--data-cache-path", str(tmp_path / "cache")]
    ((train, valid),) = run_ranks(1, tokens_of_each_part, [*SMALL, *data], fresh=True)
    assert valid >= 64 and train > 5 * valid
    assert train + valid > sum(sizes) - 3 * 64  # whole sequences only


def tokens_of_each_part(rank: int, flags: list[str]) -> tuple[int, int]:
    from ep_comm.pretrain.flags import parse_args
    from ep_comm.pretrain.start import prepare_megatron

    prepare_megatron()
    from ep_comm.pretrain.data import load_datasets

    _, train, valid = load_datasets(parse_args([*flags, "--expert-model-parallel-size", "1"]))
    return tuple(sum(len(data[i]["tokens"]) for i in range(len(data))) for data in (train, valid))


def test_data_seed_alone_decides_the_order_of_the_data():
    code = """if True:
        import torch.distributed as dist
        from ep_comm.megatron import cpu
        cpu.enable()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        import sys
        from ep_comm.pretrain.flags import parse_args
        from ep_comm.pretrain.data import load_datasets
        for seeds in (["--seed", "1"], ["--seed", "2"], ["--seed", "2", "--data-seed", "1"]):
            _, train, valid = load_datasets(parse_args([*sys.argv[1:], *seeds]))
            print(*(data[i]["tokens"].tolist() for data in (train, valid) for i in range(4)))
    """
    result = subprocess.run(
        [sys.executable, "-c", code, *SMALL, "--expert-model-parallel-size", "1"],
        capture_output=True,
        text=True,
        env=environment(),
    )
    first, second, mixed = (x for x in result.stdout.splitlines() if x.startswith("["))
    assert first != second and first == mixed


# ------------------------------------------------------------------ repeating and resuming exactly


def test_ep_comm_repeats_itself(tiny_runs, tmp_path):
    flags = ["--moe-token-dispatcher", "ep_comm", "--train-iters", "5", "--lr-decay-iters", "60"]
    loss = train(tmp_path, *TINY, *flags, "--eval-iters", "0")
    assert largest_difference(loss, losses(tiny_runs("ep_comm")), steps=5) == 0


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
    code = """if True:
        import sys
        import torch.distributed as dist
        from ep_comm.megatron import cpu
        cpu.enable()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        from megatron.core.dist_checkpointing import load_plain_tensors
        ours, theirs = map(load_plain_tensors, sys.argv[1:])
        tensors = [name for name, value in ours.items() if hasattr(value, "dtype")]
        assert "output_layer.weight" in tensors
        print("differ:", [name for name in tensors if not ours[name].equal(theirs[name])])
    """
    folders = [str(run.checkpoints / "iter_0000003") for run in (gathering, plain)]
    result = subprocess.run(
        [sys.executable, "-c", code, *folders], capture_output=True, text=True, env=environment()
    )
    assert "differ: []" in result.stdout, result.stdout + result.stderr


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
    flags = [*run.flags, "--run-dir", run.run_dir, "--load", run.checkpoints]
    assert_refused(
        torchrun(*flags, "--num-experts", "4"), "another run", "num_experts is 8 there and 4 here"
    )
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
        run_ranks(2, pretrain, [str(flag) for flag in flags], fresh=True)
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
    output, _ = run_ranks(2, printed_by, flags, fresh=True)
    assert f"resumed at step 6 from {run.checkpoints / 'iter_0000006'}\n" in output
    assert "already at step 6 of 6: nothing to do\n" in output
    assert losses(tmp_path) == {}


def printed_by(rank: int, flags: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        pretrain(rank, flags)
    return output.getvalue()


# ---------------------------------------------------------------------------------------- its logs


def test_log_has_everything(tiny_runs):
    start = records(tiny_runs("ep_comm"), "start")[0]
    assert start["dispatcher"] == "ep_comm" and start["processes"] == 2
    assert {"ep_comm", "torch", "megatron-core"} <= start["versions"].keys()
    PretrainConfig(**start["config"])  # can be read back
    steps = records(tiny_runs("ep_comm"), "train")
    assert [r["iteration"] for r in steps] == list(range(1, 61))
    for record in steps:
        assert record.keys() >= {
            *("lm loss", "grad-norm", "learning-rate", "iteration-time", "throughput"),
            "tokens-per-second",
            *("ep/dispatch-ms", "ep/combine-ms", "ep/expert-ms"),
            *("ep/imbalance-rank", "ep/imbalance-expert", "ep/wire-mib"),
            *("ep/dispatch-ms-p99", "ep/combine-ms-p99", "ep/wait-share", "ep/slowest-rank"),
            "ep/exposed-ms",
        }
        assert record["ep/wire-mib"] > 0
        assert record["ep/imbalance-rank"] >= 1 and record["ep/imbalance-expert"] >= 1
    assert [r["iteration"] for r in records(tiny_runs("ep_comm"), "valid")] == [30, 60]
    balance = records(tiny_runs("ep_comm"), "balance")
    assert [r["iteration"] for r in balance] == list(range(5, 61, 5))
    trained = {r["iteration"]: r for r in steps}
    config = PretrainConfig(**start["config"])
    tokens = config.global_batch_size * config.seq_length * config.moe_router_topk
    for record in balance:
        layers = record["layers"]
        assert [layer["layer"] for layer in layers] == list(range(1, config.num_layers + 1))
        for layer in layers:
            assert len(layer["tokens"]) == config.num_experts and sum(layer["tokens"]) == tokens
            assert layer["tokens"][layer["fullest-expert"]] == max(layer["tokens"])
        for what in ("rank", "expert"):
            worst = max(layer[f"imbalance-{what}"] for layer in layers)
            assert worst == trained[record["iteration"]][f"ep/imbalance-{what}"]


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


def test_damaged_lines_of_a_log(tmp_path):
    path = tmp_path / LOG_FILE
    good = b'{"type": "train", "iteration": 1}\n'
    path.write_bytes(good + b"\xff\x00\n" + b"[1]\n" + b'{"type": "train"}\n\n' + good + good[:9])
    log = read_whole_log(path)
    assert log.damaged == [2, 3, 4, 7]
    assert log.records == 2 * [{"type": "train", "iteration": 1}]


def a_warning(rank: int, folder: str) -> None:
    from ep_comm.pretrain.flags import parse_args
    from ep_comm.pretrain.log import RunLog

    with RunLog(parse_args([*TINY, "--run-dir", folder]), {}, first_iteration=0) as log:
        log.warning(3, "it is slow")


def test_the_log_has_the_warnings(tmp_path):
    run_ranks(1, a_warning, str(tmp_path))
    (record,) = records(tmp_path, "warning")
    assert record == {"type": "warning", "iteration": 3, "text": "it is slow"}


def test_the_bar_has_tails_and_the_slowest_rank():
    from ep_comm.pretrain.log import _tails

    step = {"ep/dispatch-ms-p99": 12.34, "ep/combine-ms-p99": 0.5, "ep/slowest-rank": 3.0}
    assert _tails(step) == "  dispatch/combine p99 12.3/0.5 ms  slowest rank 3"
    assert _tails({**step, "ep/slowest-rank": -1}) == "  dispatch/combine p99 12.3/0.5 ms"
    assert _tails({"lm loss": 3.0}) == ""  # another dispatcher


def test_wandb_without_a_key_writes_an_offline_run(tiny_runs):
    pytest.importorskip("wandb")
    run_dir = tiny_runs("alltoall")
    (folder,) = run_dir.glob("wandb/offline-run-*")
    written = wandb_records(folder)
    trained, validated = records(run_dir, "train"), records(run_dir, "valid")

    history = {r["step"]["num"]: r["item"] for r in written["history"]}
    assert list(history) == list(range(1, 61))
    for record in [*trained, *validated]:
        logged = history[record["iteration"]]
        assert record.keys() - {"type", "iteration"} <= logged.keys()
        for key in record.keys() - {"type", "iteration", *OF_EACH_RANK}:
            assert record[key] == logged[key]
    summary = {key: value for r in written["summary"] for key, value in r["update"].items()}
    assert summary["lm loss"] == trained[-1]["lm loss"]
    assert summary["lm loss validation"] == validated[-1]["lm loss validation"]

    (run,) = written["run"]
    assert run["project"] == "ep_comm-test" and run["display_name"] == run_dir.name
    start = records(run_dir, "start")[0]
    assert run["run_id"] == start["wandb_run_id"]
    config = run["config"]["update"]
    assert start["config"].items() <= config.items() and config["world_size"] == 2
    # The last rank logs: rank 0 is the one that prints.
    assert not any("step 60/60" in r["line"] for r in written["output_raw"])
    assert [r["exit_code"] for r in written["exit"]] == [0]


def test_failed_run_ends_its_logs(tmp_path):
    pytest.importorskip("wandb")
    flags = ["--lr", "1e30", "--clip-grad", "0", "--wandb-project", "ep_comm-test"]
    result = torchrun(*SMALL, *flags, "--run-dir", tmp_path)
    assert_refused(result, "the loss is nan at step", "a lower --lr may help")
    assert f"log: {tmp_path / LOG_FILE}\n" in result.output
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert [r["exit_code"] for r in wandb_records(folder)["exit"]] == [1]


def options_of_the_layers(rank: int, flags: list[str]) -> tuple[float | None, int | None]:
    from ep_comm.pretrain.flags import parse_args
    from ep_comm.pretrain.start import prepare_megatron

    prepare_megatron()
    from ep_comm.pretrain.model import _layer_spec

    mlp = _layer_spec(parse_args(flags)).submodules.mlp
    options = getattr(mlp, "params", None) or mlp.keywords  # before megatron-core 0.18, or after
    return options["ep_options"].timeout_s, options["ep_options"].max_tokens_per_rank


def test_buffers_are_sized_by_the_configuration():
    flags = [*map(str, TINY), "--micro-batch-size", "3", "--global-batch-size", "6"]
    flags += ["--seq-length", "20"]
    assert run_ranks(1, options_of_the_layers, flags, fresh=True) == [(None, 60)]


def test_a_late_rank_is_waited_for_as_long_as_the_flag_says(tmp_path):
    with pytest.raises(RankFailure, match="waited 1e-06 s .* or raise --ep-timeout if"):
        train(tmp_path / "late", *TINY, "--ep-timeout", "1e-6")
