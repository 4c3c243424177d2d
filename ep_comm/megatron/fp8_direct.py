"""Received FP8 rows as operands of the experts' grouped GEMMs (`EPOptions.fp8_direct`).

Elsewhere rows that came in FP8 are dequantised, and Transformer Engine quantises them once more:
row-wise for the first GEMM, column-wise for its weight gradient. Here its `GroupedLinear` gets what
came. It asks one quantiser an expert for its quantised input; for those of the experts' first layer
there are ours, which quantise nothing: they hand out the received bytes and scales, and column-wise
copies that one kernel has made for all experts. Everything else stays Transformer Engine's: weights
and their caches, autograd, gradients that are delayed or added to ``main_grad``. The values are the
same as without it, and so is every bit of what is computed.

With FP8 gradients on the wire the experts' last layer gets the gradient of its output so too, as
the backward of combine has received it: for both GEMMs of its backward.

What goes through Megatron between dispatch and experts is `ep_comm.DispatchOutput.recv_edge`, which
stands for the rows in autograd. The rows themselves are attached to it just before the experts run.

Of Transformer Engine's inner interface this needs what version 2.20 has: quantisers come from
``GroupedLinear._get_quantizers``, those of inputs first and of outputs' gradients last; of kinds
that it does not know it calls each with an expert's rows; and ``prepare_forward`` takes
``allow_non_contiguous``. Where a version does not ask ours, an error says so: nobody reads what
stands for rows unnoticed.
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
_GRADIENT = "ep_comm_fp8_gradient"


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


def gradient_of(rows: Tensor) -> Gradient | None:
    """Return where the gradient of what the experts gave can be put in FP8; None: nowhere."""
    return rows.__dict__.pop(_GRADIENT, None)


def feed_directly(experts: nn.Module, *, gradients: bool) -> None:
    """Have the experts' first linear layer take the rows that are attached to its input.

    Args:
        experts: Megatron's.
        gradients: Have the last one take the gradient of its output that is put in `gradient_of`.

    Raises:
        EPUnsupportedError: They are not Megatron's grouped experts of Transformer Engine's layers,
            or these are set up in a way that never asks for a quantised input.
    """
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    first: Any = getattr(experts, "linear_fc1", None)
    last: Any = getattr(experts, "linear_fc2", None)
    if not isinstance(experts, TEGroupedMLP) or not hasattr(first, "_get_quantizers"):
        raise NO_DIRECT_EXPERTS.error(type(experts).__name__)
    settings = [(last, name) for name in ("use_grouped_tensor", "single_grouped_weight")]
    settings += [(first, name) for _, name in settings] + [(first, "save_original_input")]
    for linear, setting in settings:
        if getattr(linear, setting, False):
            raise NO_DIRECT_EXPERTS.error(setting)
    _DirectInput(first)
    if gradients:
        _DirectGradient(last)


class _DirectInput:
    """The input of one of Transformer Engine's grouped linear layers, taken over from it."""

    def __init__(self, linear: Any) -> None:
        self._given: _GivenRows | None = None
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
        splits = _as_list(m_splits)
        self._given = given = _GivenRows(rows, splits)
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


