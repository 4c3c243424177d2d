"""What low-latency dispatch and combine must give, as plainly as possible: loops over tokens.

Shares no code with the package. Rows are numpy: BF16 as uint16 bit patterns, FP8 as bytes. Scales
have one of three forms: "fp32", "power_of_two", "ue8m0".
"""

from __future__ import annotations

import math
import struct

import numpy as np
from oracle import bf16_to_fp32, fp32_to_bf16, local_experts

BLOCK = 128
WORD = 8  # BF16 elements of 16 bytes
F32 = np.float32


def _e4m3_value(byte: int) -> float:
    exponent, mantissa = byte >> 3, byte & 7
    if exponent == 0:
        return mantissa / 8 * 2.0**-6
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7)


_POSITIVE = np.array([_e4m3_value(byte) for byte in range(0x7F)])  # the last one is 448
_MIDDLES = (_POSITIVE[:-1] + _POSITIVE[1:]) / 2


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """Bytes of FP32 values: to nearest, ties to even, too large ones to 448, NaN to 0x7F."""
    bytes_ = np.empty(len(values), np.uint8)
    for i, value in enumerate(values):
        if math.isnan(value):
            bytes_[i] = 0x7F
            continue
        below = int(np.searchsorted(_MIDDLES, abs(float(value)), side="left"))
        if below < len(_MIDDLES) and abs(float(value)) == _MIDDLES[below] and below % 2:
            below += 1  # in the middle: the even one of both
        bytes_[i] = below | (0x80 if math.copysign(1.0, value) < 0 else 0)
    return bytes_


def from_e4m3(byte: int) -> float:
    if byte & 0x7F == 0x7F:
        return math.nan
    return math.copysign(_e4m3_value(byte & 0x7F), -1.0 if byte & 0x80 else 1.0)


def scale_and_multiplier(amax: np.float32, form: str) -> tuple[np.float32, np.float32]:
    with np.errstate(all="ignore"):
        if form == "fp32":
            return F32(amax) / F32(448), F32(448) / F32(amax)
        quotient = float(F32(amax) / F32(448))
    if math.isinf(quotient):
        exponent = 126
    else:
        mantissa, exponent = math.frexp(quotient)  # 0.5 <= mantissa < 1
        exponent = min(exponent - 1 if mantissa == 0.5 else exponent, 126)
    return F32(2.0**exponent), F32(2.0**-exponent)


def quantize(row: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of one BF16 row, and its scales: FP32, or int32 of four exponent bytes."""
    values = bf16_to_fp32(row)
    data, scales = [], []
    for first in range(0, len(row), BLOCK):
        block = values[first : first + BLOCK]
        amax = F32(1e-4)
        for value in block:
            if abs(value) > amax:  # not of NaN
                amax = F32(abs(value))
        scale, multiplier = scale_and_multiplier(amax, form)
        with np.errstate(all="ignore"):
            data.append(to_e4m3((block * multiplier).astype(F32)))
        scales.append(scale)
    if form != "ue8m0":
        return np.concatenate(data), np.array(scales, F32)
    exponents = bytes(int(math.log2(scale)) + 127 for scale in scales)
    packed = struct.unpack(f"<{len(scales) // 4}i", exponents)
    return np.concatenate(data), np.array(packed, np.int32)


def arrived(row: np.ndarray) -> np.ndarray:
    """A BF16 row as it arrives: no 16 bytes of it are all ones."""
    row = row.copy()
    for first in range(0, len(row), WORD):
        if all(bits == 0xFFFF for bits in row[first : first + WORD]):
            row[first] = 0x7FFF
    return row


def received(topk_idx: list[np.ndarray], rank: int, per_rank: int) -> list[list[tuple[int, int]]]:
    """For each expert of `rank` its rows in order, as (source rank, token)."""
    return [
        [
            (source, token)
            for source, topk in enumerate(topk_idx)
            for token in range(len(topk))
            if expert in local_experts(topk[token], rank, per_rank)
        ]
        for expert in range(per_rank)
    ]


def combine(
    topk: np.ndarray,
    weights: np.ndarray,
    outputs: dict[int, np.ndarray],
    per_rank: int,
    hidden: int,
) -> np.ndarray:
    """One token's combined row, BF16; ``outputs[expert]`` is its row at that expert."""
    partials: list[np.ndarray] = []
    rank_of_partial: list[int] = []
    with np.errstate(all="ignore"):
        for expert in sorted(outputs):
            weight = F32(weights[list(topk).index(expert)])
            product = (weight * bf16_to_fp32(outputs[expert])).astype(F32)
            rank = expert // per_rank
            if rank_of_partial and rank_of_partial[-1] == rank:
                partials[-1] = (partials[-1] + product).astype(F32)
            else:
                partials.append(product)
                rank_of_partial.append(rank)
        if not partials:
            return np.zeros(hidden, np.uint16)
        on_the_way = [bf16_to_fp32(fp32_to_bf16(partial)) for partial in partials]
        total = on_the_way[0]
        for partial in on_the_way[1:]:
            total = (total + partial).astype(F32)
    return fp32_to_bf16(total)
