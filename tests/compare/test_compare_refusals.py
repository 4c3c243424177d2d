"""``ep-comm compare``: what it refuses, skips, and passes on."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from made_up_comparison import CURVES, STEPS, begun, compare, have_fp8, losses, plan_of

from ep_comm.compare.directory import locked
from ep_comm.compare.plan import VARIANTS as ALL_VARIANTS
from ep_comm.compare.plan import flags_of
from ep_comm.job.exits import UserError


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
