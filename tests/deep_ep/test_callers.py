"""What programs call: each of their calls binds to our signatures, and what they import is there.

Read from vLLM 0.33.0 (its files `all2all.py`, `deepep_ht.py`, `deepep_ll.py`, `deepep_v2.py`),
SGLang 0.5.23 (`token_dispatcher/deepep.py`, `deepep_v2.py`) and Megatron-Core 0.16.1
(`fused_a2a.py`), in our own words.
"""  # noqa: D205

from __future__ import annotations

import importlib
import inspect
from typing import NamedTuple

import pytest

from ep_comm import deep_ep

Buffer = deep_ep.Buffer
_STREAMS = "previous_event async_finish allocate_on_comm_stream"
_LAYOUT = (
    "num_tokens_per_rank num_tokens_per_rdma_rank is_token_in_rank num_tokens_per_expert "
    "topk_idx topk_weights"
)


class Call(NamedTuple):
    """`positional` arguments without a name, then those of `named`, parted by spaces."""

    name: str
    positional: int = 0
    named: str = ""


CALLS = {
    "vLLM, high throughput": [
        Call(
            "Buffer",
            0,
            "group num_nvl_bytes num_rdma_bytes low_latency_mode num_qps_per_rank "
            "explicitly_destroy",
        ),
        Call("set_num_sms", 1),
        Call("get_dispatch_config", 1),
        Call("get_combine_config", 1),
        Call("capture"),
        Call("get_dispatch_layout", 0, f"topk_idx num_experts {_STREAMS}"),
        Call("dispatch", 0, f"x handle {_LAYOUT} expert_alignment config {_STREAMS}"),
        Call("combine", 0, f"x handle topk_weights config {_STREAMS}"),
        Call("destroy"),
    ],
    "vLLM, low latency": [
        Call(
            "Buffer",
            0,
            "group num_nvl_bytes num_rdma_bytes low_latency_mode num_qps_per_rank "
            "allow_nvlink_for_low_latency_mode allow_mnnvl explicitly_destroy enable_shrink",
        ),
        Call(
            "get_low_latency_rdma_size_hint",
            0,
            "num_max_dispatch_tokens_per_rank hidden num_ranks num_experts",
        ),
        Call(
            "low_latency_dispatch",
            4,
            "use_fp8 round_scale use_ue8m0 async_finish return_recv_hook",
        ),
        Call("low_latency_combine", 4, "async_finish zero_copy return_recv_hook out"),
        Call("low_latency_query_mask_buffer", 1),
        Call("low_latency_clean_mask_buffer"),
        Call("get_local_buffer_tensor", 0, "dtype use_rdma_buffer"),
        Call("destroy"),
    ],
    "SGLang": [
        Call("Buffer", 3, "low_latency_mode num_qps_per_rank allow_mnnvl"),
        Call(
            "Config",
            0,
            "num_sms num_max_nvl_chunked_send_tokens num_max_nvl_chunked_recv_tokens "
            "num_max_rdma_chunked_send_tokens num_max_rdma_chunked_recv_tokens",
        ),
        Call("get_dispatch_config", 1),
        Call("get_combine_config", 1),
        Call("get_low_latency_rdma_size_hint", 4),
        Call("clean_low_latency_buffer", 3),
        Call("capture"),
        Call("get_dispatch_layout", 2, _STREAMS),
        Call("dispatch", 1, f"{_LAYOUT} expert_alignment config {_STREAMS}"),
        Call("combine", 2, f"config {_STREAMS}"),
        Call(
            "low_latency_dispatch",
            4,
            "use_fp8 round_scale use_ue8m0 async_finish return_recv_hook",
        ),
        Call(
            "low_latency_combine",
            0,
            "x topk_idx topk_weights handle async_finish return_recv_hook",
        ),
    ],
    "Megatron-Core": [
        Call("Buffer", 3),
        Call("set_num_sms", 1),
        Call("get_dispatch_config", 1),
        Call("get_combine_config", 1),
        Call("get_dispatch_layout", 2, _STREAMS),
        Call("dispatch", 1, f"{_LAYOUT} {_STREAMS}"),
        Call("dispatch", 1, f"handle {_STREAMS}"),
        Call("combine", 1, f"handle {_STREAMS}"),
        Call("combine", 2, f"topk_weights {_STREAMS}"),
    ],
}
V2_CALLS = {
    "vLLM": [
        Call(
            "ElasticBuffer",
            0,
            "group num_max_tokens_per_rank hidden num_topk use_fp8_dispatch allow_hybrid_mode "
            "prefer_overlap_with_compute allow_multiple_reduction explicitly_destroy",
        ),
        Call("get_theoretical_num_sms", 0, "num_experts num_topk"),
        Call(
            "dispatch",
            0,
            "x topk_idx topk_weights num_experts num_max_tokens_per_rank do_expand do_cpu_sync "
            "async_with_compute_stream",
        ),
        Call(
            "combine",
            0,
            "x handle topk_weights async_with_compute_stream allocate_on_comm_stream",
        ),
        Call("destroy"),
    ],
    "SGLang": [
        Call(
            "ElasticBuffer",
            1,
            "num_max_tokens_per_rank hidden num_topk use_fp8_dispatch allow_hybrid_mode sl_idx "
            "prefer_overlap_with_compute",
        ),
        Call(
            "dispatch",
            1,
            "topk_idx topk_weights num_experts num_max_tokens_per_rank expert_alignment num_sms "
            "use_tma_aligned_col_major_sf do_cpu_sync do_expand",
        ),
        Call("combine", 1, "handle topk_weights"),
    ],
}
# Those of DeepEP's other branches, which a switch of the caller's asks for: refused as unknown.
REFUSED = [
    Call("low_latency_dispatch", 4, "use_nvfp4"),
    Call("low_latency_dispatch", 4, "x_global_scale"),
    Call("low_latency_combine", 4, "overlap"),
    Call("low_latency_combine", 4, "packed_recv_count comp_signal block_m threshold num_sms"),
]
IMPORTS = {
    "deep_ep": ["Buffer", "Config", "EPHandle", "ElasticBuffer", "EventOverlap", "topk_idx_t"],
    "deep_ep.utils": ["EventHandle", "EventOverlap"],
    "deep_ep.buffer": ["Buffer"],
}
# Programs ask whether these are there, and do without.
ABSENT = ["HybridEPBuffer"]
# Read by callers; `Config` has its own.
ATTRIBUTES = ["group", "group_size", "num_nvl_bytes", "num_rdma_bytes", "low_latency_mode"]


