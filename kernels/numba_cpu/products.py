"""Small matrix products over blocks of 32 lanes: bytes by two-limb integers, and float32."""

# mypy: ignore-errors
from __future__ import annotations

from numba import njit

from skvq.kernels.numba_cpu import simd
from skvq.kernels.numba_cpu.tiles import FAST, LANE_BLOCK


@njit(**FAST)
def dots(rows, codes, step, count, limbs, limb_stride, row_stride, out, out_stride, shift, lanes, ahead, ahead_bytes):
    """``out[row, lane] = sum_j codes[j][lane] . limbs[row][j]`` as float32, ``lanes`` a multiple of 32.

    Meanwhile ``ahead_bytes`` at ``ahead`` are fetched for later, a little with each block: a burst would stall the loads.
    """
    part = ahead_bytes * LANE_BLOCK // lanes
    for lane in range(0, 4 * lanes, 4 * LANE_BLOCK):
        simd.prefetch(ahead, part)
        ahead += part
        for m in range(0, rows, 4):
            left = rows - m
            a, o = limbs + m * row_stride, out + m * out_stride + lane
            if left >= 4:
                simd.dot_4(codes + lane, step, count, a, limb_stride, row_stride, o, out_stride, shift)
            elif left == 3:
                simd.dot_3(codes + lane, step, count, a, limb_stride, row_stride, o, out_stride, shift)
            elif left == 2:
                simd.dot_2(codes + lane, step, count, a, limb_stride, row_stride, o, out_stride, shift)
            else:
                simd.dot_1(codes + lane, step, count, a, limb_stride, row_stride, o, out_stride, shift)


@njit(**FAST)
def mix(rows, table, step, count, coefs, coef_stride, out, out_stride, lanes):
    """``out[row, lane] += sum_j coefs[row, j] * table[j, lane]``, ``lanes`` a multiple of 32, strides in bytes."""
    for lane in range(0, 4 * lanes, 4 * LANE_BLOCK):
        for m in range(0, rows, 4):
            left = rows - m
            a, o = coefs + m * coef_stride, out + m * out_stride + lane
            if left >= 4:
                simd.mix_4(table + lane, step, count, a, coef_stride, o, out_stride)
            elif left == 3:
                simd.mix_3(table + lane, step, count, a, coef_stride, o, out_stride)
            elif left == 2:
                simd.mix_2(table + lane, step, count, a, coef_stride, o, out_stride)
            else:
                simd.mix_1(table + lane, step, count, a, coef_stride, o, out_stride)
