"""ep_comm.megatron.cpu: megatron-core without CUDA.

The shim patches torch for the whole process, so each test runs it in one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("megatron.core")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
    )


def test_touches_nothing_where_cuda_is_available():
    result = run_python("""
        import torch
        torch.cuda.is_available = lambda: True
        stream, device = torch.cuda.Stream, torch.cuda.current_device
        from ep_comm.megatron import cpu
        assert cpu.enable() is False
        assert torch.cuda.Stream is stream and torch.cuda.current_device is device
        import sys
        assert not any(name.startswith("megatron") for name in sys.modules)
    """)
    assert result.returncode == 0, result.stderr
    assert "no CUDA" not in result.stderr


def test_says_so_once_on_rank_0_only():
    code = """
        from ep_comm.megatron import cpu
        assert cpu.enable() and cpu.enable()
    """
    assert run_python(code).stderr.count("no CUDA: megatron-core runs on CPU") == 1
    assert "no CUDA" not in run_python("import os; os.environ['RANK'] = '1'" + code).stderr


def test_imports_without_triton():
    result = run_python("""
        import importlib.util, sys
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
        sys.modules["triton"] = None  # importing it fails
        from ep_comm.megatron import cpu
        cpu.enable()
        import megatron.core.transformer.moe.moe_layer
    """)
    assert result.returncode == 0, result.stderr


def test_one_training_step_with_recomputation():
    result = run_python("""
        from ep_comm.megatron import cpu
        assert cpu.enable()
        import torch, torch.distributed as dist
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.distributed import (
            DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads)
        from megatron.core.transformer.transformer_config import TransformerConfig

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=1, hidden_size=16, num_attention_heads=2, num_moe_experts=4,
            moe_router_topk=2, moe_ffn_hidden_size=16, moe_token_dispatcher_type="alltoall",
            add_bias_linear=False, use_cpu_initialization=True, hidden_dropout=0.1,
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1,
            gradient_accumulation_fusion=False,
        )
        model = GPTModel(config, get_gpt_layer_local_spec(4, False), 32, 8)
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
        optimizer = get_megatron_optimizer(OptimizerConfig(lr=0.01), [model])
        tokens = torch.arange(16).view(2, 8)
        positions = torch.arange(8).expand(2, 8)

        losses = []
        for _ in range(5):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            loss = model(tokens, positions, None, labels=tokens).mean()
            loss.backward()
            finalize_model_grads([model])
            success, norm, _ = optimizer.step()
            assert success and norm > 0
            losses.append(loss.item())
        assert losses[-1] < losses[0], losses
    """)
    assert result.returncode == 0, result.stderr