def bind(call: Call, of: type = Buffer) -> None:
    owner = deep_ep if hasattr(deep_ep, call.name) else of
    function = getattr(owner, call.name)
    is_method = owner is of and not isinstance(inspect.getattr_static(of, call.name), staticmethod)
    arguments = [None] * (call.positional + is_method)
    inspect.signature(function).bind(*arguments, **dict.fromkeys(call.named.split()))


@pytest.mark.parametrize("caller", CALLS)
def test_calls_bind(caller):
    for call in CALLS[caller]:
        bind(call)


@pytest.mark.parametrize("caller", V2_CALLS)
def test_calls_of_v2_bind(caller):
    for call in V2_CALLS[caller]:
        bind(call, deep_ep.ElasticBuffer)


@pytest.mark.parametrize("call", REFUSED, ids=lambda call: call.named.split()[0])
def test_calls_of_other_branches_do_not(call):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        bind(call)


def test_names():
    for module, names in IMPORTS.items():
        for ours in (module.replace("deep_ep", folder) for folder in FOLDERS):
            assert not [name for name in names if not hasattr(importlib.import_module(ours), name)]
    assert not [name for name in ABSENT if hasattr(deep_ep, name)]


FOLDERS = ("ep_comm.deep_ep", "ep_comm.deep_ep.bare_name.deep_ep")


def test_config():
    config = Buffer.get_dispatch_config(7)  # any number of ranks
    assert isinstance(config.num_sms, int) and isinstance(Buffer.num_sms, int)
    assert deep_ep.Config(24, 8, 256).num_sms == 24
    assert config.get_nvl_buffer_size_hint(14336, 8) == 2 * 7 * 4096 * 14336
    assert config.get_rdma_buffer_size_hint(14336, 8) == 0


def test_sms_are_limited_only_when_somebody_asks():
    from ep_comm.deep_ep.buffer import _sms

    before = Buffer.num_sms, Buffer._sm_limit
    try:
        assert _sms(None) is None
        assert _sms(Buffer.get_combine_config(2)) is None
        assert _sms(deep_ep.Config(24)) == 24
        Buffer.set_num_sms(20)
        assert _sms(None) == _sms(Buffer.get_combine_config(2)) == 20
        assert _sms(deep_ep.Config(24)) == 24
        for wrong in (1, 2.0, None, True):
            with pytest.raises((ValueError, TypeError)):
                Buffer.set_num_sms(wrong)
    finally:
        Buffer.num_sms, Buffer._sm_limit = before