class _DirectGradient:
    """The gradient of the output of one of Transformer Engine's grouped linear layers."""

    def __init__(self, linear: Any) -> None:
        self._linear = linear
        self._gradient: Gradient | None = None
        self._original_forward = linear.forward
        self._original_quantizers = linear._get_quantizers
        linear.forward = self._forward
        linear._get_quantizers = self._get_quantizers

    def _forward(
        self, inputs: Tensor, m_splits: Sequence[int] | Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if not (torch.is_grad_enabled() and inputs.requires_grad):
            return self._original_forward(inputs, m_splits, *args, **kwargs)
        has_columns = next(self._linear.parameters()).requires_grad
        self._gradient = gradient = Gradient(_as_list(m_splits), has_columns)
        try:
            result = self._original_forward(inputs, m_splits, *args, **kwargs)
        finally:
            self._gradient = None
        if gradient.is_asked_for:
            output = result[0] if isinstance(result, tuple) else result  # beside its bias
            setattr(output, _GRADIENT, gradient)
            inputs.register_hook(gradient.check_was_taken)
        return result

    def _get_quantizers(self) -> tuple:
        of_input, *others, of_gradient = self._original_quantizers()
        gradient = self._gradient
        # Those of inputs are always E4M3, as what travels is. Without FP8 there are none.
        is_alike = of_gradient[0] is not None and of_gradient[0].dtype == of_input[0].dtype
        if gradient is None or not is_alike:
            return (of_input, *others, of_gradient)
        gradient.is_asked_for = True
        ours = [_GradientQuantizer(gradient, *each) for each in enumerate(of_gradient)]
        return (of_input, *others, ours)


def _as_list(m_splits: Sequence[int] | Tensor) -> list[int]:
    return m_splits.tolist() if isinstance(m_splits, Tensor) else list(m_splits)


class Gradient:
    """Of the output of one call of the experts: the FP8 rows that are put in here, if any are.

    Args:
        splits: Rows of each expert.
        has_columns: Weight gradients are computed.

    Attributes:
        is_asked_for: Quantisers of ours stand where Transformer Engine takes it from.
    """

    def __init__(self, splits: list[int], has_columns: bool) -> None:
        self._splits = splits
        self._has_columns = has_columns
        self._given: _GivenRows | None = None
        self._instead: Tensor | None = None
        self.is_asked_for = False

    def put(self, rows: FP8Rows, instead: Tensor) -> None:
        """Use `rows` where autograd brings `instead`, which holds nothing."""
        self._given = _GivenRows(rows, self._splits)
        self._given.needs_columns = self._has_columns
        self._instead = instead

    def quantized(self, expert: int, values: Tensor, quantizer: Any) -> Any:
        """Return an expert's part, of which autograd has brought `values`."""
        if self._given is None:
            return quantizer(values)
        assert self._instead is not None
        begin = self._instead.data_ptr()
        end = begin + self._instead.numel() * self._instead.element_size()
        if values.numel() and not begin <= values.data_ptr() < end:
            raise EPStateError(
                "the gradient of the experts' output is another one than combine's backward has "
                "handed over: something behind the experts adds to it or changes it, which "
                "--ep-fp8-direct does not allow"
            )
        return self._given.take(expert, quantizer)

    def check_was_taken(self, _: Tensor) -> None:
        """Raise where rows were put in here and others used; forget them.

        Called with the gradient of that layer's input.
        """
        given, self._given, self._instead = self._given, None, None
        if given is not None and given.num_taken != len(self._splits):
            raise EPStateError(
                f"Transformer Engine has taken the FP8 gradient of {given.num_taken} experts of "
                f"{len(self._splits)}, and so computed with others: leave --ep-fp8-direct out"
            )


class _GradientQuantizer:
    """Stands for the quantiser of the gradient of an expert's output."""

    def __init__(self, gradient: Gradient, expert: int, quantizer: Any) -> None:
        self._gradient = gradient
        self._expert = expert
        self._quantizer = quantizer

    def set_usage(self, **usage: bool | None) -> None:
        self._quantizer.set_usage(**usage)

    def __call__(self, values: Tensor) -> Any:
        return self._gradient.quantized(self._expert, values, self._quantizer)


class _GivenRows:
    """Quantised rows of one call, for all experts."""

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
        """Return an expert's rows as what Transformer Engine's `quantizer` would make of them."""
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

    def __init__(self, given: _GivenRows, expert: int, quantizer: Any) -> None:
        self._given = given
        self._expert = expert
        self._quantizer = quantizer

    def set_usage(self, *, rowwise: bool | None = None, columnwise: bool | None = None) -> None:
        if columnwise is not None:
            self._given.needs_columns = columnwise

    def __call__(self, rows: Tensor) -> Any:
        return self._given.take(self._expert, self._quantizer)
