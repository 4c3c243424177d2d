"""Dispatch and combine on real processes, bit by bit against a loop over tokens."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from buffer_cases import (
    CASES,
    changing_config,
    changing_on_reference,
    changing_operations,
    check_case,
    on_gpus,
    random_case,
)
from cases import Case
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from ep_comm import Buffer, EPConfig, backends
from ep_comm.backends.nvlink.farewell import Farewell
from ep_comm.backends.reference.backend import ReferenceBackend


@pytest.mark.parametrize("case", CASES)
def test_named_cases(case):
    check_case(case)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "nvlink"])
@pytest.mark.parametrize("case", CASES[:1])
def test_named_cases_on_one_gpu(case, backend):
    check_case(on_gpus(case, backend))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("backend", ["reference", "nvlink"])
@pytest.mark.parametrize("case", CASES[1:])
def test_named_cases_on_gpus(case, backend):
    if case.num_ranks > torch.cuda.device_count():
        pytest.skip(f"needs {case.num_ranks} GPUs, this machine has {torch.cuda.device_count()}")
    check_case(on_gpus(case, backend))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("seed", range(40))
def test_random_cases_on_gpus(seed):
    check_case(random_case(seed, (2, torch.cuda.device_count())))


def made_in_inference_mode(rank: int) -> list[int]:
    """What stands in memory of a buffer that was made in inference mode and destroyed outside."""
    flags: list[torch.Tensor] = []

    class Backend(ReferenceBackend):
        @classmethod
        def create(cls, *args: Any) -> ReferenceBackend:
            flags.append(torch.zeros(2, dtype=torch.int32))
            return super().create(*args)

        def destroy(self) -> None:
            Farewell(0, flags).say()  # as over NVLink
            super().destroy()

    config = EPConfig(num_experts=1, hidden=16, max_tokens_per_rank=1, num_topk=1)
    with mock.patch.object(backends, "BACKENDS", (Backend,)), torch.inference_mode():
        buffer = Buffer(None, config)
    buffer.destroy()
    return flags[0].tolist()


def test_a_buffer_that_was_made_in_inference_mode_is_destroyed_outside():
    assert run_ranks(1, made_in_inference_mode) == [[1, 0]]


def dropped(rank: int, num_bytes: int, destroyed: str) -> tuple[list[str], bool]:
    """The warnings, and whether the backend is still there."""
    config = EPConfig(num_experts=1, hidden=16, max_tokens_per_rank=1, num_topk=1)
    with (
        mock.patch.object(ReferenceBackend, "buffer_bytes", num_bytes),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        buffer = Buffer(None, config)
        backend = weakref.ref(buffer._session.backend)
        if destroyed == "interrupted":
            with (
                mock.patch.object(ReferenceBackend, "destroy", side_effect=KeyboardInterrupt),
                contextlib.suppress(KeyboardInterrupt),
            ):
                buffer.destroy()
        elif destroyed == "yes":
            buffer.destroy()
        del buffer
        gc.collect()
    return [str(each.message) for each in warned], backend() is not None


@pytest.mark.parametrize("destroyed", ["no", "interrupted"])
def test_memory_of_a_buffer_that_is_dropped_is_kept_with_a_warning(destroyed):
    warned, is_kept = run_ranks(1, dropped, 64, destroyed)[0]
    assert is_kept and warned == [
        "a Buffer was dropped without destroy(): its memory is kept until the process ends"
    ]


@pytest.mark.parametrize(("num_bytes", "destroyed"), [(0, "no"), (64, "yes")])
def test_what_has_no_memory_or_was_destroyed_is_not_kept(num_bytes, destroyed):
    assert run_ranks(1, dropped, num_bytes, destroyed) == [([], False)]


@st.composite
def cases(draw) -> Case:
    num_ranks = draw(st.sampled_from([1, 2, 3, 4]))
    experts_per_rank = draw(st.integers(1, 5))
    return Case(
        tokens=tuple(draw(st.integers(0, 12)) for _ in range(num_ranks)),
        experts_per_rank=experts_per_rank,
        num_topk=draw(st.integers(1, min(8, num_ranks * experts_per_rank))),
        hidden=draw(st.sampled_from([1, 3, 8, 40, 128])),
        dtype=draw(st.sampled_from(["bf16", "fp16", "fp32"])),
        layout=draw(st.sampled_from(["expert", "rank"])),
        alignment=draw(st.sampled_from([1, 2, 16])),
        ranks_per_node=draw(st.sampled_from([n for n in (1, 2, 4) if num_ranks % n == 0] + [None])),
        routing=draw(st.sampled_from(["uniform", "zipf", "last_rank", "one_expert"])),
        drop=draw(st.sampled_from([0.0, 0.3, 1.0])),
        idx_dtype=draw(st.sampled_from(["int32", "int64"])),
        as_routing_map=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@example(Case(tokens=(12, 0, 12), num_topk=3, experts_per_rank=1, drop=1.0))
@given(cases())
def test_any_case(case):
    print(f"case: {case}")
    check_case(case)


def changing_on_nvlink(
    rank: int, num_operations: int, delay_us: int, beside_nccl: bool
) -> list[str]:
    config = changing_config(dist.get_world_size(), "nvlink")
    buffer = Buffer(None, config)
    buffer._session.backend.inject_delays(1000 * delay_us)
    traffic, nccl_stream = torch.ones(2**20, device="cuda"), torch.cuda.Stream()
    nccl_group = dist.new_group(backend="nccl") if beside_nccl else None

    def reduce_beside() -> None:
        with torch.cuda.stream(nccl_stream):
            dist.all_reduce(traffic, op=dist.ReduceOp.MAX, group=nccl_group)

    all_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    sms = [*(few for few in (2, 5, 16, 24) if few < all_sms), all_sms]
    beside = reduce_beside if beside_nccl else lambda: None
    digests = changing_operations(rank, buffer, num_operations, "cuda", sms, beside)
    buffer.destroy()
    again = Buffer(None, config)
    assert changing_operations(rank, again, 1, "cuda") == digests[:2]
    again.destroy()
    return digests


def check_changing_operations(
    num_ranks: int,
    num_operations: int,
    delay_us: int = 0,
    beside_nccl: bool = False,
    **how_to_run: Any,
) -> None:
    """As the reference backend on CPU; if asked for, with every wait and signal late, and with NCCL
    at work on a stream of its own."""
    args = (num_operations, delay_us, beside_nccl)
    got = run_ranks(num_ranks, changing_on_nvlink, *args, backend="nccl", **how_to_run)
    assert got == run_ranks(num_ranks, changing_on_reference, num_operations, timeout_s=240)


def test_changing_operations_twice():
    assert run_ranks(8, changing_on_reference, 6) == run_ranks(8, changing_on_reference, 6)


@pytest.mark.multi_gpu
def test_a_thousand_changing_operations():
    check_changing_operations(torch.cuda.device_count(), 340, timeout_s=240)


@pytest.mark.multi_gpu
def test_changing_operations_with_delays():
    check_changing_operations(torch.cuda.device_count(), 60, delay_us=200, timeout_s=240)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("connections", [1, 8, 32])
def test_changing_operations_beside_nccl(connections, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", str(connections))
    check_changing_operations(2, 60, delay_us=50, beside_nccl=True, fresh=True, timeout_s=240)
