"""What combine adds to its sums."""

from __future__ import annotations

import torch
from torch import Tensor

from ep_comm.deep_ep.behind import behind
from ep_comm.errors import EPArgumentError
from ep_comm.handle import CombineOutput


def checked_bias(bias: object, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Return the tensors of a bias: one, or a pair of them, each of that shape.

    Raises:
        EPArgumentError: It is something else.
    """
    tensors: tuple = bias if isinstance(bias, tuple) and len(bias) == 2 else (bias,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.device != device:
            what = f"{list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise EPArgumentError(
                f"bias must be one or two tensors {list(shape)} on {device}, got {what}"
            )
    return tensors


def with_bias(
    out: CombineOutput, tensors: tuple[Tensor, ...], stream: torch.cuda.Stream | None
) -> CombineOutput:
    """Add a bias to sums, in FP32 and rounded again, on the stream on which they were made.

    Args:
        out: Of the combine.
        tensors: The bias.
        stream: Where asynchronous operations run.
    """
    combined = out.combined_x

    def add() -> None:
        total = combined.float()
        for tensor in tensors:
            total += tensor.float()
        combined.copy_(total)

    return out._replace(event=behind(out.event, stream, add, combined, *tensors))
