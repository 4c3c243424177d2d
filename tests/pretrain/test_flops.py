"""Operations of a training step, against a count of the model's parameters."""

from __future__ import annotations

import pytest

pytest.importorskip("pydantic")

from example_runs import TINY  # noqa: E402

from ep_comm.pretrain.flags import parse_args  # noqa: E402
from ep_comm.pretrain.flops import flops_per_token, peak_tflops  # noqa: E402


def test_six_operations_for_each_parameter_that_a_token_passes():
    config = parse_args([*TINY, "--num-query-groups", "2", "--kv-channels", "16"])
    layer = 128 * 64 * 2 + 128 * 32 * 2  # queries and output, keys and values
    layer += 2 * 3 * 128 * 128  # two experts
    parameters = 2 * layer + 128 * 384
    triangle = 2 * 6 * 64 * 128  # 4 heads of 16; scores and values, half of 128 x 128 each
    assert flops_per_token(config, 384) == 6 * parameters + triangle


def test_a_shared_expert_counts_for_every_token():
    plain = flops_per_token(parse_args(TINY), 384)
    shared = parse_args([*TINY, "--moe-shared-expert-intermediate-size", "100"])
    assert flops_per_token(shared, 384) - plain == 6 * 2 * 3 * 128 * 100


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GB200", 2500),
        ("NVIDIA T4", None),
    ],
)
def test_peaks(name, peak):
    assert peak_tflops(name) == peak
