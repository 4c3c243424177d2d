"""examples/pretrain_moe.py: what it learns, that it repeats itself, what its flags do."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")

from example_runs import (  # noqa: E402
    CONFIGS,
    NEW,
    SMALL,
    TINY,
    TINY_STEPS,
    losses,
    records,
    train,
)
from ranks import RankFailure, run_ranks  # noqa: E402

pytestmark = pytest.mark.xdist_group("tiny-cpu")  # whose runs two modules look at


def largest_difference(a: dict[int, float], b: dict[int, float], *, steps: int) -> float:
    return max(abs(a[i] - b[i]) for i in range(1, steps + 1))


@pytest.mark.parametrize("dispatcher", ["alltoall", "ep_comm"])
def test_tiny_cpu_learns(tiny_runs, dispatcher):
    loss = losses(tiny_runs(dispatcher))
    assert len(loss) == TINY_STEPS
    assert loss[1] > 5 and loss[TINY_STEPS] < 3.3


def test_ep_comm_matches_alltoall(tiny_runs):
    ours, theirs = losses(tiny_runs("ep_comm")), losses(tiny_runs("alltoall"))
    assert largest_difference(ours, theirs, steps=10) <= 1e-6
    assert largest_difference(ours, theirs, steps=TINY_STEPS) <= 1e-4


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
    ((train, valid),) = run_ranks(1, tokens_of_each_part, [*SMALL, *data], **NEW)
    assert valid >= 64 and train > 5 * valid
    assert train + valid > sum(sizes) - 3 * 64  # whole sequences only


def tokens_of_each_part(rank: int, flags: list[str]) -> tuple[int, int]:
    from ep_comm.pretrain.flags import parse_args
    from ep_comm.pretrain.start import prepare_megatron

    prepare_megatron()
    from ep_comm.pretrain.data import load_datasets

    _, train, valid = load_datasets(parse_args([*flags, "--expert-model-parallel-size", "1"]))
    return tuple(sum(len(data[i]["tokens"]) for i in range(len(data))) for data in (train, valid))


def first_tokens(rank: int, seeds: list[list[str]]) -> list[list]:
    """Those of the first samples of training and validation, with each of these flags."""
    from ep_comm.pretrain.data import load_datasets
    from ep_comm.pretrain.flags import parse_args

    found = []
    for flags in seeds:
        config = parse_args([*SMALL, "--expert-model-parallel-size", "1", *flags])
        _, train, valid = load_datasets(config)
        found.append([data[i]["tokens"].tolist() for data in (train, valid) for i in range(4)])
    return found


def test_data_seed_alone_decides_the_order_of_the_data():
    seeds = [["--seed", "1"], ["--seed", "2"], ["--seed", "2", "--data-seed", "1"]]
    ((first, second, mixed),) = run_ranks(1, first_tokens, seeds, **NEW)
    assert first != second and first == mixed


def test_ep_comm_repeats_itself(tiny_runs, tmp_path):
    flags = ["--moe-token-dispatcher", "ep_comm", "--train-iters", "5", "--lr-decay-iters", "60"]
    loss = train(tmp_path, *TINY, *flags, "--eval-iters", "0")
    assert largest_difference(loss, losses(tiny_runs("ep_comm")), steps=5) == 0


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
    assert run_ranks(1, options_of_the_layers, flags, **NEW) == [(None, 60)]


def test_a_late_rank_is_waited_for_as_long_as_the_flag_says(tmp_path):
    with pytest.raises(RankFailure, match="waited 1e-06 s .* or raise --ep-timeout if"):
        train(tmp_path / "late", *TINY, "--ep-timeout", "1e-6")
