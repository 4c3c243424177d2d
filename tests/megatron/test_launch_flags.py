"""The launcher's flags beside Megatron's: what they become, and what is refused."""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import pytest
from launch_runs import need_megatron

from ep_comm.errors import EPUnsupportedError
from ep_comm.job.exits import UserError
from ep_comm.megatron import EPOptions
from ep_comm.megatron.launch import main as launch
from ep_comm.megatron.launch.flags import extend_parser, tokens_per_rank, wants_ep_comm
from ep_comm.megatron.options import OPTIONS
from ep_comm.megatron.support import BY_FLAGS

need_megatron()


def megatron_arguments() -> SimpleNamespace:
    """A module like ``megatron.training.arguments``."""

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        for fsdp in ("--use-torch-fsdp2", "--use-megatron-fsdp"):
            parser.add_argument(fsdp, action="store_true")
        for flag in ("--moe-enable-deepep", "--use-checkpoint-args"):
            parser.add_argument(flag, action="store_true")
        for flag in ("--save", "--wandb-project", "--wandb-save-dir", "--ep-of-megatron"):
            parser.add_argument(flag)
        parser.add_argument("--num-experts", type=int)
        parser.add_argument("--moe-expert-rank-capacity-factor", type=float)
        parser.add_argument("--moe-flex-dispatcher-backend", default="deepep")
        types = ("allgather", "alltoall", "flex")
        parser.add_argument("--moe-token-dispatcher-type", choices=types, default="allgather")
        return parser

    return SimpleNamespace(add_megatron_arguments=add_megatron_arguments)


def parse(line: str) -> tuple[dict, list[EPOptions]]:
    used = []
    module = megatron_arguments()
    extend_parser(module, used.append)
    parser = module.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return vars(parser.parse_args(line.split())), used


def stock_parse(line: str) -> dict:
    parser = megatron_arguments().add_megatron_arguments(argparse.ArgumentParser())
    return vars(parser.parse_args(line.split()))


@pytest.mark.parametrize("chosen", ["", "alltoall", "flex", "allgather"])
def test_with_other_dispatchers_nothing_of_ours_is_left(chosen):
    by_type = f"--num-experts 4 --moe-token-dispatcher-type {chosen}" if chosen else ""
    assert parse(by_type) == (stock_parse(by_type), [])
    if chosen:
        by_name = f"--num-experts 4 --moe-token-dispatcher {chosen}"
        assert parse(by_name) == (stock_parse(by_type), [])


@pytest.mark.parametrize(
    "chosen",
    [
        "--moe-token-dispatcher deepep",
        "--moe-token-dispatcher-type=deepep",
        "--moe-token-dispatcher deepep --moe-token-dispatcher-type alltoall",
        "--moe-token-dispatcher=ep_comm",
        "--moe-token-dispatcher-type ep_comm",
        "--moe-token-dispatcher deepep --moe-token-dispatcher-type ep_comm",
    ],
)
def test_ours_is_ep_comm_to_the_reader_and_alltoall_to_megatron(chosen):
    args, used = parse(f"{chosen} --num-experts 4 --ep-of-megatron x --ep-timeout 7")
    assert args["moe_token_dispatcher_type"] == "alltoall"
    assert args["moe_token_dispatcher"] == "ep_comm"
    assert used == [EPOptions(timeout_s=7.0)]
    assert wants_ep_comm(chosen.split()) and not wants_ep_comm("--lr deepep".split())
    assert not wants_ep_comm("--moe-token-dispatcher flex --load ep_comm".split())


def test_every_option_has_its_flag():
    line = "--moe-token-dispatcher deepep --num-experts 4 --ep-fp8-dispatch --ep-overlap-wgrad "
    line += "--ep-num-sms 24 --ep-timeout 5 --ep-expert-alignment 32 --ep-max-tokens-per-rank 9 "
    line += "--ep-fp8-grad-dispatch --ep-capacity-factor 1.5 --ep-overflow error "
    line += "--ep-device-counts"
    args, used = parse(line)
    options = EPOptions(
        fp8_dispatch=True,
        fp8_grad_dispatch=True,
        overlap_wgrad=True,
        num_sms=24,
        timeout_s=5.0,
        expert_alignment=32,
        max_tokens_per_rank=9,
        capacity_factor=1.5,
        overflow="error",
        device_counts=True,
    )
    assert used == [options]
    assert {each.name: args[each.key] for each in OPTIONS} == vars(options)


