"""``ep-comm compare``: differences, verdicts and refusals, on made-up logs. Nothing is trained."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ep_comm.cli.app import app
from ep_comm.compare.directory import Directory, locked
from ep_comm.compare.plan import VARIANTS as ALL_VARIANTS
from ep_comm.compare.plan import flags_of, make_plan
from ep_comm.compare.progress import Display
from ep_comm.compare.statistics import (
    Run,
    Tolerances,
    difference,
    judge,
    noise_of,
    offsets,
    pairs_of,
    read_run,
    smooth,
    standard_error,
    steps_skipped,
    window_of,
)
from ep_comm.job.exits import UserError
from ep_comm.pretrain.log_file import LOG_FILE

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


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration in a folder of its own, beside the made-up training script."""
    path = tmp_path / "configs" / "small.yaml"
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


# ------------------------------------------------------------------------------------- statistics


def test_smoothing_is_the_mean_of_the_last_steps():
    values = np.random.default_rng(0).normal(size=30)
    expected = [values[max(0, i - 6) : i + 1].mean() for i in range(30)]
    np.testing.assert_allclose(smooth(values, 7), expected, rtol=1e-12)


def test_difference_leaves_out_the_beginning():
    reference, run = losses(), losses()
    run[: steps_skipped(STEPS) - window_of(STEPS) + 1] += 100  # gone from the mean when it counts
    run[49] += 0.5
    found = difference(run_of(run, 3.2), run_of(reference, 3.0))
    assert found.first == pytest.approx(100 / reference[0])
    assert found.largest == pytest.approx(0.5 / window_of(STEPS))
    assert 50 <= found.largest_step < 50 + window_of(STEPS)
    assert found.mean == pytest.approx(0.5 / (STEPS - steps_skipped(STEPS)))
    assert found.final_train == pytest.approx(0, abs=1e-12)
    assert found.final_valid == pytest.approx(0.2)


def test_differences_of_both_signs_do_not_cancel():
    run = losses()
    run[30:50] += 0.1
    run[60:90] -= 0.1
    assert difference(run_of(run), run_of(losses())).mean == pytest.approx(5 / 75)


def test_numbers_of_a_run(tmp_path):
    from ep_comm.pretrain.log_file import read_log

    write_log(tmp_path / "run", losses())
    run = read_run(read_log(tmp_path / "run" / LOG_FILE), STEPS)
    assert run.tokens_per_s == np.median(1000 + np.arange(6, STEPS + 1))
    assert run.final_train == pytest.approx(losses()[-window_of(STEPS) :].mean())
    assert run.final_valid == losses()[-1] + 0.5
    with pytest.raises(ValueError, match="step 101 is missing"):
        read_run(read_log(tmp_path / "run" / LOG_FILE), STEPS + 1)


# --------------------------------------------------------------------------------------- verdicts

SEED2 = losses(0.04)


@pytest.mark.parametrize(
    ("ep_comm", "valid", "failing"),
    [
        (losses(at_the_end=0.01), 4.0, []),
        (losses(at_the_end=0.05), 4.0, ["largest |Δ|"]),
        (losses(at_the_end=-0.09), 4.0, ["largest |Δ|", "mean |Δ|"]),
        (losses(), 4.06, ["final validation |Δ|"]),
        (losses(), 4.03, []),  # the second seed ended at 4.01, but was 0.04 off on the whole way
        (losses(0.03), 4.0, ["relative |Δ| of step 1"]),
        (np.append(losses()[:-1], np.nan), 4.0, ["largest |Δ|", "mean |Δ|"]),
    ],
    ids=["close", "largest", "mean", "valid", "noisy-valid", "first-step", "nan"],
)
def test_ep_comm_is_judged_by_the_noise(ep_comm, valid, failing):
    runs = {"alltoall": run_of(losses(), 4.0), "alltoall-seed2": run_of(SEED2, 4.01)}
    runs["ep_comm"] = run_of(ep_comm, valid)
    checks = judge(runs, Tolerances())["ep_comm"]
    assert [check.what for check in checks if not check.passed] == failing
    assert len(checks) == 4


