"""One group of numbers to codes and two E4M3 bytes: SKVQ's quantizer with metadata rounded first (``reference.quantize``)."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.numeric import e4m3
from skvq.kernels.numba_cpu.simd import as_bits, f32, largest, smallest, u8
from skvq.kernels.numba_cpu.tiles import FAST

REFINE_STEPS = 3  # reference.REFINE_STEPS
E4M3_MAX, E4M3_MIN = np.float32(448), np.float32(2.0**-9)


@njit(**FAST)
def e4m3_encode(x):
    """Nearest E4M3 byte, ties to even, saturating."""
    size = min(abs(x), E4M3_MAX)
    if size < np.float32(2.0**-6):
        byte = np.int32(np.rint(size * np.float32(512)))
    else:
        bits = as_bits(size)
        byte = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    return byte | ((as_bits(x) >> 24) & 128)


@njit(**FAST)
def quantize(values, count, levels, unit, clip, codes):
    """Write the codes of ``count`` float32 at ``values`` as bytes at ``codes``; returns scale byte | mid byte << 8."""
    y = f32(values)
    top, half = np.float32(levels - 1), np.float32((levels - 1) * 0.5)
    total = np.float32(0)
    for i in range(count):
        total += y[i]
    mean = total / np.float32(count)
    low, high = smallest(values, count) * clip, largest(values, count) * clip
    scale, mid = (high - low) / top, (high + low) * np.float32(0.5)
    tiny = unit * E4M3_MIN
    for _ in range(REFINE_STEPS):
        inverse = np.float32(1) / max(scale, tiny)
        codes_sum, squares, products = np.float32(0), np.float32(0), np.float32(0)
        for i in range(count):
            code = min(max(np.rint((y[i] - mid) * inverse + half), np.float32(0)), top) - half
            codes_sum += code
            squares += code * code
            products += code * (y[i] - mean)
        code_mean = codes_sum / np.float32(count)
        spread = squares - codes_sum * code_mean
        if spread > np.float32(0.25):  # two codes differ: at least 1/2
            scale = products / spread
        mid = mean - scale * code_mean
    scale_byte, mid_byte = e4m3_encode(max(scale, tiny) / unit), e4m3_encode(mid / unit)
    scale, mid = e4m3(scale_byte) * unit, e4m3(mid_byte) * unit
    inverse, out = np.float32(1) / scale, u8(codes)
    for i in range(count):
        out[i] = np.uint8(min(max(np.rint((y[i] - mid) * inverse + half), np.float32(0)), top))
    return scale_byte | (mid_byte << 8)
