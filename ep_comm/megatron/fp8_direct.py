"""Received FP8 rows as the input of the experts' first grouped GEMM (`EPOptions.fp8_direct`).

Elsewhere rows that came in FP8 are dequantised, and Transformer Engine quantises them once more:
row-wise for the first GEMM, column-wise for its weight gradient. Here its `GroupedLinear` gets what
came. It asks one quantiser an expert for its quantised input; for those of the experts' first layer
there are ours, which quantise nothing: they hand out the received bytes and scales, and column-wise
copies that one kernel has made for all experts. Everything else stays Transformer Engine's: weights
and their caches, autograd, gradients that are delayed or added to ``main_grad``. The values are the
same as without it, and so is every bit of what is computed.

What goes through Megatron between dispatch and experts is `ep_comm.DispatchOutput.recv_edge`, which
stands for the rows in autograd. The rows themselves are attached to it just before the experts run.

Of Transformer Engine's inner interface this needs what version 2.20 has: quantisers come from
``GroupedLinear._get_quantizers``, inputs first; of kinds that it does not know it calls each with
an expert's rows; and ``prepare_forward`` takes ``allow_non_contiguous``. Where a version does not
ask ours, an error says so: nobody reads the edge unnoticed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ep_comm import fp8
from ep_comm.errors import EPStateError
from ep_comm.megatron.support import NO_DIRECT_EXPERTS

_ATTACHED = "ep_comm_fp8_rows"


class FP8Rows(NamedTuple):
    """Rows of local experts, as a dispatch received them.

    Attributes:
        data: ``float8_e4m3fn`` [M, H], grouped by expert.
        scales: FP32 [M * H / 128], as `ep_comm.fp8.split_scales` takes them.
        expert_offsets: int32 [E + 1] on the device: where groups begin, and where the last ends.
    """

    data: Tensor
    scales: Tensor
    expert_offsets: Tensor


def attach(edge: Tensor, rows: FP8Rows) -> None:
    """Let `edge` stand for `rows` in the next call of the experts."""
    setattr(edge, _ATTACHED, rows)


def feed_directly(experts: nn.Module) -> None:
    """Have the experts' first linear layer take the rows that are attached to its input.

    Raises:
        EPUnsupportedError: They are not Megatron's grouped experts of Transformer Engine's layers,
            or these are set up in a way that never asks for a quantised input.
    """
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    linear: Any = getattr(experts, "linear_fc1", None)
    if not isinstance(experts, TEGroupedMLP) or not hasattr(linear, "_get_quantizers"):
        raise NO_DIRECT_EXPERTS.error(type(experts).__name__)
    for setting in ("use_grouped_tensor", "single_grouped_weight", "save_original_input"):
        if getattr(linear, setting, False):
            raise NO_DIRECT_EXPERTS.error(setting)
    _DirectInput(linear)


class _DirectInput:
    """The input of one of Transformer Engine's grouped linear layers, taken over from it."""

    def __init__(self, linear: Any) -> None:
        self._given: _GivenInput | None = None
        self._original_forward = linear.forward
        self._original_quantizers = linear._get_quantizers
        linear.forward = self._forward
        linear._get_quantizers = self._get_quantizers
        # Or it would write the edge out, element by element.
        linear.prepare_forward = functools.partial(
            linear.prepare_forward, allow_non_contiguous=True
        )

    def _forward(
        self, edge: Tensor, m_splits: Sequence[int] | Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        rows = edge.__dict__.pop(_ATTACHED, None)
        if rows is None:
            raise EPStateError(
                "the experts got other rows than the dispatch has handed over: something between "
                "dispatch and experts changes them, which --ep-fp8-direct does not allow"
            )
        _check_recipe()
        splits = m_splits.tolist() if isinstance(m_splits, Tensor) else list(m_splits)
        self._given = given = _GivenInput(rows, splits)
        try:
            output = self._original_forward(edge, m_splits, *args, **kwargs)
        finally:
            self._given = None
        if given.num_taken != len(splits):
            raise EPStateError(
                f"Transformer Engine has taken the FP8 rows of {given.num_taken} experts of "
                f"{len(splits)}, and so computed with others: leave --ep-fp8-direct out"
            )
        return output

    def _get_quantizers(self) -> tuple:
        theirs, *others = self._original_quantizers()
        if self._given is None:
            return (theirs, *others)
        ours = [_GivenQuantizer(self._given, *each) for each in enumerate(theirs)]
        return (ours, *others)


def _check_recipe() -> None:
    """Raise where the experts would not run in FP8, or would keep their input for backward."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    is_on = FP8GlobalStateManager.is_fp8_enabled()
    recipe = FP8GlobalStateManager.get_fp8_recipe() if is_on else None
    if recipe is None or not recipe.float8_block_scaling():
        raise EPStateError(
            "--ep-fp8-direct needs the experts to run under Transformer Engine's FP8 autocast with "
            f"Float8BlockScaling, got {'no FP8' if recipe is None else type(recipe).__name__}"
        )
    if getattr(recipe, "backward_override", None) is not None:
        raise EPStateError(
            f"--ep-fp8-direct does not go with backward_override={recipe.backward_override!r}"
        )


class _GivenInput:
    """The quantised input of one call, for all experts."""

    def __init__(self, rows: FP8Rows, splits: list[int]) -> None:
        self._rows = rows
        self._splits = splits
        self.needs_columns = False
        self.num_taken = 0

    @functools.cached_property
    def _by_row(self) -> list[tuple[Tensor, Tensor]]:
        """Bytes [rows, H] and scales [H / 128, rows] of each expert."""
        data, scales, splits = self._rows.data, self._rows.scales, self._splits
        blocks = data.shape[1] // fp8.BLOCK
        sizes = [rows * blocks for rows in splits]
        return [
            (bytes_, of_expert.view(blocks, rows))
            for bytes_, of_expert, rows in zip(
                data[: sum(splits)].view(torch.uint8).split(splits),
                scales[: sum(sizes)].split(sizes),
                splits,
                strict=True,
            )
        ]

    @functools.cached_property
    def _by_column(self) -> list[tuple[Tensor, Tensor]]:
        """Bytes [H, rows] and scales [ceil(rows / 128), H] of each expert, in one launch."""
        copies = fp8.columnwise(
            self._rows.data, self._rows.scales, self._splits, self._rows.expert_offsets
        )
        return [(data.view(torch.uint8), scales) for data, scales in copies]

    def take(self, expert: int, quantizer: Any) -> Any:
        """Return an expert's input as what Transformer Engine's `quantizer` would make of it."""
        from transformer_engine.pytorch import Float8BlockwiseQTensorStorage

        self.num_taken += 1
        data, scales = self._by_row[expert]
        columns, column_scales = self._by_column[expert] if self.needs_columns else (None, None)
        return Float8BlockwiseQTensorStorage(
            rowwise_data=data,
            rowwise_scale_inv=scales,
            columnwise_data=columns,
            columnwise_scale_inv=column_scales,
            fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
            is_2D_scaled=False,
            fake_dtype=torch.bfloat16,
        )


class _GivenQuantizer:
    """Stands for the quantiser of an expert's input, as far as `GroupedLinear` asks for one."""

    def __init__(self, given: _GivenInput, expert: int, quantizer: Any) -> None:
        self._given = given
        self._expert = expert
        self._quantizer = quantizer

    def set_usage(self, *, rowwise: bool | None = None, columnwise: bool | None = None) -> None:
        if columnwise is not None:
            self._given.needs_columns = columnwise

    def __call__(self, rows: Tensor) -> Any:
        return self._given.take(self._expert, self._quantizer)
