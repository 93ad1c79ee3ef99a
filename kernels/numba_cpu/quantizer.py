"""``reference.quantize`` for one group of one token."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.numeric import e4m3
from skvq.kernels.numba_cpu.simd import as_bits, f32, largest, smallest, u8
from skvq.kernels.numba_cpu.tiles import FAST

REFINE_STEPS = 3  # reference.REFINE_STEPS; copied, as are those of layout.py below (``compiled.source_stamp``)
E4M3_MAX, E4M3_MIN, E4M3_LARGEST = np.float32(448), np.float32(2.0**-9), 0x7E
ENOUGH = np.float32(1 + 2.0**-16)  # reference.ENOUGH


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
def encode_scale(x, levels):
    """``reference.encode_scale``: the nearest byte, but at 256 levels the next one up where that is below ``x``."""
    byte = e4m3_encode(x)
    return byte + np.int32(levels == 256 and byte < E4M3_LARGEST and e4m3(byte) * ENOUGH < x)


@njit(fastmath={"nnan", "ninf", "nsz"}, error_model="numpy", nogil=True, forceinline=True)
def round_codes(values, count, scale, mid, top, half, out):
    """Centred codes, float32 at ``out``. No reordering, no reciprocals: ties must round as in the reference."""
    y, code = f32(values), f32(out)
    for i in range(count):
        code[i] = min(max(np.rint((y[i] - mid) / scale + half), np.float32(0)), top) - half


@njit(**FAST)
def quantize(values, count, levels, unit, clip, rounded, codes):
    """Quantize ``count`` float32 at ``values``: codes as bytes to ``codes``; returns scale byte | mid byte << 8.

    ``rounded`` is scratch of ``count`` float32.
    """
    y, code = f32(values), f32(rounded)
    top, half = np.float32(levels - 1), np.float32((levels - 1) * 0.5)
    total = np.float32(0)
    for i in range(count):
        total += y[i]
    mean, tiny = total / np.float32(count), unit * E4M3_MIN
    low, high = smallest(values, count) * clip, largest(values, count) * clip
    scale, mid = max((high - low) / top, tiny), (high + low) * np.float32(0.5)
    for _ in range(REFINE_STEPS):
        round_codes(values, count, scale, mid, top, half, rounded)
        codes_sum, squares, products = np.float32(0), np.float32(0), np.float32(0)
        for i in range(count):
            codes_sum += code[i]
            squares += code[i] * code[i]
            products += code[i] * (y[i] - mean)
        code_mean = codes_sum / np.float32(count)
        spread = squares - codes_sum * code_mean
        if spread > np.float32(0.25):  # two codes differ: at least 1/2
            scale = max(products / spread, tiny)
        mid = mean - scale * code_mean
    mid_byte = e4m3_encode(mid / unit)
    exact = e4m3(mid_byte) * unit
    if levels == 256:
        scale += abs(exact - mid) / half
    scale_byte = encode_scale(scale / unit, levels)
    round_codes(values, count, e4m3(scale_byte) * unit, exact, top, half, rounded)
    out = u8(codes)
    for i in range(count):
        out[i] = np.uint8(code[i] + half)
    return scale_byte | (mid_byte << 8)
