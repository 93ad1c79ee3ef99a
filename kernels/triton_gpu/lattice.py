# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806
"""Codes of a head chosen together (``reference.quantize_lattice``): a token is a lane, channels come one after another.

Everything lies token-contiguous, [rows][tokens], so that a step of the sequential algorithm is one coalesced vector operation.
Channels are taken ROWS at a time: one dot brings what all channels do to these (the ``slope``, three TF32 products, as good as
float32), then they act on one another, four at a time in registers: all sixteen took the compiler five times as long, for a
pass of it takes time with the cube of a chain. About 11 D^2 multiply-adds a token on tensor cores and 20 D instructions a
pass off them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import HeadSide
from skvq.kernels.layout import LEVELS
from skvq.kernels.triton_gpu.pack import ROUND, TINY, e4m3_decode, e4m3_encode

LANES = tl.constexpr(64)  # tokens of a program, one a lane of two warps
ROWS = tl.constexpr(16)  # channels that one dot serves
DEPTH = tl.constexpr(32)  # channels contracted at a time
FITS = tl.constexpr(reference.LATTICE_FITS)
ROUNDS = tl.constexpr(reference.LATTICE_ROUNDS)
SWEEPS = tl.constexpr(reference.LATTICE_SWEEPS)
SCALE, INVERSE, MID, MOVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # rows of a group's state


@triton.jit
def rounded(x, half):
    """Nearest centred code of ``x``, in codes from the middle of the range."""
    return ((tl.minimum(tl.maximum(x + half, 0.0), half + half) + ROUND) - ROUND) - half


@triton.jit
def product(matrix, numbers, first, begin, end, t, inside, tokens, D: tl.constexpr):
    """``matrix[first .. first+15, begin .. end-1] numbers[begin .. end-1]``, float32 [ROWS, LANES]."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, DEPTH)
    acc = tl.zeros([ROWS, LANES], tl.float32)
    for k in range(begin, end, DEPTH):
        there = k + c < end
        a = tl.load(matrix + (first + r)[:, None] * D + (k + c)[None, :], mask=there[None, :], other=0.0)
        at = (k + c)[:, None] * tokens + t[None, :]
        b = tl.load(numbers + at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    return acc


@triton.jit
def fit_range(y, state, group, unit, clip, half, t, inside, tokens, WIDTH: tl.constexpr, G: tl.constexpr):
    """First scale and mid of a group: the clipped range, then plain least squares (``reference._fit_range``)."""
    low = tl.full([LANES], float("inf"), tl.float32)
    high = tl.full([LANES], float("-inf"), tl.float32)
    mean = tl.zeros([LANES], tl.float32)
    rows = y + group * WIDTH * tokens + t
    for i in range(WIDTH):
        x = tl.load(rows + i * tokens, mask=inside, other=0.0)
        low, high, mean = tl.minimum(low, x), tl.maximum(high, x), mean + x
    low, high, mean = low * clip, high * clip, mean / WIDTH
    scale, mid = tl.maximum((high - low) / (half + half), unit * TINY), (high + low) * 0.5
    for _ in range(FITS):
        a = tl.zeros([LANES], tl.float32)
        b = tl.zeros([LANES], tl.float32)
        c = tl.zeros([LANES], tl.float32)
        for i in range(WIDTH):
            x = tl.load(rows + i * tokens, mask=inside, other=0.0)
            code = rounded(tl.div_rn(x - mid, scale), half)
            a, b, c = a + code, b + code * code, c + code * (x - mean)
        spread = b - a * (a / WIDTH)
        fitted = tl.maximum(c / tl.maximum(spread, 0.25), unit * TINY)
        scale = tl.where(spread > 0.25, fitted, scale)  # two codes differ: at least 1/2
        mid = mean - scale * (a / WIDTH)
    keep(state, SCALE, group, scale, t, inside, tokens, G)
    keep(state, INVERSE, group, 1.0 / scale, t, inside, tokens, G)
    keep(state, MID, group, mid, t, inside, tokens, G)


@triton.jit
def keep(state, WHAT: tl.constexpr, group, x, t, inside, tokens, G: tl.constexpr):
    tl.store(state + (WHAT * G + group) * tokens + t, x, mask=inside)


@triton.jit
def kept(state, WHAT: tl.constexpr, group, t, inside, tokens, G: tl.constexpr):
    return tl.load(state + (WHAT * G + group) * tokens + t, mask=inside, other=1.0)


@triton.jit
def weight(matrix, row, column, D: tl.constexpr):
    """One number of a matrix [D, D], for every lane."""
    return tl.broadcast_to(tl.load(matrix + row * D + column), [LANES])


@triton.jit
def plane_step(error, code, channel, more, scale, mid, half, t, inside, tokens):
    """The code of one channel, ``more`` what the errors of those before ask of it; returns its error."""
    at = channel * tokens + t
    x = tl.load(error + at, mask=inside, other=0.0) - mid
    moved = rounded(tl.div_rn(x + more, scale), half)
    left = x - scale * moved
    tl.store(code + at, moved.to(tl.float16), mask=inside)
    tl.store(error + at, left, mask=inside)
    return left


@triton.jit
def nearest_plane(error, code, state, slope, factor, half, t, inside, tokens, D: tl.constexpr, G: tl.constexpr):
    """Codes from the last channel to the first, each making up for the errors of those before; ``error`` held y until here."""
    lane = tl.arange(0, LANES)
    for back in range(ROWS, D + 1, ROWS):
        first = D - back
        acc = product(factor, error, first, first + ROWS, D, t, inside, tokens, D)
        tl.store(slope + tl.arange(0, ROWS)[:, None] * LANES + lane[None, :], acc)
        tl.debug_barrier()
        group = first // (D // G)
        scale, mid = kept(state, SCALE, group, t, inside, tokens, G), kept(state, MID, group, t, inside, tokens, G)
        for part in range(4, ROWS + 1, 4):
            c = first + ROWS - part
            rows = slope + (ROWS - part) * LANES + lane
            x0, x1, x2, x3 = tl.load(rows), tl.load(rows + LANES), tl.load(rows + 2 * LANES), tl.load(rows + 3 * LANES)
            for other in range(c + 4, first + ROWS):
                e = tl.load(error + other * tokens + t, mask=inside, other=0.0)
                x0, x1 = tl.fma(e, weight(factor, c, other, D), x0), tl.fma(e, weight(factor, c + 1, other, D), x1)
                x2, x3 = tl.fma(e, weight(factor, c + 2, other, D), x2), tl.fma(e, weight(factor, c + 3, other, D), x3)
            e3 = plane_step(error, code, c + 3, x3, scale, mid, half, t, inside, tokens)
            x2 = tl.fma(e3, weight(factor, c + 2, c + 3, D), x2)
            e2 = plane_step(error, code, c + 2, x2, scale, mid, half, t, inside, tokens)
            x1 = tl.fma(e2, weight(factor, c + 1, c + 2, D), tl.fma(e3, weight(factor, c + 1, c + 3, D), x1))
            e1 = plane_step(error, code, c + 1, x1, scale, mid, half, t, inside, tokens)
            x0 = tl.fma(e2, weight(factor, c, c + 2, D), tl.fma(e3, weight(factor, c, c + 3, D), x0))
            x0 = tl.fma(e1, weight(factor, c, c + 1, D), x0)
            plane_step(error, code, c, x0, scale, mid, half, t, inside, tokens)
        tl.debug_barrier()


@triton.jit
def descent_step(error, code, row, channel, x, scale, inverse, pull, half, t, inside, tokens):
    """One channel moves to where its slope ``x`` vanishes; returns by how much, also in its ``row`` of slopes."""
    at = channel * tokens + t
    old = tl.load(code + at, mask=inside, other=0.0).to(tl.float32)
    moved = rounded(old + x * (inverse * tl.load(pull + channel)), half)
    step = (moved - old) * scale
    tl.store(code + at, moved.to(tl.float16), mask=inside)
    tl.store(error + at, tl.load(error + at, mask=inside, other=0.0) - step, mask=inside)
    tl.store(row, step)
    return step


@triton.jit
def descend(error, code, state, slope, metric, pull, half, t, inside, tokens, D: tl.constexpr, G: tl.constexpr):
    """Sweeps of coordinate descent: each code moves to where ``slope = metric error`` vanishes; ``error`` follows."""
    lane = tl.arange(0, LANES)
    for _ in range(SWEEPS):
        for first in range(0, D, ROWS):
            acc = product(metric, error, first, 0, D, t, inside, tokens, D)
            tl.store(slope + tl.arange(0, ROWS)[:, None] * LANES + lane[None, :], acc)
            tl.debug_barrier()
            group = first // (D // G)
            scale, inverse = kept(state, SCALE, group, t, inside, tokens, G), kept(state, INVERSE, group, t, inside, tokens, G)
            for part in range(0, ROWS, 4):
                c = first + part
                rows = slope + part * LANES + lane
                x0, x1, x2, x3 = tl.load(rows), tl.load(rows + LANES), tl.load(rows + 2 * LANES), tl.load(rows + 3 * LANES)
                for other in range(part):
                    s = -tl.load(slope + other * LANES + lane)
                    r = first + other
                    x0, x1 = tl.fma(s, weight(metric, r, c, D), x0), tl.fma(s, weight(metric, r, c + 1, D), x1)
                    x2, x3 = tl.fma(s, weight(metric, r, c + 2, D), x2), tl.fma(s, weight(metric, r, c + 3, D), x3)
                s0 = -descent_step(error, code, rows, c, x0, scale, inverse, pull, half, t, inside, tokens)
                x1 = tl.fma(s0, weight(metric, c, c + 1, D), x1)
                s1 = -descent_step(error, code, rows + LANES, c + 1, x1, scale, inverse, pull, half, t, inside, tokens)
                x2 = tl.fma(s1, weight(metric, c + 1, c + 2, D), tl.fma(s0, weight(metric, c, c + 2, D), x2))
                s2 = -descent_step(error, code, rows + 2 * LANES, c + 2, x2, scale, inverse, pull, half, t, inside, tokens)
                x3 = tl.fma(s1, weight(metric, c + 1, c + 3, D), tl.fma(s0, weight(metric, c, c + 3, D), x3))
                x3 = tl.fma(s2, weight(metric, c + 2, c + 3, D), x3)
                descent_step(error, code, rows + 3 * LANES, c + 3, x3, scale, inverse, pull, half, t, inside, tokens)
            tl.debug_barrier()


@triton.jit
def shift_errors(error, code, group, step, move, t, inside, tokens, WIDTH: tl.constexpr):
    """The errors of a group once its scale has grown by ``step`` and its mid by ``move`` [LANES]."""
    tl.debug_barrier()
    for i in range(WIDTH):
        at = (group * WIDTH + i) * tokens + t
        x = tl.load(error + at, mask=inside, other=0.0)
        tl.store(error + at, x - move - step * tl.load(code + at, mask=inside, other=0.0).to(tl.float32), mask=inside)
    tl.debug_barrier()


@triton.jit
def fit_metric(error, code, state, metric, total, unit, t, inside, tokens, D: tl.constexpr, G: tl.constexpr):
    """Scale and mid of least squares in the metric, one group after another (``reference._fit_metric``)."""
    WIDTH: tl.constexpr = D // G
    r = tl.arange(0, ROWS)
    for group in range(G):
        cc = tl.zeros([LANES], tl.float32)
        c1 = tl.zeros([LANES], tl.float32)
        cs = tl.zeros([LANES], tl.float32)
        s1 = tl.zeros([LANES], tl.float32)
        begin = group * WIDTH
        for first in range(begin, begin + WIDTH, ROWS):
            slope = product(metric, error, first, 0, D, t, inside, tokens, D)
            turned = product(metric, code, first, begin, begin + WIDTH, t, inside, tokens, D)
            at = (first + r)[:, None] * tokens + t[None, :]
            part = tl.load(code + at, mask=inside[None, :], other=0.0).to(tl.float32)
            cc, cs = cc + tl.sum(part * turned, 0), cs + tl.sum(part * slope, 0)
            c1, s1 = c1 + tl.sum(turned, 0), s1 + tl.sum(slope, 0)  # the metric is symmetric: 1^T M c
        one = tl.load(total + group)
        determinant = cc * one - c1 * c1
        step = (cs * one - s1 * c1) / tl.where(determinant != 0, determinant, 1.0)
        scale = kept(state, SCALE, group, t, inside, tokens, G)
        good = (determinant > 1e-6 * cc * one) & (scale + step > tl.load(unit + group) * TINY)
        step = tl.where(good, step, 0.0)
        move = tl.where(good, (s1 - step * c1) / one, 0.0)
        keep(state, SCALE, group, scale + step, t, inside, tokens, G)
        keep(state, INVERSE, group, 1.0 / (scale + step), t, inside, tokens, G)
        keep(state, MID, group, kept(state, MID, group, t, inside, tokens, G) + move, t, inside, tokens, G)
        shift_errors(error, code, group, step, move, t, inside, tokens, WIDTH)


@triton.jit
def round_meta(
    error, code, state, metric, total, unit, scale_out, mid_out, t, inside, tokens, D: tl.constexpr, G: tl.constexpr
):
    """Scale to E4M3, then mid, fitted to the rounded scales of all groups; their bytes to [T, KH, G]."""
    WIDTH: tl.constexpr = D // G
    for group in range(G):
        scale, u = kept(state, SCALE, group, t, inside, tokens, G), tl.load(unit + group)
        byte = e4m3_encode(scale / u)
        exact = e4m3_decode(byte) * u
        tl.store(scale_out + group, byte.to(tl.uint8), mask=inside)
        keep(state, SCALE, group, exact, t, inside, tokens, G)
        keep(state, INVERSE, group, 1.0 / exact, t, inside, tokens, G)
        shift_errors(error, code, group, exact - scale, 0.0, t, inside, tokens, WIDTH)
    for group in range(G):
        pull = tl.zeros([LANES], tl.float32)
        for first in range(group * WIDTH, group * WIDTH + WIDTH, ROWS):
            pull += tl.sum(product(metric, error, first, 0, D, t, inside, tokens, D), 0)
        mid, u = kept(state, MID, group, t, inside, tokens, G), tl.load(unit + group)
        byte = e4m3_encode((mid + pull / tl.load(total + group)) / u)
        tl.store(mid_out + group, byte.to(tl.uint8), mask=inside)
        keep(state, MOVE, group, e4m3_decode(byte) * u - mid, t, inside, tokens, G)
    tl.debug_barrier()
    for group in range(G):
        move = kept(state, MOVE, group, t, inside, tokens, G)
        shift_errors(error, code, group, 0.0, move, t, inside, tokens, WIDTH)


@triton.jit
def lattice_kernel(
    y_ptr, half_code_ptr, state_ptr, slope_ptr, metric_ptr, factor_ptr, pull_ptr, total_ptr, unit_ptr, clip_ptr,
    code_ptr, scale_ptr, mid_ptr, tokens, half,
    D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Quantize LANES tokens of one head.

    ``y`` float32 [KH, D, T] becomes the error, ``half_code`` float16 [KH, D, T], ``state`` float32 [KH, 4, G, T] and ``slope``
    float32 [programs, ROWS, LANES] are scratch. Codes go to uint8 [T, KH, D], bytes of scale and mid to uint8 [T, KH, G]. Reads
    and writes about 100 D numbers a token, in the caches: a program's own are 6 D LANES bytes.
    """
    WIDTH: tl.constexpr = D // G
    head, heads = tl.program_id(1), tl.num_programs(1)
    t = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = t < tokens
    error = y_ptr + (head * D).to(tl.int64) * tokens
    code = half_code_ptr + (head * D).to(tl.int64) * tokens
    state = state_ptr + (head * 4 * G).to(tl.int64) * tokens
    slope = slope_ptr + (tl.program_id(0) * heads + head).to(tl.int64) * (ROWS * LANES)
    metric, factor = metric_ptr + head * D * D, factor_ptr + head * D * D
    unit, total, pull = unit_ptr + head * G, total_ptr + head * G, pull_ptr + head * D
    meta = (t.to(tl.int64) * heads + head) * G
    for group in range(G):
        fit_range(
            error, state, group, tl.load(unit + group), tl.load(clip_ptr + head * G + group), half, t, inside, tokens, WIDTH, G
        )
    tl.debug_barrier()
    nearest_plane(error, code, state, slope, factor, half, t, inside, tokens, D, G)
    for turn in range(ROUNDS + 1):
        descend(error, code, state, slope, metric, pull, half, t, inside, tokens, D, G)
        if turn < ROUNDS:
            fit_metric(error, code, state, metric, total, unit, t, inside, tokens, D, G)
        if turn == ROUNDS - 1:
            round_meta(error, code, state, metric, total, unit, scale_ptr + meta, mid_ptr + meta, t, inside, tokens, D, G)
    c = tl.arange(0, DEPTH)
    for first in range(0, D, DEPTH):
        x = tl.load(code + (first + c)[:, None] * tokens + t[None, :], mask=inside[None, :], other=0.0)
        out = code_ptr + (t.to(tl.int64) * heads + head)[None, :] * D + (first + c)[:, None]
        tl.store(out, (x.to(tl.float32) + half).to(tl.uint8), mask=inside[None, :])


def quantize_side(y: Tensor, bits: float, side: HeadSide) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and bytes of scale and mid of one side of a codec in which either has a metric."""
    return quantize_lattice(y, LEVELS[bits], side) if side.has_metric else reference.quantize_heads(y, bits, side)


def quantize_lattice(y: Tensor, levels: int, side: HeadSide) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [T, KH, D] and scale and mid bytes uint8 [T, KH, G] of ``y`` float32 [T, KH, D]."""
    tokens, heads, size = y.shape
    groups = side.unit.shape[1]
    width = size // groups
    assert side.metric.is_contiguous() and side.factor.is_contiguous() and side.unit.is_contiguous(), side.metric.stride()
    assert tokens * size < 2**31, tokens  # offsets in a head are int32
    assert size % DEPTH.value == 0 and width % ROWS.value == 0, (size, groups)
    error = y.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)  # [KH, D, T], and the kernel writes it
    codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    scale, mid = (torch.empty(tokens, heads, groups, dtype=torch.uint8, device=y.device) for _ in range(2))
    grid = (triton.cdiv(tokens, LANES.value), heads)
    total = side.metric.view(heads, groups, width, groups, width).diagonal(dim1=1, dim2=3).sum((1, 2)).contiguous()  # [KH, G]
    lattice_kernel[grid](
        error, torch.empty(error.shape, dtype=torch.float16, device=y.device),
        torch.empty(heads, 4, groups, tokens, device=y.device),
        torch.empty(grid[0] * heads, ROWS.value, LANES.value, device=y.device),
        side.metric, side.factor, side.metric.diagonal(dim1=1, dim2=2).reciprocal().contiguous(), total, side.unit, side.clip,
        codes, scale, mid, tokens, (levels - 1) / 2, D=size, G=groups, num_warps=2, num_stages=1,
    )  # fmt: skip
    return codes, scale, mid