def test_tolerance_in_units_of_the_noise():
    runs = {"alltoall": run_of(losses()), "alltoall-seed2": run_of(SEED2)}
    runs["ep_comm"] = run_of(losses(at_the_end=0.05))
    for tolerance, passed in ((1.0, False), (1.3, True)):
        checks = judge(runs, Tolerances(noise=tolerance))["ep_comm"]
        assert all(check.passed for check in checks) == passed


def test_the_noise_of_more_seeds_is_the_largest_between_any_two():
    runs = {"alltoall": run_of(losses(), 4.0), "alltoall-seed2": run_of(SEED2, 4.02)}
    two, only = noise_of(runs), difference(runs["alltoall-seed2"], runs["alltoall"])
    assert (two.largest, two.mean, two.final_valid) == (only.largest, only.mean, only.final_valid)
    runs["alltoall-seed10"] = run_of(losses(-0.03), 4.01)
    noise = noise_of(runs)
    assert noise.mean == pytest.approx(0.07) and noise.largest == pytest.approx(0.07)
    assert noise.final_valid == pytest.approx(0.02)
    runs["ep_comm"] = run_of(losses(at_the_end=0.05), 4.0)  # outside of what seed 2 alone allows
    assert noise_of(runs) == noise  # which ep_comm is no part of
    assert all(check.passed for check in judge(runs, Tolerances())["ep_comm"])
    runs["alltoall-seed3"] = run_of(np.append(losses()[:-1], np.nan), 4.0)
    assert not all(check.passed for check in judge(runs, Tolerances())["ep_comm"])


def test_offsets_show_which_run_is_the_odd_one():
    runs = {"alltoall": run_of(losses(0.09)), "alltoall-seed2": run_of(losses(0.01))}
    runs["ep_comm"] = run_of(losses(0.02))
    assert offsets(runs) == {}  # either of two may be the odd one
    runs["alltoall-seed3"] = run_of(losses(-0.01))
    found = offsets(runs)
    seeds = {"alltoall": 0.06, "alltoall-seed2": -0.02, "alltoall-seed3": -0.04}
    assert found == pytest.approx({**seeds, "ep_comm": -0.01})
    runs["ep_comm"].train[: steps_skipped(STEPS) - window_of(STEPS)] += 100
    assert offsets(runs) == found  # smoothed losses count, and no beginning


@pytest.mark.parametrize(
    ("train", "valid", "passed"),
    [
        (losses(at_the_end=0.01), 4.01, True),
        (losses(at_the_end=-0.03), 4.01, False),
        (losses(), 4.03, False),
    ],
    ids=["close", "train", "valid"],
)
def test_fp8_is_judged_by_the_final_losses_without_it(train, valid, passed):
    runs = {"alltoall": run_of(losses(1.0), 5.0), "ep_comm": run_of(losses(), 4.0)}
    runs["ep_comm-fp8"] = run_of(train, valid)
    checks = judge(runs, Tolerances())["ep_comm-fp8"]
    assert all(check.passed for check in checks) == passed
    assert len(checks) == 2


@pytest.mark.parametrize(("apart", "unclear"), [(0.04, True), (0.07, False)])
def test_one_pair_that_is_no_further_apart_than_seeds_is_unclear(apart, unclear):
    runs = {"alltoall": run_of(losses(), 4.0), "alltoall-seed2": run_of(losses(0.05), 4.001)}
    runs |= {"ep_comm": run_of(losses(), 4.0), "ep_comm-fp8": run_of(losses(apart), 4 + apart)}
    checks = judge(runs, Tolerances())["ep_comm-fp8"]
    assert [check.passed for check in checks] == [False, False]
    assert [check.is_unclear for check in checks] == [unclear, unclear]
    runs |= {"ep_comm-seed2": run_of(losses(), 4.0)}
    runs |= {"ep_comm-fp8-seed2": run_of(losses(apart), 4 + apart)}
    checks = judge(runs, Tolerances())["ep_comm-fp8"]  # two pairs are not chance
    assert not any(check.passed or check.is_unclear for check in checks)


