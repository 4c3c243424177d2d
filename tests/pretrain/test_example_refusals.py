"""examples/pretrain_moe.py: requests that it refuses, with one line that says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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
    refused,
    torchrun,
)
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402

from ep_comm.job.exits import UserError  # noqa: E402
from ep_comm.megatron.options import EPOptions  # noqa: E402
from ep_comm.pretrain.flags import parse_args  # noqa: E402
from ep_comm.pretrain.variants import FP8_EXPERTS  # noqa: E402

FUSED_ROUTER = ["--moe-router-fusion", "--use-distributed-optimizer"]
MEGATRONS_OVERLAP = "--overlap-dispatch-backward-with-experts-wgrad"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--moe-token-dispatcher", "deepeep"], ["deepeep", "ep_comm", "alltoall", "allgather"]),
        (["--num-experts", "9"], ["num_experts 9", "expert_model_parallel_size 2"]),
        (["--num-exprts", "8"], ["--num-exprts", "--num-experts"]),
        (["--lr", "fast"], ["lr", "number", "fast"]),
        (["--moe-router-topk", "9"], ["moe_router_topk 9", "num_experts 8"]),
        (["--num-query-groups", "3"], ["num_attention_heads 4", "num_query_groups 3"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--fp8-format", "e5m2"], ["fp8_format", "e4m3", "e5m2"]),
        (["--fp8-param-gather"], ["fp8_param_gather needs fp8_format"]),
        (["--moe-router-padding-for-fp8"], ["moe_router_padding_for_fp8 needs fp8_format"]),
        (
            ["--moe-shared-expert-overlap"],
            ["moe_shared_expert_overlap needs moe_shared_expert_intermediate_size"],
        ),
        (["--overlap-param-gather"], ["overlap_param_gather needs use_distributed_optimizer"]),
        (
            ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
            + ["--cuda-graph-modules", "attn", "--bf16"],
            ["cuda_graph_modules does not go with overlap_param_gather"],
        ),
        (
            ["--overlap-moe-expert-parallel-comm", "--cuda-graph-modules", "attn", "--bf16"],
            ["cuda_graph_modules does not go with overlap_moe_expert_parallel_comm"],
        ),
        (["--cuda-graph-modules", "attn"], ["cuda_graph_modules needs bf16"]),
        (
            ["--ep-overlap-wgrad", "--cuda-graph-modules", "attn", "--bf16"]
            + ["--expert-model-parallel-size", "1"],
            ["ep_overlap_wgrad needs expert_model_parallel_size of 2"],
        ),
        (["--cuda-graph-modules", "router"], ["cuda_graph_modules", "moe_router", "router"]),
        (["--manual-gc-interval", "5"], ["manual_gc_interval needs manual_gc"]),
        (["--recompute-modules", "moe"], ["recompute_modules needs recompute_granularity"]),
        (
            ["--overlap-moe-expert-parallel-comm"],
            ["overlap_moe_expert_parallel_comm needs bf16"],
        ),
        (["--delay-wgrad-compute"], ["needs overlap_moe_expert_parallel_comm"]),
        (
            ["--moe-pad-expert-input-to-capacity"],
            ["moe_pad_expert_input_to_capacity needs moe_expert_capacity_factor"],
        ),
        (["--keep-checkpoints", "2"], ["keep_checkpoints needs save"]),
        (["--load", "x", "--load-despite", "lr"], ["load_despite lr is none of data_path"]),
        (["--adam-beta1", "1.5"], ["adam_beta1", "less than 1", "1.5"]),
        (["--adam-beta2", "1"], ["adam_beta2", "less than 1"]),
        (["--seed", "4294967296"], ["seed", "less than or equal to 2147483647"]),
        (["--ep-num-sms", "1"], ["ep_num_sms must be at least 2", "got 1"]),
        (["--ep-timeout", "1e300"], ["ep_timeout must be", "at most 1e+08"]),
        (["--kv-channels", "3"], ["kv_channels", "even", "got 3"]),
        (
            ["--ep-fp8-dispatch", "--moe-token-dispatcher", "alltoall"],
            ["ep_fp8_dispatch needs moe_token_dispatcher ep_comm, not alltoall"],
        ),
        (
            ["--ep-overlap-wgrad", "--moe-token-dispatcher", "allgather"],
            ["ep_overlap_wgrad needs moe_token_dispatcher ep_comm, not allgather"],
        ),
        (
            [MEGATRONS_OVERLAP, "--moe-token-dispatcher", "alltoall"],
            ["overlap_dispatch_backward_with_experts_wgrad needs moe_grouped_gemm"],
        ),
        (
            [MEGATRONS_OVERLAP, "--moe-grouped-gemm", "--moe-token-dispatcher", "deepep"],
            ["is for Megatron's own dispatchers", "ep_comm use ep_overlap_wgrad"],
        ),
        (
            [*FUSED_ROUTER, *FP8_EXPERTS, "--moe-token-dispatcher", "alltoall"],
            ["moe_router_padding_for_fp8", "--no-moe-router-fusion"],
        ),
    ],
)
def test_bad_flags(flags, words):
    with pytest.raises(UserError) as error:
        parse_args([*TINY, *flags])
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("flag", ["--moe-token-dispatcher", "--moe-token-dispatcher-type"])
@pytest.mark.parametrize("name", ["ep_comm", "deepep"])
def test_both_names_of_our_dispatcher(flag, name):
    config = parse_args([*TINY, flag, name])
    assert config.moe_token_dispatcher == "ep_comm" and config.uses_ep_comm
    assert config.run_dir == Path("runs/tiny-cpu-ep_comm")


def test_a_key_for_each_field_of_the_options():
    options = parse_args([*TINY, "--ep-num-sms", "8", "--ep-timeout", "3", "--ep-fp8-dispatch"])
    assert options.ep_options == EPOptions(
        num_sms=8, timeout_s=3.0, fp8_dispatch=True, max_tokens_per_rank=8 * 128
    )


@pytest.mark.filterwarnings("ignore")  # Megatron's, of what is not installed
@pytest.mark.parametrize(
    ("fields", "has_te", "words"),
    [
        ((), True, "experts-wgrad needs megatron-core 0.18 or newer, this is 0."),
        ((MEGATRONS_OVERLAP,), False, "experts-wgrad needs Transformer Engine 2.8 or newer"),
    ],
    ids=["megatron-core", "transformer-engine"],
)
def test_what_megatrons_overlap_needs(fields, has_te, words, monkeypatch):
    from ep_comm.pretrain import model

    known = {flag.removeprefix("--").replace("-", "_"): False for flag in fields}
    monkeypatch.setattr(model, "TransformerConfig", SimpleNamespace(**known))
    monkeypatch.setattr(model, "is_te_min_version", lambda version: has_te)
    flags = ["--moe-token-dispatcher", "alltoall", "--moe-grouped-gemm"]
    model.check_megatrons_overlap(parse_args([*TINY, *flags]))
    with pytest.raises(UserError, match=words):
        model.check_megatrons_overlap(parse_args([*TINY, *flags, MEGATRONS_OVERLAP]))


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


def test_processes_that_form_no_groups_of_experts(tmp_path):
    error = refused(*TINY, "--run-dir", tmp_path / "run", processes=3).error
    assert "3 processes" in error and "expert_model_parallel_size 2" in error
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus(tmp_path):
    """Refused before the ranks can wait for each other; rank 0 is the slowest one here."""
    script = tmp_path / "script.py"
    script.write_text("""if True:
        import os, time
        import torch
        from ep_comm.job.exits import user_errors_exit
        from ep_comm.job.start import join
        torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
        time.sleep(2 * (os.environ["RANK"] == "0"))
        with user_errors_exit():
            join()
    """)
    assert_refused(torchrun(script=script), "2 processes for 1 GPUs", "--nproc_per_node=1")


def test_all_ranks_stop_when_only_rank_0_can_see_why(tmp_path):
    flags = ["--data-path", tmp_path / "missing.txt", "--run-dir", tmp_path / "run"]
    error = refused(*TINY, *flags).error
    assert "missing.txt" in error and "no such file" in error
    assert not (tmp_path / "run").exists()


def write_pair(prefix: Path) -> None:
    """A sound ``.bin/.idx`` pair: 20 sequences of 100 tokens up to 99; the 18th has a 300."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for sequence in range(20):
        tokens = np.arange(100)
        tokens[50] = 300 if sequence == 17 else 50
        builder.add_document(tokens, [100])
    builder.finalize(f"{prefix}.idx")


