"""Weight gradients beside communication: the bits of a training without, also with frozen parts."""

from __future__ import annotations

import dataclasses

import pytest
from megatron_cases import CLOSE, FEATURES, RECOMPUTE_FULL, run
from megatron_model import Setup, assert_close_runs, assert_same_bits, train
from ranks import RankFailure, run_ranks

pytest.importorskip("megatron.core")


@pytest.mark.parametrize("overlap_grad_reduce", [False, True])
@pytest.mark.parametrize(
    "feature", ["aux_loss", "gradient_accumulation", "recompute_moe", "padded_to_capacity"]
)
def test_overlapped_weight_gradients_are_the_same_bits(feature, overlap_grad_reduce):
    setup = dataclasses.replace(FEATURES[feature], overlap_grad_reduce=overlap_grad_reduce)
    plain = run(setup)
    overlapped = run(dataclasses.replace(setup, options=(("overlap_wgrad", True),)))
    assert_same_bits(plain, overlapped)


FROZEN = {
    "router": r"router",
    "all_but_experts": r"^(?!.*experts)",  # the first dispatch has no backward
    "all_but_the_last_experts": r"^(?!.*layers\.1\.mlp\.experts)",
    "experts": r"experts",
    "one_expert": r"local_experts\.1\.",
    "all_but_one_expert": r"^(?!.*local_experts\.1\.)",
    "first_linear_layers": r"linear_fc1",
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_overlapped_weight_gradients_where_parts_are_frozen(frozen):
    setup = Setup(frozen=FROZEN[frozen], microbatches=2, overlap_grad_reduce=True)
    ours = run(dataclasses.replace(setup, options=(("overlap_wgrad", True),)))
    assert ours[0]["gradients"]
    assert_close_runs(ours, run(dataclasses.replace(setup, dispatcher="alltoall")), CLOSE)


def test_overlapped_weight_gradients_where_parts_are_frozen_and_recomputed():
    """Megatron's recomputation needs something trainable before it, as with alltoall."""
    setup = Setup(frozen=r"^(?!.*(experts|embedding))", config=RECOMPUTE_FULL)
    ours = run(dataclasses.replace(setup, options=(("overlap_wgrad", True),)))
    assert_close_runs(ours, run(dataclasses.replace(setup, dispatcher="alltoall")), CLOSE)


def test_overlap_without_ddps_part_is_refused():
    with pytest.raises(RankFailure, match="delay_wgrad_compute=True"):
        run_ranks(2, train_with_plain_ddp, fresh=True, pool="megatron")


def train_with_plain_ddp(rank: int) -> None:
    import ep_comm.megatron.cpu

    ep_comm.megatron.cpu.enable()
    from megatron.core.distributed import DistributedDataParallelConfig

    original = DistributedDataParallelConfig.__init__

    def forget(self, *args, **kwargs):
        original(self, *args, **{**kwargs, "delay_wgrad_compute": False})

    DistributedDataParallelConfig.__init__ = forget
    train(rank, Setup(options=(("overlap_wgrad", True),)))
