# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806, RUF005
"""Scale and mid of each group for the lattice quantizer: plain least squares at first, then least squares in the metric."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels import reference
from skvq.kernels.triton_gpu.e4m3 import ROUND, TINY, e4m3_decode, e4m3_encode
from skvq.kernels.triton_gpu.lanes import as_pairs
from skvq.kernels.triton_gpu.state import MID, OLD_MID, OLD_SCALE, SCALE, keep, kept
from skvq.kernels.triton_gpu.sweep import BLOCK, group_effects, load_slopes

FITS = tl.constexpr(reference.LATTICE_FITS)


@triton.jit
def rounded(x, half):
    """The nearest code 0 .. 2 half of ``x``, where x = 0 is the middle of that range."""
    return (tl.minimum(tl.maximum(x + half, 0.0), half + half) + ROUND) - ROUND


@triton.jit
def fit_range(y, code, state, unit, clip, half, t, inside, stride, tokens, T: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """Where the quantizer starts: scale and mid of each group, to ``state``, and the codes that go with them, to ``code``.

    They are taken from the clipped range, then refined by plain least squares (``reference.quantizer.fit_range``).
    """
    WIDTH: tl.constexpr = D // G
    PIECE: tl.constexpr = 32
    for group in range(G):
        at = t[:, None] * stride + group * WIDTH + tl.arange(0, PIECE)[None, :]
        low = tl.full([T, PIECE], float("inf"), tl.float32)
        high = tl.full([T, PIECE], float("-inf"), tl.float32)
        total = tl.zeros([T, PIECE], tl.float32)
        for i in range(0, WIDTH, PIECE):
            x = tl.load(y + at + i, mask=inside[:, None], other=0.0)
            low, high, total = tl.minimum(low, x), tl.maximum(high, x), total + x
        tiny, narrow = tl.load(unit + group) * TINY, tl.load(clip + group)
        least, most, mean = tl.min(low, 1) * narrow, tl.max(high, 1) * narrow, tl.sum(total, 1) / WIDTH
        scale, mid = tl.maximum((most - least) / (half + half), tiny), (most + least) * 0.5
        for _ in range(FITS):
            first = tl.zeros([T, PIECE], tl.float32)
            square = tl.zeros([T, PIECE], tl.float32)
            cross = tl.zeros([T, PIECE], tl.float32)
            inverse = 1.0 / scale
            for i in range(0, WIDTH, PIECE):
                x = tl.load(y + at + i, mask=inside[:, None], other=0.0)
                q = rounded((x - mid[:, None]) * inverse[:, None], half) - half
                first, square, cross = first + q, square + q * q, cross + q * (x - mean[:, None])
            a, b = tl.sum(first, 1), tl.sum(square, 1)
            spread = b - a * (a / WIDTH)
            fitted = tl.maximum(tl.sum(cross, 1) / tl.maximum(spread, 0.25), tiny)
            scale = tl.where(spread > 0.25, fitted, scale)  # two codes differ: at least 1/2
            mid = mean - scale * (a / WIDTH)
        inverse = 1.0 / scale
        for i in range(0, WIDTH, PIECE):
            x = tl.load(y + at + i, mask=inside[:, None], other=0.0)
            tl.store(code + at + i, rounded((x - mid[:, None]) * inverse[:, None], half).to(tl.uint8), mask=inside[:, None])
        keep(state, SCALE, group, scale, t, inside, tokens, G)
        keep(state, MID, group, mid, t, inside, tokens, G)
    tl.debug_barrier()


@triton.jit
def load_code_pairs(code, t, inside, stride, N: tl.constexpr):
    """All codes of T tokens as float16, two in a word: a tuple of D / BLOCK tensors uint32 [T, BLOCK / 2]."""
    at = code + t[:, None] * stride + tl.arange(0, BLOCK)[None, :]
    parts = ()
    for k in tl.static_range(N):
        x = tl.load(at + k * BLOCK, mask=inside[:, None], other=0).to(tl.float32)
        parts = parts + (as_pairs(x.to(tl.float16)),)
    return parts


@triton.jit
def fit(
    code, slopes, state, table, ones, diagonal, total, unit, scale_out, mid_out, down, half, last, t, inside, stride, tokens,
    T: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Scale and mid by least squares in the metric, one group after another (``reference.lattice``), to ``state``.

    The ``last`` time they are rounded to E4M3: scales of all groups first, then mids that are fitted to the rounded scales.
    The bytes go to ``scale_out`` and ``mid_out`` [T, KH, G].
    """
    N: tl.constexpr = D // BLOCK
    c = tl.arange(0, BLOCK)
    out = t * (stride // (D // G))
    codes = load_code_pairs(code, t, inside, stride, N)
    for group in range(G):
        keep(state, OLD_SCALE, group, kept(state, SCALE, group, t, inside, tokens, G), t, inside, tokens, G)
        keep(state, OLD_MID, group, kept(state, MID, group, t, inside, tokens, G), t, inside, tokens, G)
    tl.debug_barrier()
    for stage in range(1 + last):
        for group in range(G):
            cc = tl.zeros([T], tl.float32)
            c1 = tl.zeros([T], tl.float32)
            cs = tl.zeros([T], tl.float32)
            s1 = tl.zeros([T], tl.float32)
            for i in range(N // G):
                block = group * (N // G) + i
                effects = group_effects(codes, table, block, down, D, G)
                s = load_slopes(slopes, block, t, inside, stride)
                own = effects[0]
                for other in tl.static_range(G):
                    one = tl.load(ones + other * D + block * BLOCK + c)[None, :]
                    part = effects[other] - half * one  # of the centred codes
                    step = kept(state, SCALE, other, t, inside, tokens, G) - kept(state, OLD_SCALE, other, t, inside, tokens, G)
                    move = kept(state, MID, other, t, inside, tokens, G) - kept(state, OLD_MID, other, t, inside, tokens, G)
                    s -= step[:, None] * part + move[:, None] * one
                    own = tl.where(group == other, part, own)
                weight = tl.load(diagonal + block * BLOCK + c)[None, :]
                own, s = own * weight, s * weight
                at = code + t[:, None] * stride + block * BLOCK + c[None, :]
                q = tl.load(at, mask=inside[:, None], other=0).to(tl.float32) - half
                cc, c1 = cc + tl.sum(q * own, 1), c1 + tl.sum(own, 1)  # the metric is symmetric: 1^T M c
                cs, s1 = cs + tl.sum(q * s, 1), s1 + tl.sum(s, 1)
            one = tl.load(total + group)
            scale, mid = kept(state, SCALE, group, t, inside, tokens, G), kept(state, MID, group, t, inside, tokens, G)
            u = tl.load(unit + group)
            if stage == 0:
                determinant = cc * one - c1 * c1
                step = (cs * one - s1 * c1) / tl.where(determinant != 0, determinant, 1.0)
                good = (determinant > 1e-6 * cc * one) & (scale + step > u * TINY)
                step = tl.where(good, step, 0.0)
                move = tl.where(good, (s1 - step * c1) / one, 0.0)
                tl.debug_barrier()
                keep(state, SCALE, group, scale + step, t, inside, tokens, G)
                keep(state, MID, group, mid + move, t, inside, tokens, G)
                tl.debug_barrier()
            else:
                tl.store(mid_out + out + group, e4m3_encode((mid + s1 / one) / u).to(tl.uint8), mask=inside)
        tl.debug_barrier()
        if last != 0:
            for group in range(G):
                u = tl.load(unit + group)
                if stage == 0:
                    byte = e4m3_encode(kept(state, SCALE, group, t, inside, tokens, G) / u)
                    tl.store(scale_out + out + group, byte.to(tl.uint8), mask=inside)
                    keep(state, SCALE, group, e4m3_decode(byte) * u, t, inside, tokens, G)
                else:
                    byte = tl.load(mid_out + out + group, mask=inside, other=0).to(tl.int32)
                    keep(state, MID, group, e4m3_decode(byte) * u, t, inside, tokens, G)
            tl.debug_barrier()
