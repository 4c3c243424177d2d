"""``ep-comm compare``: what it reports of runs that are finished, on made-up logs."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import torch
from made_up_comparison import (
    CURVES,
    STEPS,
    VARIANTS,
    begun,
    compare,
    losses,
    plan_of,
    run_of,
    write_log,
)
from rich.console import Console

from ep_comm.compare.directory import Directory, locked
from ep_comm.compare.progress import Display
from ep_comm.compare.statistics import difference
from ep_comm.pretrain.log_file import LOG_FILE


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