def test_fp8_wire_of_fp8_experts_is_judged_by_their_bf16_wire():
    runs = {"alltoall": run_of(losses(), 4.0), "ep_comm": run_of(losses(), 4.0)}
    runs["ep_comm-fp8-all"] = run_of(losses(1.01), 5.01)
    assert "ep_comm-fp8-all" not in judge(runs, Tolerances())
    runs["ep_comm-fp8-experts"] = run_of(losses(1.0), 5.0)
    checks = judge(runs, Tolerances())
    assert list(checks) == ["ep_comm-fp8-all"]  # what FP8 experts do to the loss is shown only
    assert all(check.passed for check in checks["ep_comm-fp8-all"])
    runs["ep_comm-fp8-all"] = run_of(losses(), 4.0)
    assert not any(check.passed for check in judge(runs, Tolerances())["ep_comm-fp8-all"])


def test_pairs_of_the_same_seed_are_judged_by_their_mean():
    runs = {"alltoall": run_of(losses(), 4.0)}
    for seed, level, more in (("", 0.0, 0.04), ("-seed2", 1.0, -0.02), ("-seed3", 2.0, 0.0)):
        runs[f"ep_comm-fp8-experts{seed}"] = run_of(np.full(STEPS, 1 + level), 2 + level)
        if not seed.endswith("3"):  # a seed of one of them alone is no pair
            runs[f"ep_comm-fp8-all{seed}"] = run_of(np.full(STEPS, 1 + level + more), 2 + level)
    (pairs,) = pairs_of(runs).values()
    assert pairs.counterpart == "ep_comm-fp8-experts" and pairs.seeds == (1, 2)
    assert pairs.final_train == pytest.approx((0.04, -0.01)) and pairs.final_valid == (0, 0)
    assert standard_error(pairs.final_train) == pytest.approx(0.025)
    assert standard_error(pairs.final_train[:1]) is None
    assert np.isnan(standard_error((0.1, float("nan"))))
    for tolerance, passed in ((0.0149, False), (0.0151, True)):
        (checks,) = judge(runs, Tolerances(fp8=tolerance)).values()
        assert [check.passed for check in checks] == [passed, True]
    assert checks[0].what == "final train loss, relative |Δ|, mean of 2 seeds"
    assert list(judge(runs, Tolerances())) == ["ep_comm-fp8-all"]
    del runs["ep_comm-fp8-all"]
    assert list(judge(runs, Tolerances())) == ["ep_comm-fp8-all-seed2"]
    del runs["ep_comm-fp8-experts-seed2"]
    assert judge(runs, Tolerances()) == {} and pairs_of(runs) == {}


# ------------------------------------------------------------------------------ command and report


CURVES = {
    "alltoall": losses(),
    "alltoall-seed2": SEED2,
    "ep_comm": losses(at_the_end=0.001),
    "ep_comm-fp8": losses(at_the_end=0.002),
}


def test_report_of_finished_runs(config):
    out = begun(config, CURVES)
    result = compare(config)
    assert result.exit_code == 0, result.output
    assert result.output.count("finished before") == 4
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert names == {*("plan.json", "lock", "report.md", "report.json", "report.html")}
    document = json.loads((out / "report.json").read_text())
    found = document["variants"]["ep_comm"]
    assert document["passed"] and found["verdict"] == "passed"
    expected = difference(run_of(CURVES["ep_comm"]), run_of(CURVES["alltoall"]))
    assert found["difference"]["largest"] == expected.largest
    assert [v["seed"] for v in document["variants"].values()] == [7, 8, 7, 7]
    page = (out / "report.md").read_text()
    assert "Within tolerances: ep_comm, ep_comm-fp8." in page
    assert f"| ep_comm | 7 | {found['final_train_loss']:.6f} |" in page
    assert document["command"] in page and "torch" in page
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 2 and "Within tolerances: ep_comm, ep_comm-fp8." in html
    assert f"{found['final_train_loss']:.6f}" in html and "report.html" in result.output


