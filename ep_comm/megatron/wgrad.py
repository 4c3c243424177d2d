"""Weight gradients of the routed experts, computed later: while a combine is in flight.

Backward through an expert gives two gradients. The one of its input is what the backward combine
waits for. The one of its weights is not needed before the optimizer. So the linear layers of the
routed experts put (input, output gradient) aside, and `DelayedWeightGradient.backward_dw` makes
weight gradients of them when the dispatcher's backward calls it, between the start of the combine
and the wait for it. Where nothing before the experts is trainable, dispatch has no backward, and
the end of the whole backward pass calls it instead. Transformer Engine's layers can put operands
aside themselves; here the same is done for Megatron's own `ColumnParallelLinear` and
`RowParallelLinear`, with the same GEMM and so the same bits.

Megatron's `DistributedDataParallel` takes part by a protocol: built with ``delay_wgrad_compute`` it
leaves parameters marked ``skip_backward_post_hook`` to their module, which calls the hooks given to
``register_wgrad_accumulation_and_reduce_hooks`` once the gradient exists.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.autograd import Variable

from ep_comm.errors import EPStateError
from ep_comm.megatron.support import FUSED_ACCUMULATION, UNKNOWN_EXPERTS


class DelayedWeightGradient:
    """The weight gradient of one Megatron linear layer, taken over from it."""

    def __init__(self, linear: Any) -> None:
        if linear.gradient_accumulation_fusion:
            raise FUSED_ACCUMULATION.error()
        self._weight: nn.Parameter = linear.weight
        self._saved: deque[tuple[Tensor, Tensor]] = deque()
        self._hooks: list[Callable[[], None]] = []
        self._original_forward = linear._forward_impl
        linear.weight.skip_backward_post_hook = True
        linear._forward_impl = self._forward
        linear.backward_dw = self.backward_dw
        linear.register_wgrad_accumulation_and_reduce_hooks = self._hooks.append
        linear.ep_comm_wgrad = self

    def __len__(self) -> int:
        """Return the number of weight gradients still owed."""
        return len(self._saved)

    def _forward(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stand in for Megatron's ``_forward_impl``; routed experts do not communicate in it."""
        if not weight.requires_grad:
            return self._original_forward(input, weight, *args, **kwargs)
        output = _LinearWithDelayedWgrad.apply(input, weight, self._saved)
        bias = kwargs.get("bias")
        return output if bias is None else output + bias

    def backward_dw(self) -> None:
        """Compute the owed gradients, oldest first, and hand each to DDP.

        Raises:
            EPStateError: DDP was built without ``delay_wgrad_compute``.
        """
        if self._saved and not self._hooks and hasattr(self._weight, "main_grad"):
            raise EPStateError(
                "overlap_wgrad needs DistributedDataParallelConfig(delay_wgrad_compute=True): "
                "without it DDP reduces gradients that do not exist yet"
            )
        while self._saved:
            input, grad_output = self._saved.popleft()
            wgrad = grad_output.t().matmul(input.to(grad_output.dtype)).to(self._weight.dtype)
            self._weight.grad = wgrad if self._weight.grad is None else self._weight.grad + wgrad
            for hook in self._hooks:
                hook()


class _LinearWithDelayedWgrad(torch.autograd.Function):
    """``input @ weight.t()`` whose backward puts the weight gradient's operands aside.

    Under autocast the product has its type, and so have those of the gradients.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, saved: deque) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.saved = saved
        return torch.matmul(input, weight.t())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        input, weight = ctx.saved_tensors
        ctx.saved.append((input, grad_output))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return grad_output.matmul(weight.to(grad_output.dtype)), None, None


def delay_weight_gradients(experts: nn.Module) -> Callable[[], None]:
    """Put the experts' weight gradients off until the returned function is called.

    Raises:
        EPUnsupportedError: The experts have a weight that nobody here knows how to delay.
    """
    linears: list[nn.Module] = []
    delayed: set[nn.Parameter] = set()
    for module in experts.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            DelayedWeightGradient(module)
            delayed.add(module.weight)
        elif getattr(module, "wgrad_store", None) is not None:  # Transformer Engine
            delayed.update(module.parameters(recurse=False))
            _skip_unfinished_gradients(module)
        else:
            continue
        linears.append(module)
    for name, parameter in experts.named_parameters():
        if parameter not in delayed and not name.rpartition(".")[2].startswith("bias"):
            raise UNKNOWN_EXPERTS.error(f"{name} of {type(experts).__name__}")
    return functools.partial(_compute_owed, linears)


@torch.no_grad()
def _compute_owed(linears: list[Any]) -> None:
    """Compute what the layers owe, in the order of the backward pass.

    A frozen layer owes nothing, and Transformer Engine's may raise when asked for it.
    """
    for linear in reversed(linears):
        if _num_owed(linear):
            linear.backward_dw()


def at_end_of_backward(output: Tensor, call: Callable[[], None]) -> None:
    """Have every backward pass through `output` end with `call`."""
    if output.requires_grad:
        output.register_hook(lambda _: Variable._execution_engine.queue_callback(call))


def _skip_unfinished_gradients(linear: nn.Module) -> None:
    """Keep autograd from copying weight gradients that do not exist yet.

    Transformer Engine's backward returns the memory that a delayed gradient will be written to.
    Something else holds that memory, so autograd would copy it, on the way to the combine, for
    `backward_dw` to throw the copy away. Memory that nobody else holds is taken as it is.
    """

    def instead_of(grad: Tensor) -> Tensor | None:
        if linear.fuse_wgrad_accumulation:  # then the gradient is never in autograd's hands
            return None
        return _placeholder(grad.shape, grad.dtype, grad.device).detach()

    for name, parameter in linear.named_parameters(recurse=False):
        if name.startswith("weight"):  # gradients of biases are not delayed
            parameter.register_hook(instead_of)


@functools.cache
def _placeholder(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what stands for gradients of that shape; it is never read."""
    return torch.empty(shape, dtype=dtype, device=device)


def with_delayed_wgrad(config: Any) -> Any:
    """Return `config` for the routed experts alone, with Transformer Engine's delay.

    It is set after construction, because Megatron accepts the flag only with its 1F1B overlap.
    """
    config = copy.copy(config)
    config.delay_wgrad_compute = True
    return config


def _num_owed(linear: nn.Module) -> int:
    """Return how many weight gradients a module, of any kind, has put off and not computed."""
    if (delayed := getattr(linear, "ep_comm_wgrad", None)) is not None:
        return len(delayed)
    if (store := getattr(linear, "wgrad_store", None)) is not None and store.context:
        return store.context.qsize()
    return 0


def check_weight_gradients(model_chunks: Iterable[nn.Module]) -> None:
    """Check, before the optimizer step, that every delayed weight gradient has been computed.

    Raises:
        EPStateError: Names the layers that still owe gradients.
    """
    owed = [
        f"{name} ({count})"
        for chunk in model_chunks
        for name, module in chunk.named_modules()
        if (count := _num_owed(module))
    ]
    if owed:
        raise EPStateError(f"weight gradients were never computed: {', '.join(owed)}")
