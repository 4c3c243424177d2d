"""Parts of a layer in CUDA graphs, which spare the host their launches; by Megatron's helper."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import num_microbatches_calculator
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.transformer_config import TransformerConfig

from ep_comm.pretrain.config import PretrainConfig

WARMUP_STEPS = 3  # Megatron's default: buffers are made in them


def graph_settings(config: PretrainConfig) -> dict[str, Any]:
    """Return what `TransformerConfig` is told of graphs."""
    if not config.cuda_graph_modules:
        return {}
    is_new = hasattr(TransformerConfig, "cuda_graph_modules")  # megatron-core 0.19
    key = "cuda_graph_modules" if is_new else "cuda_graph_scope"
    return {
        key: list(config.cuda_graph_modules),
        "cuda_graph_impl": "transformer_engine",
        "cuda_graph_warmup_steps": WARMUP_STEPS,
        "use_te_rng_tracker": True,
    }


@contextlib.contextmanager
def hooks_for_graphs(config: PretrainConfig) -> Iterator[None]:
    """Have the gradients' hooks, which are made in here, run on a stream that a graph may wait for.

    They run on the stream on which they were made, and the default one is none of these.
    """
    if not config.cuda_graph_modules:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class LayerGraphs:
    """Captures what `config.cuda_graph_modules` names, when a few steps have been taken without.

    Args:
        config: Of the training.
        model: Whose layers these are.
        optimizer: Of that model; its gradients are zeroed after a capture.
    """

    def __init__(
        self, config: PretrainConfig, model: DistributedDataParallel, optimizer: MegatronOptimizer
    ) -> None:
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._num_steps = 0
        self._helper: TECudaGraphHelper | None = None

    def before_step(self) -> bool:
        """Capture, where this is the time for it; return whether that was so. Collective."""
        self._num_steps += 1
        if not self._config.cuda_graph_modules or self._num_steps != WARMUP_STEPS + 1:
            return False
        self._capture()
        return True

    def close(self) -> None:
        """Delete the graphs: NCCL would wait for those that it is in before it ends."""
        if self._helper is not None and self._helper.graphs_created():
            self._helper.delete_cuda_graphs()
        self._helper = None

    def _capture(self) -> None:
        config, num_ranks = self._config, dist.get_world_size()
        self._helper = TECudaGraphHelper(
            model=[self._model],
            config=self._model.config,
            seq_length=config.seq_length,
            micro_batch_size=config.micro_batch_size,
            optimizers=[self._optimizer],
        )
        # It asks how many micro-batches a step has, to choose its own warm-up.
        num_microbatches_calculator.init_num_microbatches_calculator(
            dist.get_rank(), None, config.micro_batch_size * num_ranks, config.micro_batch_size,
            num_ranks,
        )  # fmt: skip
        try:
            self._helper.create_cudagraphs()
        finally:
            num_microbatches_calculator.unset_num_microbatches_calculator()