def test_seeds_may_be_added(config):
    low = {"ep_comm": losses(at_the_end=-0.05), "ep_comm-fp8": losses(at_the_end=-0.048)}
    out = begun(config, CURVES | low)
    assert compare(config).exit_code == 3
    document = json.loads((out / "report.json").read_text())
    assert document["variants"]["ep_comm"]["offset"] is None
    assert "lowest first" not in (out / "report.md").read_text()
    write_log(out / "alltoall-seed10", losses(-0.05))
    write_log(out / "alltoall-seed3", losses(-0.02))
    more = f"ep_comm,alltoall-seed10,{VARIANTS},alltoall-seed3"
    result = compare(config, "--variants", more)
    assert result.exit_code == 0, result.output
    document = json.loads((out / "report.json").read_text())
    found = document["variants"]
    seeds = {"alltoall": 7, "alltoall-seed2": 8, "alltoall-seed3": 9, "alltoall-seed10": 16}
    assert {name: found[name]["seed"] for name in list(found)[:4]} == seeds
    assert [found[name]["verdict"] for name in seeds] == ["reference", "noise", "noise", "noise"]
    assert document["noise"]["mean"] == pytest.approx(0.09)
    page = (out / "report.md").read_text()
    assert f"the largest between any two of {', '.join(seeds)}, which differ" in page
    (line,) = (line for line in page.splitlines() if "lowest first" in line)
    assert line.startswith("Signed mean Δ from the mean of the 4 alltoall runs, lowest first: ")
    names = [each.split()[0] for each in line.split("first: ")[1].split(", ")]
    expected = ["alltoall-seed10", "ep_comm", "ep_comm-fp8", "alltoall-seed3"]
    assert names == [*expected, "alltoall", "alltoall-seed2"]


def test_any_variant_may_have_seeds(config):
    begun(config, CURVES)
    out = config.parent / "out"
    write_log(out / "ep_comm-seed2", losses(0.05))
    write_log(out / "ep_comm-fp8-seed2", losses(0.03))
    write_log(out / "ep_comm-fp8-seed3", losses(0.01))
    more = ("ep_comm-fp8-seed3", "ep_comm-fp8-seed2", "ep_comm-seed2")
    result = compare(config, "--variants", ",".join([*more, VARIANTS]))
    assert result.exit_code == 0, result.output
    document = json.loads((out / "report.json").read_text())
    seeds = {name: variant["seed"] for name, variant in document["variants"].items()}
    first, second = {"alltoall": 7, "alltoall-seed2": 8}, {"ep_comm": 7, "ep_comm-seed2": 8}
    fp8 = {"ep_comm-fp8": 7, "ep_comm-fp8-seed2": 8, "ep_comm-fp8-seed3": 9}
    assert list(seeds.items()) == list((first | second | fp8).items())
    verdicts = [document["variants"][name]["verdict"] for name in seeds]
    assert verdicts[2:] == ["passed", "pair", "passed", "pair", "not judged: needs ep_comm-seed3"]
    assert document["pairs"]["ep_comm-fp8"]["seeds"] == [1, 2]
    page = (out / "report.md").read_text()
    assert "ep_comm-fp8: final losses, the mean of all seeds, within 0.50% of those of" in page
    (line,) = (line for line in page.splitlines() if line.startswith("| ep_comm-fp8 | ep_comm |"))
    train = document["pairs"]["ep_comm-fp8"]["final_train"]
    assert f"| {train[0]:+.2%}, {train[1]:+.2%} | {sum(train) / 2:+.2%} ± " in line


def test_an_unclear_pair_is_no_failure(config):
    # 1 % apart, where seeds are 1.3 %
    out = begun(config, {**CURVES, "ep_comm-fp8": losses(0.03)})
    result = compare(config)
    assert result.exit_code == 0 and "unclear" in result.output, result.output
    page = (out / "report.md").read_text()
    assert "* **Worth a look.** Unclear: ep_comm-fp8. More seeds tell.\n" in page
    assert "* **As it should be.** Within tolerances: ep_comm.\n" in page
    assert "add ep_comm-seed2,ep_comm-fp8-seed2 (-seed3, ...) to --variants" in page
    assert json.loads((out / "report.json").read_text())["passed"]


@pytest.mark.parametrize("wrong", ["ep_comm", "ep_comm-fp8"])
def test_outside_tolerances_ends_with_code_3(config, wrong):
    out = begun(config, {**CURVES, wrong: losses(at_the_end=0.2)})
    result = compare(config)
    assert result.exit_code == 3, result.output
    assert "FAILED" in result.output
    assert not json.loads((out / "report.json").read_text())["passed"]
    page = (out / "report.md").read_text()
    (line,) = (line for line in page.splitlines() if "OUTSIDE tolerances: " in line)
    assert line.startswith("* **Failed or in doubt.** ") and wrong in line and "| NO |" in page
    result = compare(config, "--tolerance-noise", 10, "--tolerance-fp8", 0.2)
    assert result.exit_code == 0, result.output


