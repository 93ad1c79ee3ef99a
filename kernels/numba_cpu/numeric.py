"""Number formats: E4M3 metadata, exp2, 16-bit floats, and the two int8 limbs of a dot product."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu.simd import as_bits, as_float, f32, half_to_float, i8, i32, u16
from skvq.kernels.numba_cpu.tiles import FAST, RETAINED

HIDDEN = np.float32(-1e30)  # added to the score of a token that must not be seen
NOTHING = np.float32(-1e20)  # running maximum before anything is seen: far above HIDDEN, far below any score
LARGEST_BITS, NOT_A_NUMBER = np.int32(0x7F7FFFFF), np.int32(0x7FC00000)  # bits of float32, which fast-math code may compare
BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
E4M3_NORMAL, E4M3_SMALL = np.int32(120 << 23), np.int32(121 << 23)
SMALLEST_NORMAL = np.float32(2.0**-6)
LEAST = np.float32(1e-30)


@njit(**FAST)
def e4m3(byte):
    """Value of an E4M3 byte, by bit arithmetic that needs no denormals: a process may flush them to zero."""
    size = (byte & 127) << 20
    normal = as_float(size + E4M3_NORMAL)
    small = as_float(size + E4M3_SMALL) - SMALLEST_NORMAL
    value = small if (byte & 127) < 8 else normal
    return as_float(as_bits(value) | ((byte & 128) << 24))


@njit(**FAST)
def decode_meta(source, target, bias, groups, tile):
    """Decode metadata words ``[G][tile]`` of one kv head.

    Writes float32 ``[4][G][tile]`` to ``target`` (key scales, key mids, value scales, value mids), and to ``bias`` float32
    [tile], what to add to a token's score: HIDDEN if it is retained elsewhere, else 0.
    """
    words, count = i32(source), groups * tile
    key_scale, key_mid = f32(target), f32(target + 4 * count)
    value_scale, value_mid = f32(target + 8 * count), f32(target + 12 * count)
    for i in range(count):
        word = words[i]
        key_scale[i] = e4m3(word & 127)
        key_mid[i] = e4m3((word >> 8) & 255)
        value_scale[i] = e4m3((word >> 16) & 255)
        value_mid[i] = e4m3((word >> 24) & 255)
    hidden = f32(bias)
    for t in range(tile):
        hidden[t] = HIDDEN if words[t] & RETAINED else np.float32(0)


@njit(**FAST)
def label_meta(job, work, label, part):
    """Address of float32 [tile] at ``w_meta``, metadata of the group ``label`` of all heads.

    ``part``: 0 key scale, 1 key mid, 2 value scale, 3 value mid (``decode_meta``, one kv head after another).
    """
    head, group = label // job.groups, label % job.groups
    return work + job.w_meta + 4 * job.tile * ((4 * head + part) * job.groups + group)


EXP2 = (  # coefficients of a polynomial for 2^f, |f| <= 1/2, the highest power first
    1.5403530393381609e-4, 1.3333558146428443e-3, 9.618129107628477e-3, 5.5504108664821580e-2, 2.4022650695910072e-1,
    6.9314718055994531e-1, 1.0,
)  # fmt: skip


@njit(**FAST)
def exp2(x):
    """2**x for x <= 0 within 2e-7, 0 below 2**-126."""
    clamped = max(x, np.float32(-126))
    whole = np.floor(clamped + np.float32(0.5))
    f = clamped - whole
    p = np.float32(EXP2[0])
    p = p * f + np.float32(EXP2[1])
    p = p * f + np.float32(EXP2[2])
    p = p * f + np.float32(EXP2[3])
    p = p * f + np.float32(EXP2[4])
    p = p * f + np.float32(EXP2[5])
    p = p * f + np.float32(EXP2[6])
    power = as_float((np.int32(whole) + np.int32(127)) << 23)
    return p * power if x >= np.float32(-126) else np.float32(0)


@njit(**FAST)
def limb_bits(levels):
    """Bits of the low limb: 8, or 7 for 8-bit codes so that no pair of products leaves int16 (``products._multiply_add``)."""
    return 7 if levels == 256 else 8


@njit(**FAST)
def limb_limit(bits):
    """Largest integer that two limbs can hold."""
    return np.float32(32639) if bits == 8 else np.float32(8255)


@njit(**FAST)
def split_limbs(values, scale, count, low, high, bits):
    """Round ``values * scale`` to integers, store them as ``high * 2**bits + low`` in int8, and return their sum."""
    x, lows, highs = f32(values), i8(low), i8(high)
    half = np.int32(1 << (bits - 1))
    total = np.float32(0)
    for i in range(count):
        whole = np.rint(x[i] * scale)
        total += whole
        v = np.int32(whole)
        rest = ((v + half) & (2 * half - 1)) - half
        lows[i] = rest
        highs[i] = (v - rest) >> bits
    return total


@njit(**FAST)
def row_to_float(source, target, count, kind):
    """``count`` numbers of a 16-bit row to float32."""
    out = f32(target)
    if kind == BFLOAT16:
        bits = u16(source)
        for i in range(count):
            out[i] = as_float(np.int32(bits[i]) << 16)
    else:
        whole = count // 16 * 16
        for i in range(0, whole, 16):
            half_to_float(source + 2 * i, target + 4 * i)
        bits = u16(source)
        for i in range(whole, count):
            word = np.int32(bits[i])
            size = as_bits(as_float((word & 0x7FFF) << 13) * np.float32(2.0**112))
            if word & 0x7C00 == 0x7C00:  # infinite or NaN
                size |= 0x7F800000
            out[i] = as_float(size | ((word & 0x8000) << 16))
