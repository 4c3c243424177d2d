"""FP8 E4M3 in 1x128 blocks with the scales of low-latency dispatch, in plain torch.

These bits are what every backend sends. The scales follow the documented meaning of DeepEP's
low-latency kernels; the normal dispatch has others (`ep_comm.fp8`).

A block has 128 elements along hidden. Its amax is the largest of 1e-4 and all |x|, where NaN does
not count. Each element is multiplied by the block's multiplier in FP32, then rounded to E4M3, to
nearest, ties to even; what is too large becomes 448 with its sign.

=============  ====================================================  =======================
form           scale_inv, with which a byte gives its value back     multiplier
=============  ====================================================  =======================
FP32           amax / 448, divided as IEEE says                      448 / amax, likewise
POWER_OF_TWO   2^ceil(log2(amax / 448)), at most 2^126               its inverse, exact
UE8M0          the same: its exponent byte, four blocks in an int32  the same
=============  ====================================================  =======================

* A block of zeros has amax 1e-4; its bytes are zeros with their signs.
* NaN becomes byte 0x7F, whatever its sign and payload. No other byte is 0x7F, and none is 0xFF.
* An Inf makes amax infinite. In the FP32 form scale_inv is then Inf and the multiplier 0: Infs
  become NaN, finite elements zeros with their signs, and all of them times scale_inv are NaN. In
  the other forms scale_inv is 2^126: an Inf becomes 448 with its sign, which times scale_inv is
  Inf again.
* scale_inv is never NaN, and the byte of the UE8M0 form is from 105 to 253.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from ep_comm.errors import EPArgumentError
from ep_comm.fp8 import BLOCK, FP8_DTYPE, FP8_MAX

_LEAST_AMAX = 1e-4
_MANTISSA_BITS = 23
_LARGEST_EXPONENT = 253  # of a scale; its inverse is still a normal number
_SUM_OF_EXPONENTS = 254  # of a power of two and its inverse, both biased by 127
_NAN_BYTE = 0x7F


class ScaleForm(Enum):
    """What the scales of a low-latency dispatch are, see above."""

    FP32 = "fp32"
    POWER_OF_TWO = "power_of_two"
    UE8M0 = "ue8m0"

    __hash__ = object.__hash__  # an enum's own is a function in Python

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensor that holds the scales."""
        return torch.int32 if self is ScaleForm.UE8M0 else torch.float32

    @property
    def elements_per_scale(self) -> int:
        """Elements of a row that one element of the scale tensor stands for."""
        return 4 * BLOCK if self is ScaleForm.UE8M0 else BLOCK


def check_hidden(hidden: int, form: ScaleForm) -> None:
    """Raise `EPArgumentError` where a row of `hidden` elements cannot have scales of that form."""
    if hidden % form.elements_per_scale:
        raise EPArgumentError(
            f"FP8 with scales of the form {form.name} needs a hidden size that is a multiple of "
            f"{form.elements_per_scale}, got {hidden}"
        )


def quantize(x_TH: Tensor, form: ScaleForm) -> tuple[Tensor, Tensor]:
    """Quantise rows block by block.

    Args:
        x_TH: [T, H] BF16; H a multiple of 128, of 512 in the UE8M0 form.
        form: Of the scales.

    Returns:
        Bytes [T, H] ``float8_e4m3fn``, and scales: FP32 [T, H / 128], or int32 [T, H / 512] with
        the byte of the first of its four blocks lowest.

    Raises:
        EPArgumentError: H is not such a multiple.
    """
    num_tokens, hidden = x_TH.shape
    check_hidden(hidden, form)
    blocks = x_TH.float().view(num_tokens, hidden // BLOCK, BLOCK)
    amax = blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=-1).clamp(min=_LEAST_AMAX)
    fp8_max = torch.full_like(amax, FP8_MAX)  # a number would be divided by as its inverse
    if form is ScaleForm.FP32:
        scales, multiplier = amax / fp8_max, fp8_max / amax
    else:
        exponent = _exponent_above(amax / fp8_max).clamp(max=_LARGEST_EXPONENT)
        scales = _power_of_two(exponent)
        multiplier = _power_of_two(_SUM_OF_EXPONENTS - exponent)
        if form is ScaleForm.UE8M0:
            scales = exponent.to(torch.uint8).view(torch.int32)
    scaled = blocks * multiplier.unsqueeze(-1)
    # Clamped before the cast, which turns overflow into NaN and keeps the sign of a NaN.
    data = scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE).view(torch.uint8)
    data = torch.where(scaled.isnan(), _NAN_BYTE, data).to(torch.uint8)
    return data.view(num_tokens, hidden).view(FP8_DTYPE), scales


def _exponent_above(value: Tensor) -> Tensor:
    """Return the biased exponent of the least power of two that is no less than a positive FP32."""
    bits = value.view(torch.int32)
    mantissa = bits & ((1 << _MANTISSA_BITS) - 1)
    return (bits >> _MANTISSA_BITS) + (mantissa != 0)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) in FP32."""
    return (exponent << _MANTISSA_BITS).view(torch.float32)