def test_without_the_second_seed_nothing_is_said_of_ep_comm(config):
    begun(config, {name: CURVES[name] for name in ("alltoall", "ep_comm")})
    result = compare(config, "--variants", "ep_comm,alltoall")
    assert result.exit_code == 0, result.output
    assert "Nothing was judged" in (config.parent / "out" / "report.md").read_text()
    assert json.loads((config.parent / "out" / "report.json").read_text())["passed"] is None


def test_equal_losses_are_a_result(config):
    equal = {name: losses() for name in ("alltoall", "ep_comm")}
    out = begun(config, equal)
    result = compare(config, "--variants", "alltoall,ep_comm")
    assert result.exit_code == 0, result.output
    document = json.loads((out / "report.json").read_text())
    assert document["passed"] is True
    assert document["variants"]["ep_comm"]["verdict"] == "bitwise equal"
    page = (out / "report.md").read_text()
    assert "**As it should be.** Bitwise equal to alltoall: ep_comm." in page
    assert "there are no differences to draw" in page
    assert (out / "report.html").read_text().count("<svg") == 1


def test_one_other_bit_is_not_equal(config):
    other = losses()
    other[-1] = np.nextafter(other[-1], 9)
    out = begun(config, {"alltoall": losses(), "ep_comm": other})
    assert compare(config, "--variants", "alltoall,ep_comm").exit_code == 0
    assert "Nothing was judged" in (out / "report.md").read_text()
    assert (out / "report.html").read_text().count("<svg") == 2


def test_fewer_steps_than_the_warm_up(config):
    config.write_text('{"lr_warmup_iters": 20}')
    plan = plan_of(config, steps=20)
    assert plan.flags[-2:] == ("--lr-warmup-iters", "2")
    assert plan.notes == ("lr_warmup_iters is 2 instead of 20: there are but 20 steps",)
    assert plan_of(config, steps=21).flags == ("--train-iters", "21")
    flags = ("--lr-decay-iters", "50")
    assert plan_of(config, *flags, steps=5).flags == (*flags, "--train-iters", "5")


def test_lines_are_of_the_same_steps_however_often_one_looks(config):
    def lines(visits: list[int]) -> list[str]:
        console = Console(file=io.StringIO(), width=200)
        display = Display(console, plan_of(config))
        for seen in visits:
            steps = [
                {"type": "train", "iteration": i, "lm loss": 1.0, "tokens-per-second": 2.0}
                for i in range(1, seen + 1)
            ]
            display.follow("ep_comm", steps)
        return console.file.getvalue().splitlines()

    assert lines([STEPS]) == lines([7, 8, 33, 99, STEPS]) and len(lines([STEPS])) == 10