@pytest.mark.parametrize("also", ["", " --ep-capacity-factor 1.25"])
def test_megatrons_capacity_of_a_rank_is_taken_and_cleared(also):
    args, used = parse(f"{OURS} --moe-expert-rank-capacity-factor 1.25{also}")
    assert used == [EPOptions(capacity_factor=1.25)]
    assert args["ep_capacity_factor"] == 1.25 and args["moe_expert_rank_capacity_factor"] is None
    stock = "--moe-token-dispatcher flex --moe-expert-rank-capacity-factor 1.25"
    assert parse(stock)[0]["moe_expert_rank_capacity_factor"] == 1.25


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ({}, 3 * 1000),
        (dict(tensor_model_parallel_size=2), 3 * 1000),  # each has the whole sequence
        (dict(tensor_model_parallel_size=2, sequence_parallel=True), 3 * 500),
        (dict(context_parallel_size=4), 3 * 250),
        (dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=4), 375),
        (dict(tensor_model_parallel_size=7, sequence_parallel=True), 429),
        (dict(eval_micro_batch_size=5), 5 * 1000),
        (dict(eval_micro_batch_size=2), 3 * 1000),
        (dict(decoder_seq_length=1500), 3 * 1500),
        (dict(decoder_seq_length=100), 3 * 1000),
        (dict(seq_length=None), None),
        (dict(variable_seq_lengths=True), None),
        (dict(hybrid_context_parallel=True), None),
        (dict(perform_rl_step=True), None),
    ],
)
def test_tokens_of_a_rank_by_megatrons_arguments(arguments, tokens):
    settings = dict(micro_batch_size=3, seq_length=1000, context_parallel_size=1)
    settings |= dict(tensor_model_parallel_size=1, sequence_parallel=False)
    assert tokens_per_rank(argparse.Namespace(**{**settings, **arguments})) == tokens


OURS = "--moe-token-dispatcher deepep --num-experts 4"
UNSUPPORTED = [
    (f"{OURS} --moe-enable-deepep", "--moe-enable-deepep: it asks for"),
    (
        f"{OURS} --moe-flex-dispatcher-backend hybridep",
        "--moe-flex-dispatcher-backend (hybridep): it belongs to",
    ),
    (f"{OURS} --use-torch-fsdp2", "FSDP (--use-megatron-fsdp, --use-torch-fsdp2)"),
    (f"{OURS} --use-megatron-fsdp", "FSDP (--use-megatron-fsdp, --use-torch-fsdp2)"),
]


@pytest.mark.parametrize(("line", "message"), UNSUPPORTED)
def test_flags_that_do_not_go_with_ours_are_refused(line, message):
    with pytest.raises(EPUnsupportedError) as caught:
        parse(line)
    assert str(caught.value).startswith(f"ep_comm does not support {message}")


def test_every_refusal_of_a_flag_is_tested():
    for refusal in BY_FLAGS:
        assert any(message.startswith(refusal.what) for _, message in UNSUPPORTED), refusal.what


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{OURS} --moe-token-dispatcher-type flex", "--moe-token-dispatcher-type flex"),
        (f"{OURS} --moe-token-dispatcher-type allgather", "contradict each other"),
        ("--moe-token-dispatcher flex --moe-token-dispatcher-type alltoall", "contradict"),
        ("--ep-num-sms 8 --ep-timeout 3", "--ep-num-sms, --ep-timeout: only with"),
        ("--moe-token-dispatcher alltoall --ep-fp8-dispatch", "--ep-fp8-dispatch: only with"),
        (
            "--moe-token-dispatcher ep_comm --moe-token-dispatcher-type flex",
            "--moe-token-dispatcher ep_comm and --moe-token-dispatcher-type flex contradict",
        ),
        (
            f"{OURS} --ep-timeout -1",
            "timeout_s must be a positive number of seconds, at most 1e+08, got -1",
        ),
        (f"{OURS} --ep-num-sms 1", "num_sms must be at least 2"),
        (f"{OURS} --ep-capacity-factor 0.9", "capacity_factor must be at least 1, got 0.9"),
        (
            f"{OURS} --ep-capacity-factor 1.5 --moe-expert-rank-capacity-factor 1.25",
            "--ep-capacity-factor 1.5 and --moe-expert-rank-capacity-factor 1.25 contradict",
        ),
        ("--moe-token-dispatcher deepep", "needs --num-experts"),
        (f"{OURS} --ep-capture-routing {__file__}/x", f"--ep-capture-routing {__file__}/x cannot"),
        (f"{OURS} --wandb-project p", "--wandb-save-dir"),
        (f"{OURS} --wandb-project p --save {__file__}", "--save: W&B cannot write"),
        (f"{OURS} --wandb-project p --wandb-save-dir {__file__}/x", "--wandb-save-dir: W&B"),
    ],
)
def test_flags_that_cannot_be_are_refused(line, message):
    with pytest.raises(UserError) as caught:
        parse(line)
    assert message in str(caught.value)


def test_only_the_node_of_the_last_rank_needs_the_wandb_dir(monkeypatch):
    line = f"{OURS} --wandb-project p --wandb-save-dir {__file__}/x"
    for name, value in (("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", 4), ("RANK", 3)):
        monkeypatch.setenv(name, str(value))
    assert len(parse(line)[1]) == 1
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(UserError):
        parse(line)


def test_help_needs_no_megatron(monkeypatch, capsys):
    for arguments in (["--help"], []):
        monkeypatch.setattr(sys, "argv", ["launch", *arguments])
        with pytest.raises(SystemExit) as exit:
            launch.main()
        assert exit.value.code == 0
        text = capsys.readouterr().out
        for flag in ("--moe-token-dispatcher", "--ep-num-sms", "--ep-timeout", "srun"):
            assert flag in text


def test_the_script_comes_first(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch", "--ep-num-sms", "8", "pretrain_gpt.py"])
    with pytest.raises(SystemExit) as exit:
        launch.main()
    assert exit.value.code == 2 and "the script comes first" in capsys.readouterr().err
