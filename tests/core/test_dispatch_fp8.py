"""FP8 on the wire: given as FP8, or quantised on the way; received as FP8 or dequantised."""

from __future__ import annotations

import dataclasses

import pytest
from cases import Case
from fp8_cases import CASE, check_fp8_results, dispatch_all_ways
from ranks import run_ranks


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("tokens", [CASE.tokens, (6, 0, 9, 3, 1, 12, 4, 2)])
def test_fp8_payload(tokens, layout):
    check_fp8(dataclasses.replace(CASE, tokens=tokens, layout=layout))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("backend", ["reference", "nvlink"])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_fp8_payload_on_gpus(layout, backend):
    case = dataclasses.replace(
        CASE, layout=layout, backend=backend, device="cuda", tokens=(90, 41), hidden=1024
    )
    check_fp8(case)


def check_fp8(case: Case) -> None:
    backend = "gloo" if case.device == "cpu" else "nccl"
    check_fp8_results(case, run_ranks(case.num_ranks, dispatch_all_ways, case, backend=backend))
