"""Tile loaders: packed codes of any width to one byte a code, in the order that ``products.dots`` reads.

Four codes that a dot product contracts make a word: keys ``[D / 4][token][4 channels]``, values ``[tile / 4][lane][4 tokens]``
with D rounded up to 32 lanes. So one dot product serves all widths, and what is unpacked once serves all queries of a kv head.
``levels`` (3, 4, 8, 16, 256) stands for the width. Head sizes of 48 and more go through shuffles, 16 rows at a time, if 16
divides them (32 for single bits); others by words or bytes.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba import njit

from skvq.kernels.numba_cpu import spread
from skvq.kernels.numba_cpu.simd import i8, i32, u8

SLOTS, TRITS = 32, 5  # layout.TRIT_SLOTS, layout.TRIT_PLANES; copied (``compiled.source_stamp``)
RETAINED = 128  # layout.RETAINED_FLAG, likewise
FAST = {"fastmath": True, "error_model": "numpy", "nogil": True, "forceinline": True}
"""Options of jitted functions. They are inlined: a callee that is not may be compiled differently, and round so, in the process
that compiles a kernel than in those that read it from the cache: the first run would pack other bytes."""
CALLED = {**FAST, "forceinline": False}
"""Options of functions whose arithmetic is all in vector instructions of their own (``products.py``): the same wherever it is
compiled, so it need not be compiled wherever it is used. That halves the kernels, and their registers last."""
LANE_BLOCK = 32


@njit(**FAST)
def round_up(count, multiple):
    return (count + multiple - 1) // multiple * multiple


@njit(**FAST)
def load_keys(source, target, levels, size, tile):
    """Codes of keys ``[token][bytes]`` at ``source`` to ``[size / 4][token][4]`` at ``target``."""
    if levels == 3:
        _key_trits(source, target, size, tile)
    elif levels == 4:
        _key_planes(source, target, 2, 0, size, tile)
    elif levels == 8:
        _key_planes(source, target, 2, 0, size, tile)
        _key_planes(source + tile * size // 4, target, 1, 2, size, tile)
    elif levels == 16:
        _key_planes(source, target, 4, 0, size, tile)
    else:
        _key_planes(source, target, 8, 0, size, tile)


@njit(**FAST)
def load_values(source, target, levels, size, tile):
    """Codes of values ``[bytes][token]`` at ``source`` to ``[tile / 4][lane][4]`` at ``target``."""
    if levels == 3:
        _value_trits(source, target, size)
    elif levels == 4:
        _value_planes(source, target, 2, 0, size, tile)
    elif levels == 8:
        _value_planes(source, target, 2, 0, size, tile)
        _value_planes(source + tile * size // 4, target, 1, 2, size, tile)
    elif levels == 16:
        _value_planes(source, target, 4, 0, size, tile)
    else:
        _value_planes(source, target, 8, 0, size, tile)


@njit(**FAST)
def _key_planes(source, target, width, place, size, tile):
    row = size * width // 8  # bytes of a token in this plane set
    words, step = row // 4, tile * 4
    plane = words * step
    if (row == 32 and 1 < width < 8) or (row == 16 and width <= 2) or (row == 8 and width == 1):
        for token in range(0, tile, 16):
            at, to = source + token * row, target + token * 4
            if width == 4:
                spread.spread_4x8(at, row, to, plane, step)
            elif width == 2 and row == 32:
                spread.spread_2x8(at, row, to, plane, step)
            elif width == 2:
                spread.spread_2x4(at, row, to, plane, step)
            elif row == 16:
                spread.spread_1x4(at, row, to, plane, step)
            else:
                spread.spread_1x2(at, row, to, plane, step)
    elif row % 4 == 0 and words >= (8 if width == 8 else 4):
        block = 8 if words >= 8 else 4
        for token in range(0, tile, 16):
            for start in range(0, words, block):
                word = min(start, words - block)  # the last block may repeat some of the one before
                at, to = source + token * row + word * 4, target + word * step + token * 4
                if block == 8:
                    _spread_eight(width, at, row, to, plane, step)
                else:
                    _spread_four(width, at, row, to, plane, step)
    elif row % 4 == 0:
        for word in range(words):
            for p in range(8 // width):
                to = target + (p * words + word) * step
                _spread_words(source + word * 4, words, to, tile, p * width, width, place)
    else:
        packed, codes, mask = u8(source), i8(target), (1 << width) - 1
        for p in range(8 // width):
            for b in range(row):
                to = ((p * row + b) // 4) * step + (p * row + b) % 4
                for token in range(tile):
                    kept = 0 if place == 0 else codes[to + token * 4]
                    codes[to + token * 4] = kept | ((packed[token * row + b] >> (p * width)) & mask) << place


@njit(**FAST)
def _value_planes(source, target, width, place, size, tile):
    rows = size * width // 8  # byte rows of this plane set
    step = round_up(size, LANE_BLOCK) * 4
    if rows >= 16:
        for start in range(0, rows, 16):
            row = min(start, rows - 16)
            for word in range(0, tile // 4, 8):
                at, to = source + row * tile + word * 4, target + word * step + row * 4
                _spread_eight(width, at, tile, to, rows * 4, step)
    elif rows == 8 and width == 1:
        for word in range(0, tile // 4, 8):
            spread.spread_1_half(source + word * 4, tile, target + word * step, 64, step)
    else:
        for word in range(tile // 4):
            for p in range(8 // width):
                to = target + word * step + p * rows * 4
                _spread_words(source + word * 4, tile // 4, to, rows, p * width, width, place)


@njit(**FAST)
def _spread_eight(width, source, stride, target, plane, step):
    """Sixteen rows of eight words to one byte a code, by the shuffles of that width."""
    if width == 1:
        spread.spread_1_rows(source, stride, target, plane, step)
    elif width == 2:
        spread.spread_2_rows(source, stride, target, plane, step)
    elif width == 4:
        spread.spread_4_rows(source, stride, target, plane, step)
    else:
        spread.spread_8_rows(source, stride, target, plane, step)


@njit(**FAST)
def _spread_four(width, source, stride, target, plane, step):
    """The same of four words, but for codes of 8 bits."""
    if width == 1:
        spread.spread_1_four(source, stride, target, plane, step)
    elif width == 2:
        spread.spread_2_four(source, stride, target, plane, step)
    else:
        spread.spread_4_four(source, stride, target, plane, step)


@njit(**FAST)
def _spread_words(source, step, target, count, shift, width, place):
    """Four codes of each of ``count`` words, ``step`` words apart: ``width`` bits from ``shift`` on in every byte, moved up by
    ``place``; a place above 0 adds to what lies at the target."""
    packed, codes, mask = i32(source), i32(target), np.int32((1 << width) - 1) * np.int32(0x01010101)
    for i in range(count):
        found = ((packed[i * step] >> shift) & mask) << place
        codes[i] = found if place == 0 else codes[i] | found


@njit(**FAST)
def _key_trits(source, target, size, tile):
    step, plane = tile * 4, SLOTS * 4
    if size % 32 == 0:
        for slot in range(0, SLOTS, 16):
            for word in range(0, size // 4, 8):
                spread.spread_trits(source + slot * size + word * 4, size, target + word * step + slot * 4, plane, step)
        return
    packed, codes = u8(source), i8(target)
    for slot in range(SLOTS):
        for channel in range(size):
            value = int(packed[slot * size + channel])
            for p in range(TRITS):
                value *= 3
                codes[(channel // 4) * step + (p * SLOTS + slot) * 4 + channel % 4] = value >> 8
                value &= 255


@njit(**FAST)
def _value_trits(source, target, size):
    step = round_up(size, LANE_BLOCK) * 4
    plane = SLOTS // 4 * step
    if size % 16 == 0:
        for row in range(0, size, 16):
            spread.spread_trits(source + row * SLOTS, SLOTS, target + row * 4, plane, step)
        return
    packed, codes = u8(source), i8(target)
    for channel in range(size):
        for slot in range(SLOTS):
            value = int(packed[channel * SLOTS + slot])
            for p in range(TRITS):
                value *= 3
                token = p * SLOTS + slot
                codes[(token // 4) * step + channel * 4 + token % 4] = value >> 8
                value &= 255


@njit(**FAST)
def load_value_rows(source, target, levels, size, tile):
    """Codes of values ``[bytes][token]`` at ``source`` to ``[channel][token]`` at ``target``, one byte each."""
    if levels == 3:
        for channel in range(size):
            row, out = u8(source + channel * SLOTS), u8(target + channel * tile)
            for p in range(TRITS):
                weight = 3 ** np.int32(p + 1)
                for slot in range(SLOTS):
                    digit = np.int32(row[slot]) * weight
                    out[p * SLOTS + slot] = ((digit >> 8) % 3) & 255
        return
    width = 2 if levels <= 8 else 4 if levels == 16 else 8
    _row_planes(source, target, width, 0, size, tile)
    if levels == 8:
        _row_planes(source + tile * size // 4, target, 1, 2, size, tile)


@njit(**FAST)
def _row_planes(source, target, width, place, size, tile):
    rows, mask = size * width // 8, np.uint8((1 << width) - 1)
    for channel in range(size):
        packed, codes = u8(source + channel % rows * tile), u8(target + channel * tile)
        shift = np.uint8(channel // rows * width)
        for t in range(tile):
            code = ((packed[t] >> shift) & mask) << place
            codes[t] = code if place == 0 else codes[t] | code
