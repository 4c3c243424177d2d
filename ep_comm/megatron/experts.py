"""Experts whose token counts stay on the device, by torch's grouped GEMM.

Megatron's experts ask the host how many rows each of them has. These take the ends of the experts'
groups from device memory (`EPOptions.device_counts`). The weights of a rank's experts are one
parameter a linear layer, [E, in, out].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

# The public name is newer than the function.
_grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class GroupedExperts(MegatronModule):
    """The routed experts of one rank, as Megatron's `MoELayer` builds and calls them.

    Args:
        num_local_experts: E.
        config: Megatron's; one that `ep_comm.megatron.support.check_supported` accepts.
        pg_collection: Megatron's process groups.
    """

    def __init__(
        self, num_local_experts: int, config: Any, pg_collection: Any = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self._ep_group, self._expert_dp_group = pg_collection.ep, pg_collection.expt_dp
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size
        self.weight1 = self._parameter(
            hidden, ffn * (1 + config.gated_linear_unit), config.init_method
        )
        self.weight2 = self._parameter(ffn, hidden, config.output_layer_init_method)

    def _parameter(self, inputs: int, outputs: int, init_method: Any) -> nn.Parameter:
        """Return [E, in, out], each expert initialised as a linear layer of its own is."""
        config = self.config
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        shape = self.num_local_experts, inputs, outputs
        weight = torch.empty(shape, dtype=config.params_dtype, device=device)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for of_expert in weight:
                    init_method(of_expert.t())
        parameter = nn.Parameter(weight)
        # Megatron's data parallelism reduces it over the ranks with the same experts.
        setattr(parameter, "allreduce", self._ep_group.size() == 1)  # noqa: B010
        return parameter

    def forward(self, rows: Tensor, ends_of_experts: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Compute the experts, and weigh their outputs.

        Args:
            rows: [M, hidden], grouped by expert. Those behind the last group are not looked at, and
                what comes out of them is arbitrary.
            ends_of_experts: [E] int32 on the device, where each group ends.
            probs: [M].
        """
        config, probs = self.config, probs.unsqueeze(-1)
        inner = _grouped_mm(rows, self.weight1, offs=ends_of_experts)
        if config.bias_activation_fusion and config.gated_linear_unit:
            inner = weighted_bias_swiglu_impl(
                inner, None, probs, config.activation_func_fp8_input_store
            )
        else:
            dtype = inner.dtype
            if config.gated_linear_unit:
                gate, inner = inner.chunk(2, dim=-1)
                inner = config.activation_func(gate) * inner
            else:
                inner = config.activation_func(inner)
            inner = (inner * probs).to(dtype)
        return _grouped_mm(inner, self.weight2, offs=ends_of_experts), None

    def backward_dw(self) -> None:
        """Do nothing: no weight gradient is put off here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Return the weights as parts of those of all experts: any expert-parallel size reads them.

        Other modules of experts do not.
        """
        axis = len(sharded_offsets)
        place = axis, self._ep_group.rank(), self._ep_group.size()
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                weight,
                *sharded_offsets,
                place,
                replica_id=(0, 0, self._expert_dp_group.rank()),
                prepend_axis_num=axis,
            )
            for name, weight in (("weight1", self.weight1), ("weight2", self.weight2))
        }