def test_bad_data_and_folders(tmp_path):
    """Refused before anything is built or written; one process sees all of these in turn."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "latest_checkpointed_iteration.txt").write_text("6\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "one.txt").write_text("a line\n" * 100)
    (tmp_path / "broken.bin").write_text("x")
    (tmp_path / "broken.idx").write_text("this is no index file")
    (tmp_path / "half.bin").write_text("x")
    (tmp_path / "odd-tokenizer.json").write_text("[]")
    write_pair(tmp_path / "odd")
    for name, suffix in (("high", None), ("cut-idx", ".idx"), ("cut-bin", ".bin")):
        write_pair(tmp_path / name)
        if suffix:
            path = tmp_path / (name + suffix)
            path.write_bytes(path.read_bytes()[:-100])
    cases = {
        "--data-path empty.txt": ["empty.txt", "is empty"],
        "--data-path nothing-*.txt": ["nothing-*.txt", "no such file"],
        "--data-path short.txt": ["6 of 6 tokens", "seq_length + 1 = 65", "--seq-length"],
        "--data-path one.txt --split 10,1": [
            "1 of 11 pieces",
            "61 of 701 tokens",
            "--eval-iters 0",
        ],
        "--data-path short.txt --eval-iters 0": ["1 of 1 pieces", "6 of 6 tokens", "for training"],
        "--data-path broken": ["broken-tokenizer.json", "--vocab-size"],
        "--data-path odd": ["odd-tokenizer.json is no tokenizer", "--vocab-size"],
        "--data-path broken --vocab-size 9": ["broken.idx", "no Megatron index"],
        "--data-path half": ["half.idx", "missing"],
        "--data-path high --vocab-size 300": ["high.bin", "token 300", "--vocab-size 300"],
        "--data-path cut-idx --vocab-size 301": ["cut-idx.idx", "damaged"],
        "--data-path cut-bin --vocab-size 301": ["cut-bin.bin has 3900 bytes", "tells of 4000"],
        "--wandb-project p --wandb-save-dir one.txt/w": ["one.txt/w", "one.txt is no folder"],
        "--load nowhere": ["nowhere", "no checkpoint"],
        "--save taken": ["already holds checkpoints", "iteration 6", "--load"],
        "--save one.txt": ["--save one.txt cannot be written", "File exists"],
        "--save one.txt/below": ["--save one.txt/below cannot be written", "Not a directory"],
        # Refused once the processes' groups are made: one such case at most.
        "--fp8-format e4m3": ["--fp8-format needs a GPU and Transformer Engine; here: no --fp8"],
    }
    before = contents(tmp_path)
    code = """if True:
        import sys
        import torch.distributed as dist
        from ep_comm.megatron import cpu
        cpu.enable()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        from ep_comm.pretrain.flags import parse_args
        from ep_comm.job.exits import UserError
        from ep_comm.pretrain.loop import pretrain
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
        timeout=300,
        cwd=tmp_path,
        env=environment(),
    )
    errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(cases), result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr  # not even one that Python ignores
    for error, (case, words) in zip(errors, cases.items(), strict=True):
        assert all(word in error for word in words), (case, error)
    assert contents(tmp_path) == before


def test_wandb_is_not_installed(tmp_path):
    code = """if True:
        import sys
        sys.modules["wandb"] = None  # what cannot be imported
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        from ep_comm.pretrain.flags import parse_args
        from ep_comm.pretrain.log import check_wandb
        check_wandb(parse_args(sys.argv[1:]))
        check_wandb(parse_args([*sys.argv[1:], "--wandb-project", "p"]))
    """
    result = subprocess.run(
        [sys.executable, "-c", code, *SMALL, "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert "UserError" in result.stderr and "pip install 'ep_comm[wandb]'" in result.stderr
