"""The example with parts of its layers in CUDA graphs: on one GPU, with Transformer Engine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")

from example_runs import losses  # noqa: E402
from ranks import run_ranks  # noqa: E402

from ep_comm.pretrain.graphs import WARMUP_STEPS  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
    ),
]

LAST, SAVED = 2 * WARMUP_STEPS + 4, WARMUP_STEPS + 2  # the second run is graphed before it ends
MODEL = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --num-experts 8 "
    "--moe-ffn-hidden-size 128 --moe-grouped-gemm --moe-permute-fusion --moe-router-fusion "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --lr-decay-iters 20 --bf16 "
    "--use-distributed-optimizer --overlap-grad-reduce --eval-iters 0"
).split()
GRAPHS = ["--cuda-graph-modules", "attn", "moe_router", "moe_preprocess"]


def train(run_dir: Path, *flags: object) -> dict[int, float]:
    words = [*MODEL, *map(str, flags), "--run-dir", str(run_dir)]
    run_ranks(1, pretrain, words, timeout_s=240, fresh=True, backend="nccl")
    return losses(run_dir)


def pretrain(rank: int, flags: list[str]) -> None:
    os.environ["NCCL_GRAPH_REGISTER"] = "0"  # as `ep_comm.pretrain.start.join` does
    from ep_comm.pretrain.start import prepare_megatron

    prepare_megatron()
    from ep_comm.pretrain.flags import parse_args
    from ep_comm.pretrain.loop import pretrain as train_on_all_ranks

    train_on_all_ranks(parse_args(flags))


@pytest.mark.parametrize("counts", ["host", "device"])
def test_graphs_train_as_without_them(tmp_path, counts):
    flags = ["--ep-capacity-factor", 2, "--ep-device-counts"] if counts == "device" else []
    flags += ["--data-cache-path", tmp_path / "cache"]
    plain = train(tmp_path / "plain", *flags, "--train-iters", LAST)
    folder = tmp_path / "checkpoints"
    graphed = [*flags, *GRAPHS, "--save", folder]
    whole = train(tmp_path / "graphs", *graphed, "--save-interval", SAVED, "--train-iters", LAST)
    print(f"{counts}: without {plain}\nwith {whole}")
    assert whole == pytest.approx(plain, abs=2e-3) and len(whole) == LAST
    latest = folder / "latest_checkpointed_iteration.txt"
    latest.write_text(str(SAVED))
    resumed = train(tmp_path / "resumed", *graphed, "--load", folder, "--train-iters", LAST)
    print(f"resumed {resumed}")
    assert set(resumed) == set(range(SAVED + 1, LAST + 1))
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=2e-3)
