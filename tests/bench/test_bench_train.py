"""``ep-comm bench train``: settings, traces, figures, and a run on the CPU."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from commands import run_command
from made_up_train import SMALL, TINY, made_up_run, settings
from ranks import run_ranks, stop_pool
from rich.console import Console
from typer.testing import CliRunner

from ep_comm.backends.nvlink.mailbox import Mailbox
from ep_comm.bench.train import profile as profiling
from ep_comm.bench.train.profile import BACKWARD, STEP, Bar, Profile, bars, summarize_trace
from ep_comm.bench.train.report import write_figures, write_report
from ep_comm.bench.train.results import TrainRun
from ep_comm.bench.train.timeline import draw_timelines
from ep_comm.cli.app import app
from ep_comm.job.exits import UserError
from ep_comm.pretrain.variants import VARIANTS, reference_of, references_of, serial_of
from ep_comm.telemetry.profiles import kernel_kind

# ---- Settings ------------------------------------------------------------------------------------


def test_variants_and_microbatches_are_named_once():
    found = settings(variants="ep_comm, alltoall,deepep", microbatches="8,1,8")
    assert found.variants == ("ep_comm", "alltoall") and found.microbatches == (1, 8)
    arguments = found.arguments("ep_comm")
    assert arguments[:2] == ["--config", str(TINY)] and arguments[-2:] == [*VARIANTS["ep_comm"]]


def test_each_block_begins_with_another_variant():
    found = settings()
    assert [found.order(block)[0] for block in range(4)] == [
        *found.variants,
        found.variants[0],
    ]
    assert all(sorted(found.order(block)) == sorted(found.variants) for block in range(3))


def test_what_variants_are_compared_with():
    assert reference_of("ep_comm-overlap") == "alltoall" == reference_of("alltoall")
    assert reference_of("ep_comm-fp8-all") == "alltoall-fp8" == reference_of("alltoall-fp8")
    assert serial_of("ep_comm") is None and serial_of("ep_comm-overlap") == "ep_comm"
    assert reference_of("alltoall-overlap") == "alltoall" == serial_of("alltoall-overlap")
    assert reference_of("ep_comm-capacity") == "alltoall-capacity"
    assert references_of("ep_comm-1f1b") == ("alltoall", "alltoall-1f1b")
    assert references_of("ep_comm-fp8-all-1f1b") == ("alltoall-fp8", "alltoall-fp8-1f1b")
    assert references_of("alltoall-1f1b") == ("alltoall",) == references_of("ep_comm")
    for name in VARIANTS:
        assert set(references_of(name)) <= set(VARIANTS) and (serial_of(name) or name) in VARIANTS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"variants": "alltoall,deep"},
            "--variants 'deep' is none of alltoall, alltoall-overlap, ",
        ),
        ({"microbatches": "1,0"}, "--microbatches '1,0'"),
        ({"microbatches": "one"}, "--microbatches 'one'"),
        ({"blocks": 0}, "--blocks 0 must be at least 1"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"warmup": -1}, "--warmup -1 must be at least 0"),
        ({"extra": ("--no-ep-fp8-dispatch",)}, "--no-ep-fp8-dispatch is what is measured: use --v"),
        ({"extra": ("--global-batch-size=8",)}, "--global-batch-size is what is measured: use --m"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(UserError) as error:
        settings(**changes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--config", "no.yaml"], "--config no.yaml: no such file; give a path, or one of deeps"),
        (["--variants", "ours"], "--variants 'ours'"),
        (["--moe-router-topk", "9"], "alltoall: moe_router_topk 9 is more than num_experts 8"),
        (["--no-such-key", "1"], "--no-such-key"),
        (
            ["--variants", "ep_comm-capacity"],
            "ep_comm-capacity: moe_pad_expert_input_to_capacity needs moe_expert_capacity_factor",
        ),
        (["--variants", "ep_comm-1f1b"], "ep_comm-1f1b: overlap_moe_expert_parallel_comm needs b"),
        (["--variants", "alltoall-overlap"], "alltoall-overlap: overlap_dispatch_backward_with"),
        ([], "start it with torchrun"),
    ],
)
def test_refused_in_one_line_before_a_job_is_joined(arguments, words, monkeypatch, capfd):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(app, ["bench", "train", "--config", str(TINY), *arguments])
    assert result.exit_code == 2
    error = capfd.readouterr().err + result.output
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_options_of_the_other_benchmark_are_refused():
    command = ["bench", "--preset", "W2", "train", "--config", str(TINY)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "--preset before train has no effect" in result.output


def test_help():
    assert "train" in CliRunner().invoke(app, ["bench", "--help"]).output
    text = CliRunner().invoke(app, ["bench", "train", "--help"], terminal_width=300).output
    text = "".join(text.split())  # lines end in the middle of a name, too
    for word in ("--config", "--variants", "--microbatches", "--blocks", "--out", *VARIANTS):
        assert word in text


# ---- Traces --------------------------------------------------------------------------------------


def event(cat: str, name: str, ts: float, dur: float, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


# Host: a step of 100 µs that launches three kernels and a copy and waits twice; before it another
# launch. GPU: streams 7 and 13, partly at once; the last kernel ends behind the step.
EVENTS = [
    event("cuda_runtime", "cudaLaunchKernel", 990, 5, correlation=1),
    event("kernel", "before", 1001, 4, correlation=1, stream=7),
    event("user_annotation", STEP, 1000, 100),
    event("gpu_user_annotation", STEP, 1010, 200, stream=7),
    event("cpu_op", "aten::mm", 1005, 10),
    event("cuda_runtime", "cudaLaunchKernel", 1006, 5, correlation=2),
    event("user_annotation", BACKWARD, 1020, 60),
    event("cuda_runtime", "cudaLaunchKernelExC", 1021, 5, correlation=3),
    event("cuda_driver", "cuLaunchKernelEx", 1027, 5, correlation=4),
    event("cuda_runtime", "cudaMemcpyAsync", 1040, 2, correlation=5),
    event("cuda_runtime", "cudaStreamSynchronize", 1042, 20, correlation=6),
    event("user_annotation", profiling._SIZES, 1085, 10),
    event("cuda_runtime", "cudaDeviceSynchronize", 1101, 99, correlation=7),
    event("kernel", "nvjet_tst_gemm", 1010, 10, correlation=2, stream=7),
    event("kernel", "ep::combine_kernel(args)", 1030, 40, correlation=3, stream=13),
    event("kernel", "nvjet_tst_wgrad", 1040, 80, correlation=4, stream=7),
    event("gpu_memcpy", "Memcpy DtoH", 1050, 5, correlation=5, stream=7),
]


def test_a_step_of_a_trace():
    assert summarize_trace(EVENTS, STEP) == Profile(
        kernels=3, copies=1, waits=2, wait_us=30, host_us=70, busy_us=10 + 90,
        communication_us=40, exposed_us=10, wall_us=120,
    )  # fmt: skip
    backward = summarize_trace(EVENTS, BACKWARD)
    assert (backward.kernels, backward.copies, backward.waits, backward.host_us) == (2, 1, 1, 40)


def test_timeline_of_a_trace():
    found = bars(EVENTS, BACKWARD)
    assert [(bar.stream, bar.start_us, bar.duration_us) for bar in found] == [
        (13, 0, 40),
        (7, 10, 80),
        (7, 20, 5),
    ]
    assert [kernel_kind(bar.name) for bar in found] == ["combine", "GEMM", "other"]


@pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:Warning. Profiler clears")
def test_torchs_profiler_writes_such_a_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    calls = []

    def call():
        with profiling.named(BACKWARD):
            calls.append(torch.ones(64, 64) @ torch.ones(64, 64))

    events = profiling.record(call, torch.device("cpu"), tmp_path / "trace.json.gz")
    assert len(calls) == 2
    step, backward = (summarize_trace(events, name) for name in (STEP, BACKWARD))
    assert 0 < backward.host_us < step.host_us
    assert step.kernels == step.waits == 0 and bars(events, STEP) == []


# ---- Figures -------------------------------------------------------------------------------------


def test_figures():
    run = made_up_run()
    one, two = (run.figures("ep_comm", count) for count in (1, 2))
    assert one["ratio_of_blocks"] == (12 / 10, 12 / 12)
    assert two["ratio_median"] == pytest.approx(1.1) and two["ratio_worst"] == 1
    assert one["memory_ratio"] == pytest.approx(1.1) and one["num_allocations"] == 6
    assert run.figures("alltoall", 2)["num_allocations"] == 0
    overlap = run.figures("ep_comm-overlap", 2)
    assert overlap["step_ms"]["median"] == 16
    assert overlap["tokens_per_s_per_gpu"] == pytest.approx(2 * 2 * 32 / 16e-3)
    assert run.layer_ratio("ep_comm") == pytest.approx(10 / 9)
    assert run.hidden_share("ep_comm-overlap") == pytest.approx(0.8)
    assert run.hidden_share("ep_comm") is None


@pytest.mark.parametrize(("theirs_ms", "faster"), [(9.0, "alltoall-1f1b"), (13.0, "alltoall")])
def test_the_faster_reference_counts(theirs_ms, faster):
    run = made_up_run()
    for name, ms in (("alltoall-1f1b", theirs_ms), ("ep_comm-1f1b", 6.0)):
        like = [block for block in run.blocks if block.variant == "alltoall"]
        blocks = [
            dataclasses.replace(block, variant=name, step_ms=(ms * block.microbatches,) * 3)
            for block in like
        ]
        run = dataclasses.replace(run, blocks=run.blocks + blocks)
    found = run.figures("ep_comm-1f1b", 2)
    assert found["reference"] == faster
    assert found["ratio_worst"] == min(theirs_ms, 12.0) / 6
    assert run.figures("ep_comm", 2)["reference"] == "alltoall"


def test_without_the_reference_there_are_no_ratios():
    run = made_up_run()
    blocks = [block for block in run.blocks if block.variant != "alltoall"]
    inspections = {"ep_comm-overlap": run.inspections["ep_comm-overlap"]}
    run = TrainRun(**{**vars(run), "blocks": blocks, "inspections": inspections})
    found = run.figures("ep_comm", 1)
    assert found["ratio_of_blocks"] is found["ratio_median"] is found["memory_ratio"] is None
    assert run.layer_ratio("ep_comm-overlap") is None


def test_no_combine_of_ours_no_hidden_share():
    run = made_up_run()
    inspections = {**run.inspections, "alltoall-overlap": run.inspections["alltoall"]}
    run = TrainRun(**{**vars(run), "inspections": inspections})
    assert run.layer_ratio("alltoall-overlap") == 1
    assert run.hidden_share("alltoall-overlap") is None


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_report(device, tmp_path):
    console = Console(width=140, record=True, file=io.StringIO())
    write_report(made_up_run(device=device), tmp_path, console)
    text = console.export_text()
    ep_comm = next(line for line in text.splitlines() if "ep_comm " in line)
    cells = [cell.strip() for cell in ep_comm.strip("│ ").split("│")]
    assert cells == [
        "ep_comm", "1", "11.0", "9.0", "13.0", "5,818", "1.100", "1.000", "11.0", "1.100", "6",
        "5.5000",
    ]  # fmt: skip
    assert "80%" in text and "manual_gc on" in text and "moe_permute_fusion off" in text
    assert ("there is no GPU" in text) == (device == "cpu")
    document = json.loads((tmp_path / "bench-train.json").read_text())
    assert {"commit", "versions", "configs", "baseline"} <= document.keys()
    assert document["hidden_share"]["ep_comm-overlap"] == pytest.approx(0.8)
    assert len(document["blocks"]) == 12 and document["results"][0]["step_ms"]["median"] == 12
    pictures = {"steps.png"} | ({"overlap.png"} if device == "cuda" else set())
    assert {path.name for path in tmp_path.glob("*.png")} == pictures


def test_what_an_unfinished_run_has_found_is_written(tmp_path):
    run = made_up_run()
    write_figures(dataclasses.replace(run, inspections={}, blocks=run.blocks[:6]), tmp_path)
    document = json.loads((tmp_path / "bench-train.json").read_text())
    assert document["results"][0]["step_ms"]["median"] == 12
    assert set(document["layer_ratio"].values()) == {None}


def test_timelines_of_any_number(tmp_path):
    bar = Bar(name="x", stream=7, start_us=0, duration_us=1)
    draw_timelines({"one": [bar]}, "title", tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


# ---- Runs ----------------------------------------------------------------------------------------


def bench_train(*flags: object) -> SimpleNamespace:
    return run_command("bench", "train", *flags, pool="training")


def test_a_run_on_the_cpu(tmp_path):
    flags = ["--config", TINY, *SMALL, "--microbatches", "1,2", "--blocks", 1, "--steps", 2]
    result = bench_train(*flags, "--warmup", 0, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "tokens/s/GPU" in result.stdout and "block 1/1: ep_comm-overlap, 2" in result.stderr
    document = json.loads((tmp_path / "bench-train.json").read_text())
    assert document["settings"]["variants"] == ["alltoall", "ep_comm", "ep_comm-overlap"]
    for count in (1, 2):
        losses = [b["loss"] for b in document["blocks"] if b["microbatches"] == count]
        assert len(losses) == 3 and max(losses) - min(losses) < 1e-5
    for block in document["blocks"]:
        assert len(block["step_ms"]) == 2 and min(block["step_ms"]) > 0
    for name, found in document["inspections"].items():
        assert len(found["layer"]["total"]) == 20 and found["step"] is None
        assert bool(found["layer"]["combine"]) == (name != "alltoall")
        assert found["phases_ms"].keys() == {"dispatch", "expert", "combine"}
        pairs = found["layer"]["hidden"]
        assert len(pairs) == (40 if name == "ep_comm-overlap" else 0)
    assert document["hidden_share"]["ep_comm-overlap"] is not None


def test_a_capacity_on_the_cpu(tmp_path):
    """Both drop the same tokens, whose number is shown."""
    flags = ["--config", TINY, *SMALL, "--microbatches", 1, "--blocks", 1, "--steps", 1]
    flags += ["--variants", "alltoall-capacity,ep_comm-capacity", "--warmup", 0]
    result = bench_train(*flags, "--moe-expert-capacity-factor", 0.7, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "bench-train.json").read_text())
    alltoall, ours = document["inspections"].values()
    assert 0.3 <= alltoall["dropped"] < 0.9 and ours["dropped"] == alltoall["dropped"]
    assert f"{ours['dropped']:.2%}" in result.stdout
    losses = [block["loss"] for block in document["blocks"]]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_mistake_ends_the_job_with_one_line(tmp_path):
    wrong = ("--expert-model-parallel-size", 4)
    result = bench_train("--config", TINY, *wrong, "--out", tmp_path / "out")
    assert result.returncode != 0 and not (tmp_path / "out").exists()
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "alltoall: 2 processes" in errors[0]


def free_one(rank: int) -> list[str]:
    """Types of what outlives a variant that was measured and freed, of its model and optimizer."""
    from ep_comm.pretrain.start import prepare_megatron

    prepare_megatron()
    from ep_comm.bench.train.model import Trainer
    from ep_comm.bench.train.run import _inspect
    from ep_comm.pretrain.flags import parse_args

    asked = settings(variants="ep_comm-overlap", microbatches="1", steps=1, warmup=0)
    flags = ["--expert-model-parallel-size", "1", "--use-distributed-optimizer"]
    config = parse_args([*asked.arguments("ep_comm-overlap"), *flags, "--overlap-grad-reduce"])
    trainer = Trainer(config, torch.device("cpu"))
    parts = [trainer.trainee.model, trainer.trainee.optimizer, *trainer.trainee.model.parameters()]
    watched = [weakref.ref(part) for part in parts]
    del parts
    _inspect(trainer, asked, Path("unused"))
    trainer.free()
    gc.collect()
    assert len(watched) > 10
    return [type(ref()).__name__ for ref in watched if ref() is not None]


def test_the_wait_for_sizes_is_seen_by_the_profiler(monkeypatch):
    class Answer:
        def sizes(self, *args: int) -> tuple[int, ...]:
            return args

    monkeypatch.setattr(profiling, "Mailbox", Answer)
    with torch.profiler.profile() as profiler, profiling._visible_wait_for_sizes():
        assert Answer().sizes(1, 2) == (1, 2)
    assert profiling._SIZES in {event.name for event in profiler.events()}
    assert hasattr(Mailbox, "sizes")  # what is patched outside of this test


def test_a_freed_variant_leaves_nothing_behind():
    try:
        assert run_ranks(1, free_one, pool="bench-train") == [[]]
    finally:
        stop_pool("bench-train")
