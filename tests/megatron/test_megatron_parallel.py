"""Our dispatcher against alltoall where the model itself is split: TP, ETP, PP, CP.

Four processes; `megatron_gaps` says what is not Megatron's own here.
"""

from __future__ import annotations

import dataclasses

import pytest
from matrix import few_of
from megatron_cases import CLOSE, SHARED
from megatron_model import Setup, assert_close_runs, assert_same_bits, train
from ranks import run_ranks

pytest.importorskip("megatron.core")


def split(**sizes) -> Setup:
    return Setup(**{"steps": 2, **sizes})


LAYERS = (("num_layers", 4),)
MTP = (("mtp_num_layers", 1),)
PADDED = (("moe_pad_expert_input_to_capacity", True),)
RECOMPUTE_MOE = (("recompute_granularity", "selective"), ("recompute_modules", ["moe"]))

# Equal sizes stand together: another set of process groups costs time.
SPLIT = {
    "tp2_ep2": split(tp=2, ep=2),
    "tp2_ep2_shared_overlapped": split(
        tp=2, ep=2, config=(*SHARED, ("moe_shared_expert_overlap", True))
    ),
    "tp2_ep4": split(tp=2, ep=4, dist_opt=True),
    "tp2_etp2_ep2": split(tp=2, etp=2, ep=2),
    "tp2_etp2_ep2_dropping_recomputed": split(
        tp=2, etp=2, ep=2, config=(*RECOMPUTE_MOE, ("moe_expert_capacity_factor", 0.7))
    ),
    "tp2_etp2_ep2_padded": split(
        tp=2, etp=2, ep=2, config=(*PADDED, ("moe_expert_capacity_factor", 0.7))
    ),
    "cp2_ep4_padded": split(cp=2, ep=4, config=(*PADDED, ("moe_expert_capacity_factor", 1.25))),
    "etp2_ep2": split(etp=2, ep=2, microbatches=2),
    "pp2_ep2": split(pp=2, ep=2, microbatches=4, config=LAYERS),
    "pp2_ep2_recomputed": split(pp=2, ep=2, microbatches=4, config=RECOMPUTE_MOE),
    "pp2_ep2_first_stage_dense": split(pp=2, ep=2, microbatches=3, dense_first=True),
    "pp2_ep2_mtp": split(pp=2, ep=2, microbatches=3, config=MTP),
    "vpp2_pp2_ep2": split(vpp=2, pp=2, ep=2, microbatches=4, config=LAYERS),
    "vpp2_pp2_ep2_mtp": split(
        vpp=2, pp=2, ep=2, microbatches=4, config=(*LAYERS, *MTP, *RECOMPUTE_MOE)
    ),
    "tp2_pp2_ep2": split(tp=2, pp=2, ep=2, microbatches=3),
    "cp2_ep4": split(cp=2, ep=4),
    "tp2_cp2_etp2_ep2": split(tp=2, cp=2, etp=2, ep=2),
}
CLOSE_ETP = dict(rtol=1e-4, atol=1e-4)  # shards' partial sums are added in another order


def run(setup: Setup) -> list[dict]:
    return run_ranks(4, train, setup, pool="megatron")


@pytest.mark.parametrize(
    "feature",
    few_of(
        SPLIT,
        "tp2_etp2_ep2",
        "tp2_etp2_ep2_padded",
        "tp2_ep2_shared_overlapped",
        "vpp2_pp2_ep2_mtp",
        "cp2_ep4",
    ),
)
def test_split_model_trains_like_alltoall(feature):
    setup = SPLIT[feature]
    ours = run(setup)
    losses = ours[-1]["losses"]
    assert len(losses) == setup.steps and losses[-1] < losses[0]
    assert ours[0]["metrics"]["ep/wire-mib"] > 0
    theirs = run(dataclasses.replace(setup, dispatcher="alltoall"))
    assert_close_runs(ours, theirs, CLOSE if setup.etp == 1 else CLOSE_ETP)


def test_split_experts_repeat_themselves_bitwise():
    assert_same_bits(run(SPLIT["tp2_etp2_ep2"]), run(SPLIT["tp2_etp2_ep2"]))


@pytest.mark.parametrize("overlap_grad_reduce", few_of([False, True], True))
@pytest.mark.parametrize(
    "feature",
    few_of(["tp2_etp2_ep2", "tp2_pp2_ep2", "vpp2_pp2_ep2_mtp", "cp2_ep4"], "vpp2_pp2_ep2_mtp"),
)
def test_overlapped_weight_gradients_are_the_same_bits(feature, overlap_grad_reduce):
    setup = dataclasses.replace(SPLIT[feature], overlap_grad_reduce=overlap_grad_reduce)
    overlapped = dataclasses.replace(setup, options=(("overlap_wgrad", True),))
    assert_same_bits(run(setup), run(overlapped))
