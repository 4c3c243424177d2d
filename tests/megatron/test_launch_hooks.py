"""What the launcher wraps of Megatron's training: checks, scalars, ends, checkpoints."""

from __future__ import annotations

import contextlib
import io
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from launch_runs import need_megatron
from ranks import run_ranks

from ep_comm.errors import EPTimeoutError, EPTooManyTokensError
from ep_comm.megatron import EPOptions
from ep_comm.megatron.balance import LayerBalance, markdown
from ep_comm.megatron.launch import main as launch

need_megatron()


def import_launch_hooks(**global_vars: object) -> ModuleType:
    """Without the rest of Megatron's training."""
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    names = ("get_args", "get_tensorboard_writer", "get_wandb_writer")
    stubs = {
        "megatron.training": ModuleType("megatron.training"),
        "megatron.training.global_vars": SimpleNamespace(
            **{**dict.fromkeys(names, lambda: None), **global_vars}
        ),
    }
    with mock.patch.dict(sys.modules, stubs):
        from ep_comm.megatron.launch import hooks as launch_hooks
    return launch_hooks


def hooks_of_a_loop(rank: int) -> None:
    """A loop of Megatron's, as far as its functions are wrapped."""
    settings = SimpleNamespace(
        tensorboard_dir="x", wandb_project=None, tensorboard_log_interval=2, log_interval=3,
        save=None,
    )  # fmt: skip
    written, done = [], []
    writer = SimpleNamespace(
        add_scalar=lambda *values: written.append(values),
        add_text=lambda *values: written.append(values),
    )
    hooks = import_launch_hooks(get_args=lambda: settings, get_tensorboard_writer=lambda: writer)
    optimizer = SimpleNamespace(step=lambda: done.append("stepped"))
    training = SimpleNamespace(
        __file__="/clone/megatron/training/training.py",
        setup_model_and_optimizer=lambda: (["model"], optimizer, None),
        training_log=lambda losses, iteration: "logged",
        evaluate=lambda: "evaluated",
        save_checkpoint=lambda: None,
    )
    balance = (LayerBalance(3, 2, (5, 0, 2, 1)),)
    meter = mock.Mock(step=mock.Mock(side_effect=[{"ep/x": n} for n in range(9)]), balance=balance)
    names = ("check_model", "MoEMeter", "install", "complete", "tokens_per_rank")
    checked = {name: mock.Mock(return_value=3) for name in names}
    checked["MoEMeter"].return_value = meter
    checked["complete"].return_value = EPOptions(overlap_wgrad=True, max_tokens_per_rank=3)
    gradients = lambda model: done.append(("checked", model))  # noqa: E731
    checked["check_overflow"] = lambda model: done.append(("room", model))
    with mock.patch.multiple(hooks, check_weight_gradients=gradients, **checked):
        hooks.Training(training, "0").use(EPOptions(overlap_wgrad=True))
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            training.setup_model_and_optimizer()
        checked["complete"].assert_called_once_with(max_tokens_per_rank=3)
        checked["check_model"].assert_called_once_with(["model"])
        assert "3 MoE layers on rank 0" in output.getvalue()
        optimizer.step()
        assert done == [("checked", ["model"]), ("room", ["model"]), "stepped"]
        for iteration in (1, 2):
            assert training.training_log({}, iteration) == "logged"
        assert training.evaluate() == "evaluated"
        for iteration in (3, 4):
            training.training_log({}, iteration=iteration)
    # Measured in every step, written in every second; what was evaluated is in neither.
    assert written == [("ep/x", 1, 2), ("ep/balance", markdown(balance), 3), ("ep/x", 4, 4)]
    assert markdown(balance).endswith("| 3 | 1.25 | 2.50 | 0 | 0 | 1 |\n")


def test_the_loop_checks_and_logs_what_it_should():
    run_ranks(1, hooks_of_a_loop, fresh=True)


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)"], ids=["end", "exit"])
def test_a_script_that_ended_well_still_waits_for_its_communication(end, tmp_path, monkeypatch):
    script = tmp_path / "pretrain.py"
    script.write_text(end)
    error = EPTimeoutError(
        op="combine", phase="rows", rank=0, late_ranks=(1,), epoch=3, timeout_s=2.0
    )
    training = SimpleNamespace(options=3, started=True, finish=mock.Mock(side_effect=error))
    monkeypatch.setattr(sys, "argv", ["launch", str(script), "--moe-token-dispatcher", "deepep"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(launch, "_check_megatron", lambda script: "0")
    monkeypatch.setattr(launch, "_hook_megatron", lambda version: training)
    monkeypatch.setattr(launch, "register_optimizer_step_pre_hook", lambda hook: None)
    with pytest.raises(EPTimeoutError):
        launch.main()


def saving_after_an_error(rank: int) -> None:
    launch_hooks = import_launch_hooks()
    saved = []
    others = ("setup_model_and_optimizer", "training_log", "evaluate")
    training = SimpleNamespace(save_checkpoint=saved.append, **dict.fromkeys(others, lambda: None))
    with mock.patch.object(launch_hooks, "install"):
        hooks = launch_hooks.Training(training, "0")
        hooks.use(EPOptions())
    late = EPTimeoutError(
        op="combine", phase="rows", rank=0, late_ranks=(1,), epoch=3, timeout_s=2.0
    )
    assert "or raise --ep-timeout if" in str(late)
    too_many = EPTooManyTokensError(num_tokens=(5, 0), max_tokens=4)
    assert str(too_many).endswith("raise --ep-max-tokens-per-rank")
    with mock.patch.object(launch_hooks, "synchronize_buffers", side_effect=late):
        for call in (lambda: training.save_checkpoint(7), hooks.finish):
            with pytest.raises(EPTimeoutError):
                call()
    assert not saved
    training.save_checkpoint(8)
    hooks.finish()
    assert saved == [8]


def test_nothing_is_saved_after_communication_that_failed():
    run_ranks(1, saving_after_an_error, fresh=True)
