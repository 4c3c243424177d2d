"""A variant of the training example, in memory: its model, optimizer and data.

Imports Megatron: import this only after `ep_comm.pretrain.start.prepare_megatron`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from ep_comm import Buffer
from ep_comm.megatron.buffers import destroy_buffers
from ep_comm.megatron.layer import moe_layers
from ep_comm.pretrain.config import PretrainConfig
from ep_comm.pretrain.data import EOD
from ep_comm.pretrain.loop import train_step
from ep_comm.pretrain.model import build


class Trainer:
    """Trains one variant on random tokens, the same ones for each. Collective.

    Args:
        config: Configuration of the example; the global batch size is not used.
        device: This rank's.

    Attributes:
        config, device: As passed.
        trainee: Model, optimizer and learning-rate schedule.
    """

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        vocab_size = vocabulary(config)
        self.trainee = build(config, vocab_size, device)
        self._batches = _random_batches(config, vocab_size, device)

    def step(self, num_microbatches: int) -> Tensor:
        """Take one optimizer step; return this rank's loss, averaged over its microbatches."""
        self.trainee.graphs.before_step()
        loss, _ = train_step(self.trainee, self._batches, self.config, num_microbatches)
        samples = num_microbatches * self.config.micro_batch_size * dist.get_world_size()
        self.trainee.scheduler.step(increment=samples)
        return loss

    def moe_layers(self) -> list[MoELayer]:
        """Return the model's MoE layers, first to last."""
        return [layer for _, layer in moe_layers([self.trainee.model])]

    def buffers(self) -> set[Buffer]:
        """Return ep_comm's buffers; none with other dispatchers, or before the first step."""
        dispatchers = [layer.token_dispatcher for layer in self.moe_layers()]
        buffers = (getattr(dispatcher, "buffer", None) for dispatcher in dispatchers)
        return {buffer for buffer in buffers if buffer is not None}

    @contextmanager
    def garbage_collection(self) -> Iterator[None]:
        """Collect garbage as the example does: not at all with ``manual_gc``."""
        gc.collect()
        if self.config.manual_gc:
            gc.disable()
        try:
            yield
        finally:
            gc.enable()

    def free(self) -> int:
        """Give all memory back; return the bytes that are still allocated on the GPU."""
        self.trainee.graphs.close()
        destroy_buffers()
        # Dispatchers keep tensors whose graph holds the data-parallel hooks, which hold the model:
        # a cycle through C++, which Python's collector does not see.
        for module in list(self.trainee.model.modules()):
            vars(module).clear()
        del self.trainee, self._batches
        gc.collect()
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(self.device)


def vocabulary(config: PretrainConfig) -> int:
    """Return the size of the vocabulary: as configured, else that of the example's own text."""
    return config.vocab_size or EOD + 1


def _random_batches(
    config: PretrainConfig, vocab_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield what `ep_comm.pretrain.data.microbatches` does, of uniformly random tokens."""
    generator = torch.Generator(device).manual_seed(config.seed + dist.get_rank())
    shape = config.micro_batch_size, config.seq_length
    mask = torch.ones(shape, device=device)
    position_ids = torch.arange(config.seq_length, device=device).expand(shape)
    while True:
        text = torch.randint(
            vocab_size, (shape[0], shape[1] + 1), generator=generator, device=device
        )
        yield {
            "tokens": text[:, :-1].contiguous(),
            "labels": text[:, 1:].contiguous(),
            "loss_mask": mask,
            "position_ids": position_ids,
        }
