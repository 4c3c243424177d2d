"""The buffers under a model's layers: shared, made by the first dispatch, and larger ones later."""

from __future__ import annotations

import contextlib
from itertools import chain

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor

import ep_comm
from ep_comm import Buffer, EPConfig
from ep_comm.backends.nvlink.prices import gemm_tiles
from ep_comm.job.meeting import meet
from ep_comm.megatron.options import EPOptions

# The buffers of each process group and configuration. All layers of a model share the last one.
# Those before it were too small; backward passes may still go through them.
_buffers: dict[tuple, list[Buffer]] = {}
_GROWTH = 1.25  # at least: so that lengths that creep up leave few behind
_MAX_DEFAULT_TIMEOUT_S = 300.0


def synchronize_buffers() -> None:
    """Wait on the host for all communication of the models in this process.

    Call it before a checkpoint is written: it then has no results of communication that failed.

    Raises:
        EPError: As `ep_comm.Buffer.synchronize`. All that was computed since is worth nothing.
    """
    for buffer in chain.from_iterable(_buffers.values()):
        buffer.synchronize()


def destroy_buffers() -> None:
    """Destroy the buffers of all models in this process, before their process groups. Collective.

    A dispatcher that is used again makes a new one.
    """
    with contextlib.ExitStack() as stack:  # all of them, whatever one raises
        for buffers in _buffers.values():
            stack.callback(buffers.clear)
            for buffer in buffers:
                stack.callback(buffer.destroy)


