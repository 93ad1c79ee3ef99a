# mypy: ignore-errors
# ruff: noqa: N803
"""E4M3 (FP8) bytes in integer arithmetic: cards before sm_89 have no instruction for them."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels import reference
from skvq.kernels.layout import E4M3_LARGEST, E4M3_MIN

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest even integer
TINY = tl.constexpr(E4M3_MIN)
LARGEST = tl.constexpr(E4M3_LARGEST)
ENOUGH = tl.constexpr(reference.ENOUGH)


@triton.jit
def e4m3_encode(x):
    """The byte (as int32) of the nearest E4M3 number: ties to even, saturating at +-448."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    below = ((magnitude * 512.0 + ROUND) - ROUND).to(tl.int32)
    return tl.where(magnitude < 0.015625, below, normal) | tl.where(x < 0, 0x80, 0)


@triton.jit
def encode_scale(x, LEVELS: tl.constexpr):
    """``reference.encode_scale``: the nearest byte, but at 256 levels the next one up where that is below ``x``."""
    byte = e4m3_encode(x)
    if LEVELS == 256:
        byte += tl.where((byte < LARGEST) & (e4m3_decode(byte) * ENOUGH < x), 1, 0)
    return byte


@triton.jit
def e4m3_decode(byte):
    """The value, float32, of an E4M3 byte given as int32."""
    half = ((byte & 0x7F) << 7) | ((byte & 0x80) << 8)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
