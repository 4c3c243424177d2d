"""Transformer Engine's grouped linear layers under FP8 block scaling, in plain torch on a CPU.

As far as Megatron's `TEGroupedMLP` and `ep_comm.megatron.fp8_direct` ask for them: quantisers with
Transformer Engine's bits, the tensors that they make, and a layer that quantises its input, weights
and gradients as its does. The GEMM multiplies the values in FP32.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ep_comm import fp8

E4M3 = object()  # DType.kFloat8E4M3


class Float8BlockwiseQTensorStorage:
    """Holds what it is given, and refuses what its shapes say is no such tensor."""

    def __init__(
        self,
        rowwise_data: Tensor | None,
        rowwise_scale_inv: Tensor | None,
        columnwise_data: Tensor | None,
        columnwise_scale_inv: Tensor | None,
        fp8_dtype: object,
        quantizer: Any,
        is_2D_scaled: bool,
        *,
        fake_dtype: torch.dtype,
    ) -> None:
        assert fp8_dtype is E4M3 and isinstance(quantizer, Float8BlockQuantizer)
        assert fake_dtype == torch.bfloat16
        self._rowwise_data, self._rowwise_scale_inv = rowwise_data, rowwise_scale_inv
        self._columnwise_data, self._columnwise_scale_inv = columnwise_data, columnwise_scale_inv
        self._is_2D_scaled = is_2D_scaled
        for data, scale in (
            (rowwise_data, rowwise_scale_inv),
            (columnwise_data, columnwise_scale_inv),
        ):
            if data is None:
                assert scale is None
                continue
            assert data.dtype == torch.uint8 and scale.dtype == torch.float32
            assert data.is_contiguous() and scale.is_contiguous()
            assert data.data_ptr() % 16 == scale.data_ptr() % 16 == 0
            if not is_2D_scaled:  # block-major, and the other axis in fours
                blocks, rows = -(-data.shape[1] // fp8.BLOCK), -(-data.shape[0] // 4) * 4
                assert scale.shape == (blocks, rows), (data.shape, scale.shape)

    def values(self, *, columnwise: bool) -> Tensor:
        """[M, K] in FP32, from one of the two copies."""
        data = self._columnwise_data if columnwise else self._rowwise_data
        scale = self._columnwise_scale_inv if columnwise else self._rowwise_scale_inv
        scale = scale.repeat_interleave(fp8.BLOCK, 0)
        if self._is_2D_scaled:
            scale = scale.repeat_interleave(fp8.BLOCK, 1)[: data.shape[0], : data.shape[1]]
        else:
            scale = scale[: data.shape[1], : data.shape[0]].t()
        values = data.view(fp8.FP8_DTYPE).float() * scale
        return values.t().contiguous() if columnwise else values

    def keep_columnwise(self) -> None:
        """``update_usage(rowwise_usage=False, columnwise_usage=True)``."""
        assert self._columnwise_data is not None, "Cannot update to columnwise usage."
        self._rowwise_data = self._rowwise_scale_inv = None


class Float8BlockQuantizer:
    """Blocks of 1 x 128, or of 128 x 128."""

    dtype = E4M3

    def __init__(self, block_scaling_dim: int) -> None:
        self.block_scaling_dim = block_scaling_dim
        self.num_calls = 0
        self.rowwise = self.columnwise = True

    def set_usage(self, *, rowwise: bool | None = None, columnwise: bool | None = None) -> None:
        self.rowwise = self.rowwise if rowwise is None else rowwise
        self.columnwise = self.columnwise if columnwise is None else columnwise

    def __call__(self, values: Tensor) -> Float8BlockwiseQTensorStorage:
        self.num_calls += 1
        quantize = _quantize_rows if self.block_scaling_dim == 1 else _quantize_squares
        by_row = quantize(values) if self.rowwise else (None, None)
        by_column = quantize(values.t().contiguous()) if self.columnwise else (None, None)
        is_square = self.block_scaling_dim == 2
        return Float8BlockwiseQTensorStorage(
            *by_row, *by_column, E4M3, self, is_square, fake_dtype=torch.bfloat16
        )


def _quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, length = values.shape
    padded = nn.functional.pad(values, (0, -length % fp8.BLOCK))
    data, scale = fp8.quantize(padded)
    return data[:, :length].contiguous().view(torch.uint8), scale.t().contiguous()


def _quantize_squares(values: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, length = values.shape
    blocks = values.float().view(num_rows // 128, 128, length // 128, 128)
    scale = fp8._power_of_two_scale(blocks.abs().amax((1, 3)))
    data = (blocks * scale[:, None, :, None]).clamp(-fp8.FP8_MAX, fp8.FP8_MAX)
    return data.view(num_rows, length).to(fp8.FP8_DTYPE).view(torch.uint8), 1 / scale


class _WeightGradStore:
    def __init__(self, enabled: bool) -> None:
        self.context: queue.Queue | None = queue.Queue() if enabled else None

    def delay_wgrad_compute(self) -> bool:
        return self.context is not None


class GroupedLinear(nn.Module):
    """As Megatron builds `TEColumnParallelGroupedLinear` and its row-parallel sister."""

    def __init__(
        self, num_gemms: int, inputs: int, outputs: int, *, config: Any, init_method: Any, **_: Any
    ) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        self.fuse_wgrad_accumulation = config.gradient_accumulation_fusion
        self.wgrad_store = _WeightGradStore(config.delay_wgrad_compute)
        self.times_written_out = 0
        self.of_gradient: list = []  # quantisers of the last call
        self._hooks: list = []
        for i in range(num_gemms):
            weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
            init_method(weight)
            self.register_parameter(f"weight{i}", weight)

    def weights(self) -> list[nn.Parameter]:
        return [getattr(self, f"weight{i}") for i in range(self.num_gemms)]

    def prepare_forward(
        self, inp: Tensor, num_gemms: int = 1, allow_non_contiguous: bool = False
    ) -> Tensor:
        assert inp.dtype == torch.bfloat16 and num_gemms == self.num_gemms
        if not allow_non_contiguous and not inp.is_contiguous():
            self.times_written_out += 1
            inp = inp.contiguous()
        return inp

    def _get_quantizers(self) -> tuple[list, ...]:
        dims = (1, 2, None, None, None, 1)  # input, weight, output, grad input, grad weight, grad
        quantizers = tuple(
            [Float8BlockQuantizer(dim) if dim else None for _ in range(self.num_gemms)]
            for dim in dims
        )
        self.of_gradient = quantizers[-1]
        return quantizers

    def forward(self, inp: Tensor, m_splits: Sequence[int]) -> tuple[Tensor, None]:
        if isinstance(inp, Float8BlockwiseQTensorStorage):
            raise TypeError("GroupedLinear doesn't support input tensor in FP8.")
        inp = self.prepare_forward(inp, num_gemms=self.num_gemms)
        of_input, of_weight, _, _, _, of_grad = self._get_quantizers()
        weights = self.weights()
        columnwise = torch.is_grad_enabled() and weights[0].requires_grad
        for quantizer in of_input:
            quantizer.set_usage(rowwise=True, columnwise=columnwise)
        args = self, list(m_splits), of_input, of_weight, of_grad
        return _GroupedLinear.apply(inp, args, *weights), None

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Any) -> None:
        self._hooks.append(hook)

    def backward_dw(self) -> None:
        assert self.wgrad_store.context is not None
        compute, wgrads = self.wgrad_store.context.get()
        compute()
        if not self.fuse_wgrad_accumulation:
            for weight, wgrad in zip(self.weights(), wgrads, strict=True):
                weight.grad = wgrad
        for hook in self._hooks:
            hook()


def split_quantize(values: Tensor, splits: list[int], quantizers: list) -> list:
    """Those it knows in one call of C++, others one by one: the same here."""
    return [q(part) for q, part in zip(quantizers, values.split(splits), strict=True)]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inp: Tensor, args: tuple, *weights: Tensor) -> Tensor:
        linear, splits, of_input, of_weight, of_grad = args
        inputs = split_quantize(inp.reshape(-1, inp.shape[-1]), splits, of_input)
        quantised = [q(weight) for q, weight in zip(of_weight, weights, strict=True)]
        out = [
            (each.values(columnwise=False) @ weight.values(columnwise=False).t()).bfloat16()
            for each, weight in zip(inputs, quantised, strict=True)
        ]
        ctx.needs_weights = weights[0].requires_grad
        if ctx.needs_weights:
            for each in inputs:
                if each._columnwise_data is not None:  # else there is no backward
                    each.keep_columnwise()
        ctx.saved = linear, splits, inputs, quantised, of_grad
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        linear, splits, inputs, quantised, of_grad = ctx.saved
        grads = split_quantize(grad.contiguous(), splits, of_grad)
        dgrad = torch.cat(
            [
                (each.values(columnwise=False) @ weight.values(columnwise=True)).bfloat16()
                for each, weight in zip(grads, quantised, strict=True)
            ]
        )
        if not ctx.needs_weights:
            return dgrad, None, *[None] * len(splits)
        fused = linear.fuse_wgrad_accumulation
        weights = linear.weights()
        wgrads = [
            weight.main_grad if fused else torch.full_like(weight, torch.nan) for weight in weights
        ]

        def compute() -> None:
            for of_input, of_grad, wgrad in zip(inputs, grads, wgrads, strict=True):
                product = of_grad.values(columnwise=True).t() @ of_input.values(columnwise=True)
                if fused:
                    wgrad += product
                else:
                    wgrad.copy_(product)

        if linear.wgrad_store.context is not None:
            linear.wgrad_store.context.put((compute, wgrads))
        else:
            compute()
        return dgrad, None, *([None] * len(splits) if fused else wgrads)


class Fp8Padding(nn.Module):
    """Rows are aligned here: it returns its input, as Transformer Engine's does."""

    def __init__(self, num_gemms: int, **_: Any) -> None:
        super().__init__()

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        assert not any(rows % 16 for rows in m_splits)
        return inp, m_splits


class Fp8Unpadding(nn.Module):
    def __init__(self, num_gemms: int, **_: Any) -> None:
        super().__init__()

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        return inp


class Recipe:
    backward_override = None
    is_block = True

    def float8_block_scaling(self) -> bool:
        return self.is_block


class FP8GlobalStateManager:
    enabled = True
    recipe = Recipe()

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        return cls.recipe


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Have Megatron's experts and ep_comm take this for Transformer Engine."""
    from megatron.core.transformer.moe import experts

    names = ("transformer_engine", "transformer_engine.pytorch")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules[names[1]].Float8BlockwiseQTensorStorage = Float8BlockwiseQTensorStorage
    quantization = types.ModuleType("transformer_engine.pytorch.quantization")
    vars(quantization)["FP8GlobalStateManager"] = FP8GlobalStateManager
    modules[quantization.__name__] = quantization
    ours = dict(HAVE_TE=True, Fp8Padding=Fp8Padding, Fp8Unpadding=Fp8Unpadding)
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.multiple(experts, create=True, **ours),
    ):
        yield