class LayerBuffers:
    """The buffers that one layer's dispatches use, which it shares with the layers like it.

    Args:
        config: Of the layer.
        options: Of ep_comm.
        group: The ranks that hold its experts.
        num_shards: Of each expert.
        says: Whether rank 0 prints a line for each buffer.

    Attributes:
        of_group: The last one is the one to use; backward passes may still go through others.
    """

    def __init__(
        self,
        config: TransformerConfig,
        options: EPOptions,
        group: dist.ProcessGroup,
        num_shards: int,
        *,
        says: bool,
    ) -> None:
        self.of_group: list[Buffer] = []
        self._config = config
        self._options = options
        self._group = group
        self._num_shards = num_shards
        self._says = says

    def shared(self, hidden_states: Tensor) -> Buffer:
        """Return the buffer for rows like these. The first call makes it, which is collective."""
        if self.of_group and self.of_group[-1].is_usable:
            return self.of_group[-1]
        config, options = self._config, self._options
        sizes = (config.num_moe_experts, hidden_states.shape[-1], config.moe_router_topk)
        overlapped = config.overlap_moe_expert_parallel_comm
        key = (self._group, *sizes, hidden_states.dtype, options, overlapped)
        self.of_group = _buffers.setdefault(key, [])
        if self.of_group and self.of_group[-1].is_usable:
            return self.of_group[-1]
        self.of_group[:] = [buffer for buffer in self.of_group if buffer.is_usable]
        max_tokens = options.max_tokens_per_rank
        if max_tokens is None:
            what_for, mine = "find the most tokens of a rank", hidden_states.shape[0]
            timeout_s = self._timeout_s(hidden_states.device)
            max_tokens = max(meet(self._group, what_for, mine, timeout_s).answers)
        return self._make(hidden_states, max(max_tokens, 1))

    def larger(self, hidden_states: Tensor, num_tokens: int) -> Buffer:
        """Make a buffer with room for so many tokens, to use from now on. Collective."""
        room = int(_GROWTH * self.of_group[-1].config.max_tokens_per_rank)
        return self._make(hidden_states, max(num_tokens, room))

    def _make(self, hidden_states: Tensor, max_tokens: int) -> Buffer:
        config, options, hidden = self._config, self._options, hidden_states.shape[-1]
        assert config.num_moe_experts is not None  # it is an MoE layer's
        buffer = Buffer(
            self._group,
            EPConfig(
                num_experts=config.num_moe_experts * self._num_shards,
                hidden=hidden,
                max_tokens_per_rank=max_tokens,
                num_topk=config.moe_router_topk * self._num_shards,
                dtype=hidden_states.dtype,
                timeout_s=self._timeout_s(hidden_states.device),
                wire="copy-engine" if options.copy_engines else "sm",
            ),
        )
        buffer.set_num_sms(options.num_sms)
        buffer.set_overlapped(config.overlap_moe_expert_parallel_comm)
        if options.overlap_wgrad:
            buffer.set_gemm_tiles(self._wgrad_tiles(buffer))
        self.of_group.append(buffer)
        if buffer.rank == 0 and self._says:
            print(self._startup_line(buffer, hidden_states), flush=True)
        return buffer

    def _wgrad_tiles(self, buffer: Buffer) -> int:
        """Return the size of what runs beside a backward combine: gradients of the first layers."""
        config = self._config
        ffn = (config.moe_ffn_hidden_size or config.ffn_hidden_size) // self._num_shards
        tiles = gemm_tiles((1 + config.gated_linear_unit) * ffn, buffer.config.hidden)
        return buffer.num_local_experts * tiles

    def _timeout_s(self, device: torch.device) -> float:
        return self._options.timeout_s or _default_timeout(self._group, device)

    def _startup_line(self, buffer: Buffer, hidden_states: Tensor) -> str:
        """Return the line that each pipeline stage prints: version, backend, sizes, what is off."""
        config, options = self._config, self._options
        sizes = f"EP {buffer.num_ranks // self._num_shards}"
        if self._num_shards > 1:
            sizes += f" x ETP {self._num_shards}"
        if config.pipeline_model_parallel_size > 1:
            stage = parallel_state.get_pipeline_model_parallel_rank()
            sizes += f" (pipeline stage {stage} of {config.pipeline_model_parallel_size})"
        own = str(hidden_states.dtype).removeprefix("torch.")
        out, gradients_out = (
            "fp8 e4m3 1x128" if in_fp8 else own
            for in_fp8 in (options.fp8_dispatch, options.fp8_grad_dispatch)
        )
        if options.capacity_factor is not None:
            whose = "a rank" if options.device_counts else "an expert"
            sizes += f", {options.capacity_factor:g} times the even share of rows {whose}"
        off = [f"{name} backend ({reason})" for name, reason in buffer.passed_over.items()]
        for name, is_on in (
            ("FP8 dispatch", options.fp8_dispatch),
            ("FP8 gradient dispatch", options.fp8_grad_dispatch),
            ("FP8 direct", options.fp8_direct),
            ("wgrad overlap", options.overlap_wgrad),
            ("copy engines", options.copy_engines),
        ):
            if not is_on:
                off.append(f"{name} (not asked for)")
        loss = buffer.overlap_loss("combine", "expert", hidden_states.shape[0])
        if options.overlap_wgrad and loss is not None:
            off.append(f"wgrad overlap (a combine is not run beside GEMMs: {loss})")
        if options.num_sms is not None and buffer.passed_over:
            off.append(f"num_sms {options.num_sms} (the backend uses no SMs of its own)")
        return (
            f"ep_comm {ep_comm.__version__}: {buffer.describe()}, {sizes}, "
            f"{config.num_moe_experts} experts top-{config.moe_router_topk}, "
            f"{buffer.config.max_tokens_per_rank} tokens of {buffer.config.hidden} a rank; "
            f"wire {out} out, {own} back, gradients {gradients_out} out, {own} back; "
            f"buffer {buffer.buffer_bytes} bytes; off: {', '.join(off)}"
        )


def _default_timeout(group: dist.ProcessGroup, device: torch.device) -> float:
    """Return half of the group's own timeout in seconds, at most five minutes.

    A rank that is late for us makes others late for NCCL, whose watchdog ends them without naming
    it. So our bound has to run out first. Some groups do not tell theirs (a wrapper's, another
    torch's): they are taken to have torch's defaults, which are ten minutes and more.
    """
    try:
        seconds = group._get_backend(device).options._timeout.total_seconds()
    except (AttributeError, RuntimeError):
        return _MAX_DEFAULT_TIMEOUT_S
    return min(seconds / 2, _MAX_DEFAULT_TIMEOUT_S)
