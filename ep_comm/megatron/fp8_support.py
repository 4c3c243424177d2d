"""What FP8 on the wire and FP8 experts need, and what they lose together."""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from packaging.version import Version

from ep_comm import fp8
from ep_comm.backends.nvlink import support as nvlink_support
from ep_comm.errors import EPUnsupportedError
from ep_comm.megatron.options import EPOptions

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# The only recipe whose GEMMs see the same values with and without FP8 on the wire.
EXACT_RECIPE = "blockwise"
_FP8_CAPABILITY = (8, 9)
_MIN_TE = "2.3"  # the first with block scaling, and with delayed gradients of grouped experts


def check_fp8(config: TransformerConfig, options: EPOptions) -> None:
    """Raise where FP8, on the wire or in the experts, cannot work; warn where it is not exact.

    Raises:
        EPArgumentError: The hidden size is not a multiple of the blocks.
        EPUnsupportedError: Scales that are no powers of two, a GPU without FP8.
    """
    wire_flags = [
        flag
        for flag, is_set in (
            ("--ep-fp8-dispatch", options.fp8_dispatch),
            ("--ep-fp8-grad-dispatch", options.fp8_grad_dispatch),
        )
        if is_set
    ]
    has_exact_recipe = bool(config.fp8) and config.fp8_recipe == EXACT_RECIPE
    if wire_flags or has_exact_recipe:
        fp8.check_scales()
    if wire_flags:
        fp8.check_hidden(config.hidden_size)
        if torch.cuda.is_available():
            nvlink_support.check_fp8_hidden(config.hidden_size)
    if torch.cuda.is_available() and (wire_flags or config.fp8):
        _check_gpu([*wire_flags, *(["--fp8-format"] if config.fp8 else [])])
    if wire_flags and config.fp8 and not has_exact_recipe:
        _warn(
            f"{' and '.join(wire_flags)} with --fp8-recipe {config.fp8_recipe}: the experts "
            "quantise what has arrived once more, with other scales, so their outputs are not "
            f"those of BF16 on the wire. With --fp8-recipe {EXACT_RECIPE} they are, bit for bit"
        )


def check_transformer_engine(config: TransformerConfig, options: EPOptions) -> None:
    """Raise `EPUnsupportedError` where a switch needs a newer Transformer Engine than there is."""
    switches = []
    if options.overlap_wgrad and config.moe_grouped_gemm:
        switches.append("--ep-overlap-wgrad with --moe-grouped-gemm")
    if config.fp8 and config.fp8_recipe == EXACT_RECIPE:
        switches.append(f"--fp8-recipe {EXACT_RECIPE}")
    version = _transformer_engine()
    if switches and version is not None and Version(version) < Version(_MIN_TE):
        raise EPUnsupportedError(
            f"{', '.join(switches)}: needs Transformer Engine {_MIN_TE} or newer, this is {version}"
        )


def _check_gpu(flags: list[str]) -> None:
    capability = torch.cuda.get_device_capability()
    if capability < _FP8_CAPABILITY:
        raise EPUnsupportedError(
            f"{', '.join(flags)}: {torch.cuda.get_device_name()} (compute capability "
            f"{'.'.join(map(str, capability))}) has no FP8, which begins with "
            f"{'.'.join(map(str, _FP8_CAPABILITY))}. Leave them out"
        )


def _transformer_engine() -> str | None:
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _warn(text: str) -> None:
    """Once a process, not once a layer, and on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(text, stacklevel=2)