def test_report_of_fp8_experts_that_were_trained_elsewhere(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = begun(config, {"alltoall": losses()})
    write_log(out / "ep_comm-fp8-experts", losses(0.02))
    write_log(out / "ep_comm-fp8-all", losses(0.021))
    variants = "alltoall,ep_comm-fp8-experts,ep_comm-fp8-all"
    result = compare(config, "--variants", f"{variants},ep_comm-fp8-all-seed2")
    assert result.exit_code == 0, result.output
    assert "ep_comm-fp8-all-seed2 is skipped" in result.output
    assert result.output.count("skipped") == 1
    found = json.loads((out / "report.json").read_text())["variants"]
    assert [v["verdict"] for v in found.values()] == ["reference", "not judged", "passed"]
    page = (out / "report.md").read_text()
    assert "ep_comm-fp8-all: final losses within 0.50% of those of ep_comm-fp8-experts." in page
    result = compare(config, "--variants", "alltoall,ep_comm-fp8-all")
    found = json.loads((out / "report.json").read_text())["variants"]
    assert found["ep_comm-fp8-all"]["verdict"] == "not judged: needs ep_comm-fp8-experts"


def test_a_copied_folder_goes_on_in_another_place(config, tmp_path_factory):
    flags = ["--data-path", "/data/here/text", "--wandb-save-dir", "/here"]
    begun(config, CURVES, plan=plan_of(config, *flags))
    there = tmp_path_factory.mktemp("elsewhere") / "checkout"
    shutil.copytree(config.parents[1], there)
    shutil.rmtree(config.parents[1])
    config = there / "configs" / config.name
    flags = ["--data-path", "/mnt/text", "--wandb-save-dir", "/there"]
    result = compare(config, "--variants", "alltoall,ep_comm", *flags)
    assert result.exit_code == 0, result.output
    assert result.output.count("finished before") == 2
    result = compare(config, "--data-path", "/mnt/other")
    assert result.exit_code == 2
    assert "data_path is ['text'] there and ['other'] here" in result.stderr


def test_runs_with_other_versions_are_pointed_out(config):
    out = begun(config, CURVES)
    log = out / "ep_comm" / LOG_FILE
    log.write_text(log.read_text().replace('"torch": "1"', '"torch": "2"'))
    assert compare(config).exit_code == 0
    page = (out / "report.md").read_text()
    assert "not all trained with the same versions" in page and "torch 1; torch 2" in page


def test_data_is_needed_only_where_something_is_to_be_trained(config):
    flags = ("--data-path", "/nowhere/text")
    begun(config, CURVES, plan=plan_of(config, *flags))
    assert compare(config, *flags).exit_code == 0
    result = compare(config, *flags, "--variants", f"{VARIANTS},ep_comm-seed2")
    assert result.exit_code == 2
    expected = "error: data_path /nowhere/text: no such file, and ep_comm-seed2 is still to be"
    assert result.stderr.startswith(expected)


def test_a_failing_run_ends_with_code_1_and_its_own_words(config):
    result = compare(config, "--variants", "alltoall,ep_comm")
    assert result.exit_code == 1, result.output
    output = config.parent / "out" / "alltoall" / "output.log"
    assert f"error: alltoall ended with code 1; {output} has all it printed:\n" in result.stderr
    assert result.stderr.endswith("error: the sky fell\n")
    assert "step 1\n" in output.read_text()
    # Nothing was trained yet, so that other settings are welcome.
    plan = plan_of(config, "--lr", "3")
    with locked(config.parent / "out"):
        Directory(config.parent / "out", plan)


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--variants", "alltoall,depep"], ["'depep'", "ep_comm-fp8"]),
        (["--variants", "alltoall,alltoall-seed1"], ["'alltoall-seed1'", "-seed2 (-seed3, ...)"]),
        (["--variants", "alltoall,ep_comm-seed1"], ["'ep_comm-seed1'"]),
        (["--variants", "alltoall,alltoall-seed03"], ["'alltoall-seed03'"]),
        (["--variants", "ep_comm,ep_comm-fp8"], ["give alltoall"]),
        (["--variants", "alltoall-seed2,alltoall-seed3"], ["give alltoall"]),
        (["--variants", "alltoall"], ["at least one other"]),
        (["--nproc-per-node", "3"], ["3", "multiple of expert_model_parallel_size 2"]),
        (["--script", "nowhere.py"], ["--script nowhere.py: no such file"]),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml: no such file"]),
        (["--lr", "fast"], ["lr must be a number, got 'fast'"]),
        (["--run-dir", "x"], ["--run-dir", "use --out"]),
        (["--moe-token-dispatcher=ep_comm"], ["--moe-token-dispatcher", "use --variants"]),
        (["--moe-token-dispatcher-type", "ep_comm"], ["-type is what is compared: use --variants"]),
        (["--no-ep-fp8-grad-dispatch"], ["--no-ep-fp8-grad-dispatch", "use --variants"]),
        pytest.param(
            ["--out", sys.executable],
            [f"--out {sys.executable} cannot be used: File exists"],
            id="out",
        ),
    ],
)
def test_refusals(config, flags, words):
    result = compare(config, *flags)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert not (config.parent / "out").exists()


