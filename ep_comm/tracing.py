"""Guards against torch tracing a call, or using an earlier result, instead of making the call.

Neither may happen to communication, which other ranks take part in.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from ep_comm.errors import EPArgumentError, EPUnsupportedError

# What compiles the frames of this thread, or None.
_compiler: Callable[[], object] = lambda: sys.modules.get("torch._dynamo")  # noqa: E731
with contextlib.suppress(ImportError):  # an older torch has none
    from torch._C._dynamo.eval_frame import get_eval_frame_callback as _compiler

Args = ParamSpec("Args")
Result = TypeVar("Result")

_NOTHING = contextlib.nullcontext()
_PLAIN = (Tensor, torch.nn.Parameter)
_POLICIES_THAT_SAVE = (
    True,
    checkpoint.CheckpointPolicy.MUST_SAVE,
    checkpoint.CheckpointPolicy.PREFER_SAVE,
)


def untraced(method: Callable[Args, Result]) -> Callable[Args, Result]:
    """Have ``torch.compile`` break its graph at `method`, and run it as it is.

    ``torch.compiler.disable`` does that, but takes seconds to import what it needs, and a part of
    each call's time: a process that compiles nothing is spared the one, and a call from code that
    is not compiled the other.
    """
    disabled: Callable[Args, Result] | None = None

    @functools.wraps(method)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        nonlocal disabled
        if _compiler() is None:
            return method(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(method)
        return disabled(*args, **kwargs)

    # As disable() does: no caller is traced into it. (A function takes any attribute.)
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def plain_tensor(name: str, value: object) -> Tensor:
    """Return `value` as a tensor that kernels can read: one with memory of its own.

    Results of asynchronous collectives are waited for, and a pending negation is made.

    Raises:
        EPArgumentError: It is no tensor.
        EPUnsupportedError: It has no memory: a DTensor, a fake tensor, one of ``torch.func``.
    """
    if type(value) is Tensor:  # as a rule: in few steps
        try:
            if value.data_ptr() and not value.is_neg():
                return value
        except RuntimeError:  # see `_has_memory`
            pass
    if not isinstance(value, Tensor):
        raise EPArgumentError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value) not in _PLAIN and hasattr(value, "trigger_wait"):  # AsyncCollectiveTensor
        return value.clone() if value.requires_grad else value.trigger_wait()
    if not _has_memory(value):
        raise EPUnsupportedError(
            f"{name} is a {_kind(value)}, which has no memory that can be sent: pass the plain "
            f"tensor that it stands for (of a DTensor {name}.to_local())"
        )
    return value.resolve_neg() if value.is_neg() else value


def _has_memory(tensor: Tensor) -> bool:
    if type(tensor) not in _PLAIN and (
        hasattr(tensor, "__tensor_flatten__") or type(tensor).__name__ == "FakeTensor"
    ):
        return False  # a wrapper, whose address may not even be asked for
    try:
        # One on "meta" is refused for its device, like any other.
        return tensor.data_ptr() != 0 or not tensor.numel() or tensor.is_meta
    except RuntimeError:  # sparse, or under torch.func
        return False


def _kind(tensor: Tensor) -> str:
    if type(tensor) not in _PLAIN:
        return type(tensor).__name__
    if tensor.layout != torch.strided:
        return f"{tensor.layout} tensor"
    return f"tensor on {tensor.device} without data"


def check_not_saved(op: Any, *args: Any) -> None:
    """Refuse an op whose result selective checkpointing is to keep, before it has begun.

    Recomputation would then leave the op out, but not what belongs to it and other ranks wait for.

    Raises:
        EPUnsupportedError: Names the op.
    """
    if not torch._C._len_torch_dispatch_stack():
        return
    context = checkpoint.SelectiveCheckpointContext(is_recompute=False)
    for mode in _get_current_dispatch_mode_stack():
        if not isinstance(mode, checkpoint._CachingTorchDispatchMode):
            continue
        if mode.policy_fn(context, op, *args) in _POLICIES_THAT_SAVE:
            raise EPUnsupportedError(
                f"selective checkpointing cannot save the result of {op}: its routing would be "
                "exchanged again without it. Let the policy return PREFER_RECOMPUTE for it (that "
                "of ep_comm::combine may be saved)"
            )


def unseen() -> contextlib.AbstractContextManager:
    """Hide what happens inside from the modes that torch has.

    Selective checkpointing is one: it might leave half of it out when it recomputes.
    """
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else _NOTHING
