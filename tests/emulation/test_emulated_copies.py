"""Copy engines as the wire, with kernels and copies run on the CPU: no GPU is needed."""

from __future__ import annotations

import dataclasses

import pytest
from cases import Case
from copy_engine_cases import (
    capacity_on_buffer,
    check_dense_bytes,
    fp8_on_buffer,
    run_on_buffer,
)
from emulated_ranks import run_emulated_ranks
from test_buffer import check_results
from test_dispatch_fp8 import CASE as FP8_CASE
from test_dispatch_fp8 import check_fp8_results

BY_COPY = dict(wire="copy-engine", timeout_s=60)
# More than 32 tokens, so that there are several chunks; a rank without any.
CASES = [
    Case(tokens=(77, 5)),
    Case(tokens=(150, 0, 41), num_topk=5, layout="rank", dtype="fp32"),
    Case(tokens=(70, 33, 131, 0), num_topk=6, experts_per_rank=2, drop=0.2, as_routing_map=True),
    Case(tokens=(64, 40), num_topk=3, ranks_per_node=1, dtype="fp16", alignment=16),
]


@pytest.mark.parametrize("delay_us", [0, 300])
@pytest.mark.parametrize("case", CASES)
def test_operations(library, case, delay_us):
    results = run_emulated_ranks(
        library, case.num_ranks, run_on_buffer, case.config(**BY_COPY), case, delay_us=delay_us
    )
    check_results(case, results, check_dense_bytes)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_fp8(library, layout):
    case = dataclasses.replace(FP8_CASE, layout=layout, tokens=(70, 41), hidden=512)
    results = run_emulated_ranks(library, 2, fp8_on_buffer, case.config(**BY_COPY), case)
    check_fp8_results(case, results)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_outputs_of_a_given_size(library, layout):
    case = Case(tokens=(70, 9), num_topk=3, hidden=128, layout=layout)
    run_emulated_ranks(library, 2, capacity_on_buffer, case.config(**BY_COPY), case)