def test_fp8_is_skipped_where_it_cannot_work(config):
    plan = plan_of(config, "--hidden-size", "96")
    assert plan.variants == ("alltoall", "alltoall-seed2", "ep_comm")
    assert "multiple of" in plan.skipped["ep_comm-fp8"] and "96" in plan.skipped["ep_comm-fp8"]


@pytest.mark.parametrize(
    ("support", "flags", "words"),
    [
        (None, [], "need a GPU"),
        ((False, "compute capability 9.0 or higher"), [], "here: compute capability 9.0"),
        ((True, ""), ["--bf16", "1"], "need use_distributed_optimizer"),
        ((True, ""), [], "need bf16 and use_distributed_optimizer"),
        ((True, ""), ["--bf16", "1", "--use-distributed-optimizer", "1"], None),
    ],
)
def test_fp8_experts_are_skipped_where_they_cannot_work(config, monkeypatch, support, flags, words):
    if support is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    else:
        have_fp8(monkeypatch, support)
    plan = plan_of(config, *flags, variants=",".join(ALL_VARIANTS))
    if words is None:
        assert plan.variants == tuple(ALL_VARIANTS) and not plan.skipped
    else:
        assert list(plan.skipped) == ["ep_comm-fp8-experts", "ep_comm-fp8-all"]
        assert all(words in reason for reason in plan.skipped.values())


def test_a_configuration_with_fp8_of_its_own(config):
    config.write_text('{"fp8_format": "e4m3"}')
    with pytest.raises(UserError, match="fp8_format in .*small.yaml is what is compared"):
        plan_of(config)


@pytest.mark.parametrize("key", ["save", "load"])
def test_a_configuration_with_checkpoints_of_its_own(config, key):
    config.write_text(json.dumps({key: "mine"}))
    with pytest.raises(UserError, match=f"{key} in .*small.yaml: every run would have the same"):
        plan_of(config)


def test_a_seed_is_all_that_is_different_of_the_noise(config, tmp_path):
    plan = plan_of(config, variants="alltoall,alltoall-seed3")
    first, third = (plan.command(name, tmp_path, resume=False) for name in plan.variants)
    assert flags_of("alltoall-seed3") == flags_of("alltoall")
    changed = [(a, b) for a, b in zip(first, third, strict=True) if a != b]
    assert changed == [("7", "9")] and third[third.index("9") - 1] == "--seed"


def test_short_runs_may_do_without_checkpoints(config, tmp_path):
    def saving(*flags: str) -> list[str]:
        command = plan_of(config, *flags).command("ep_comm", tmp_path, resume=False)
        return command[command.index("--save-interval") + 1 :][:1] if "--save" in command else []

    assert saving() == [str(STEPS // 10)]
    assert saving("--save-interval", "60") == ["60"]
    assert saving("--save-interval", str(STEPS)) == []


def test_old_names_are_understood(config):
    plan = plan_of(config, variants="deepep-fp8-seed2,alltoall,deepep")
    assert plan.variants == ("alltoall", "ep_comm", "ep_comm-fp8-seed2")
    with pytest.raises(UserError, match="'flex-deepep' is none of"):
        plan_of(config, variants="alltoall,flex-deepep")


def test_folder_of_something_else(config):
    out = config.parent / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    result = compare(config)
    assert result.exit_code == 2 and "holds other things (thesis.tex)" in result.stderr
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_changed_configuration(config):
    out = begun(config, CURVES)
    before = (out / "plan.json").read_bytes()
    result = compare(config, "--lr", "0.2", "--steps", "90", "--nproc-per-node", "4")
    assert result.exit_code == 2
    for change in (
        *("lr is 0.1 there and 0.2 here", "train_iters is 100 there and 90 here"),
        "processes is 2 there and 4 here",
    ):
        assert change in result.stderr
    assert "hidden_size" not in result.stderr
    assert (out / "plan.json").read_bytes() == before


def test_losses_of_any_seed_belong_to_the_configuration(config):
    begun(config, {"alltoall-seed3": losses()})
    result = compare(config, "--lr", "0.2")
    assert result.exit_code == 2 and "lr is 0.1 there and 0.2 here" in result.stderr


def test_two_at_once(config):
    with locked(config.parent / "out"):
        result = compare(config)
    assert result.exit_code == 2
    assert "is in use by process" in result.stderr
