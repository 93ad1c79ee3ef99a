# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806, RET505, RUF005, SIM108
"""Codes of a head chosen together (``reference.quantize_lattice``): a token is a lane where channels come one after another.

Nearest plane is a sweep of coordinate descent too, in the factor with its channels the other way round (``metric.py``): one
sweep serves both. A sweep knows the slopes ``matrix error`` from before it, in float32, and by how many steps each code has
moved since, small integers that halves hold exactly. BLOCK channels at a time, one product on tensor cores of all steps with
BLOCK columns of the matrix, two halves a number, gives their slopes as good as float32; in the block each code acts on those
after it by one multiply-add.

As compiled for sm_90 a block of 32 tokens is 1,100 instructions of a warp, 68 of them on tensor cores and 140 loads, most of
them numbers of the matrix that all lanes share: 7 sweeps of 8 blocks 62,000, the slopes before each sweep and fit 5,000 each,
the two fits 16,000. 8,192 tokens of 8 heads are 490,000 issue slots of each scheduler of an H200, 0.3 ms. Chains: 16 times five
dependent instructions and some four trips through shared memory or L2 a block, 1,500 cycles or so, make 0.1 ms of a tile alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import HeadSide
from skvq.kernels.triton_gpu import metric
from skvq.kernels.triton_gpu.metric import MetricTables
from skvq.kernels.triton_gpu.pack import ROUND, TINY, e4m3_decode, e4m3_encode
from skvq.kernels.triton_gpu.prepare import power_of_two_scale

BLOCK = tl.constexpr(metric.BLOCK)  # channels settled one by one before the others hear of them
ROUND_BITS = tl.constexpr(0x4B400000)  # those of ROUND: an integer code added to either is the code added to the other
FITS = tl.constexpr(reference.LATTICE_FITS)
ROUNDS = tl.constexpr(reference.LATTICE_ROUNDS)
SWEEPS = tl.constexpr(reference.LATTICE_SWEEPS)
SCALE, MID, OLD_SCALE, OLD_MID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # rows of a group's state
EDGE = tl.constexpr(60000.0)  # errors stop here, thousands of steps large: halves end at 65,504


@triton.jit
def cut(x):
    """Left and right half of the columns of x [T, n]; of single ones [T]."""
    T: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    if HALF == 1:
        return tl.split(x)
    else:
        return tl.split(tl.permute(tl.reshape(x, [T, 2, HALF]), (0, 2, 1)))


@triton.jit
def cut_all(parts, COUNT: tl.constexpr):
    new = ()
    for i in tl.static_range(COUNT):
        new = new + cut(parts[i])
    return new


@triton.jit
def paste(a, b):
    """Columns of a [T, n], then those of b."""
    if len(a.shape) == 1:
        return tl.join(a, b)
    else:
        return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def paste_all(parts, COUNT: tl.constexpr):
    new = ()
    for i in tl.static_range(COUNT):
        new = new + (paste(parts[2 * i], parts[2 * i + 1]),)
    return new


@triton.jit
def keep(state, WHAT: tl.constexpr, group, x, t, inside, tokens, G: tl.constexpr):
    tl.store(state + (WHAT * G + group) * tokens + t, x, mask=inside)


@triton.jit
def kept(state, WHAT: tl.constexpr, group, t, inside, tokens, G: tl.constexpr):
    return tl.load(state + (WHAT * G + group) * tokens + t, mask=inside, other=1.0)


@triton.jit
def rounded(x, half):
    """Nearest code of ``x``, which counts from the middle of the range."""
    return (tl.minimum(tl.maximum(x + half, 0.0), half + half) + ROUND) - ROUND


@triton.jit
def fit_range(y, code, state, unit, clip, half, t, inside, stride, tokens, T: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """First scale and mid of each group: the clipped range, then plain least squares (``reference._fit_range``), and codes."""
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
def load_matrix(table, block, group, D: tl.constexpr, G: tl.constexpr):
    """What the codes of a group do to the slopes of ``block``, the two halves that a number is side by side: [D / G, 32]."""
    WIDTH: tl.constexpr = D // G
    at = tl.arange(0, WIDTH)[:, None] * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)[None, :]
    return tl.load(table + (block * D + group * WIDTH) * (2 * BLOCK) + at)


@triton.jit
def slopes_of_errors(
    y, code, out, state, table, down, half, turned, t, inside, stride, tokens, T: tl.constexpr, D: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """``matrix error`` to ``out``, channels from the last to the first where ``turned``. Errors are two halves each."""
    c = tl.arange(0, BLOCK)
    n = tl.arange(0, D)
    row = t[:, None] * stride
    top = tl.zeros([T], tl.float32)
    for group in range(G):
        top = tl.maximum(top, kept(state, SCALE, group, t, inside, tokens, G))
    up, back = power_of_two_scale(top)
    up, back = up * 0.0078125, back * 128.0  # a step is at most 2^5
    acc = tl.zeros([T, D], tl.float32)
    for k in range(0, D, BLOCK):
        channel, group = k + c, k // (D // G)
        scale, mid = kept(state, SCALE, group, t, inside, tokens, G), kept(state, MID, group, t, inside, tokens, G)
        q = tl.load(code + row + channel[None, :], mask=inside[:, None], other=0).to(tl.float32) - half
        x = tl.load(y + row + channel[None, :], mask=inside[:, None], other=0.0) - mid[:, None] - scale[:, None] * q
        x = tl.minimum(tl.maximum(x * up[:, None], -EDGE), EDGE)
        high = x.to(tl.float16)
        low = (x - high.to(tl.float32)).to(tl.float16)
        source = tl.where(turned != 0, D - 1 - channel, channel)
        at = table + (n // BLOCK * (2 * D * BLOCK) + n % BLOCK)[None, :] + (source * (2 * BLOCK))[:, None]
        big, small = tl.load(at), tl.load(at + BLOCK)
        acc = tl.dot(high, small, acc)
        acc = tl.dot(low, big, acc)
        acc = tl.dot(high, big, acc)
    blocks = cut_all(cut(acc * (back * down)[:, None]), 2)
    if D == 128:
        blocks = cut_all(blocks, 4)
    for i in tl.static_range(D // BLOCK):  # block by block: addresses of all at once would spill
        tl.store(out + row + i * BLOCK + c[None, :], blocks[i], mask=inside[:, None])
    tl.debug_barrier()


@triton.jit
def as_pairs(x):
    """Neighbours of x [T, n] of halves, two a word: [T, n / 2]."""
    low, high = tl.split(tl.reshape(x.to(tl.uint16, bitcast=True).to(tl.uint32), [x.shape[0], x.shape[1] // 2, 2]))
    return low | (high << 16)


@triton.jit
def as_halves(x):
    """The inverse of ``as_pairs``."""
    both = tl.join((x & 0xFFFF).to(tl.uint16), (x >> 16).to(tl.uint16))
    return tl.reshape(both, [x.shape[0], 2 * x.shape[1]]).to(tl.float16, bitcast=True)


@triton.jit
def load_codes(code, t, inside, stride, N: tl.constexpr):
    """Codes by blocks, pairs of halves [T, BLOCK / 2]."""
    at = code + t[:, None] * stride + tl.arange(0, BLOCK)[None, :]
    parts = ()
    for k in tl.static_range(N):
        x = tl.load(at + k * BLOCK, mask=inside[:, None], other=0).to(tl.float32)
        parts = parts + (as_pairs(x.to(tl.float16)),)
    return parts


@triton.jit
def replaced(steps, words, block, N: tl.constexpr):
    """Steps by blocks, ``words`` [T, BLOCK / 2] those of one: pairs of halves, each 1536 and a step.

    A product with ones puts them where other products want them: neighbours of four in a thread."""
    c = tl.arange(0, BLOCK)
    turned = c % 8 // 2 * 4 + c // 8 * 2 + c % 2
    one = tl.where(c[:, None] == turned[None, :], 1.0, 0.0).to(tl.float16)
    new = (tl.dot(as_halves(words), one) - 1536.0).to(tl.float16)
    new = as_pairs(tl.reshape(tl.permute(tl.reshape(new, [new.shape[0], 2, 4, 2]), (0, 2, 1, 3)), [new.shape[0], BLOCK]))
    out = ()
    for k in tl.static_range(N):
        out = out + (tl.where(block == k, new, steps[k]),)
    return out


@triton.jit
def group_effects(codes, table, block, down, D: tl.constexpr, G: tl.constexpr):
    """``matrix codes`` in one block, group by group."""
    PER: tl.constexpr = D // G // BLOCK
    out = ()
    for group in tl.static_range(G):
        words = ()
        for i in tl.static_range(PER):
            words = words + (codes[group * PER + i],)
        if PER == 8:
            words = paste_all(words, 4)
        if PER >= 4:
            words = paste_all(words, 2)
        words = paste(words[0], words[1])
        big, small = cut(tl.dot(as_halves(words), load_matrix(table, block, group, D, G)))
        out = out + ((big + small) * down,)
    return out


@triton.jit
def load_slopes(slopes, block, t, inside, stride):
    at = slopes + t[:, None] * stride + block * BLOCK + tl.arange(0, BLOCK)[None, :]
    return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def settle(slopes, words, inner, inverse, top):
    """Each code of a block moves to where its slope vanishes, one after another.

    ``slopes`` [T, BLOCK], ``words`` the codes, four words [T] of four; ``inner[i, j]``: what a step of i takes off the slope of
    j. Returns the steps as pairs of halves [T, BLOCK / 2], each 1536 more, and the codes as words.
    """
    v = cut_all(cut_all(cut_all(cut(slopes), 2), 4), 8)
    new = ()
    for j in tl.static_range(BLOCK):
        new = new + (v[j] * inverse,)
    v = new
    pairs = ()
    packed = ()
    word = words[0]
    pair = words[0]
    for i in tl.static_range(BLOCK):
        byte = (words[i // 4] >> (8 * (i % 4))) & 0xFF
        base = (byte | ROUND_BITS).to(tl.float32, bitcast=True)
        moved = tl.minimum(tl.maximum(v[i] + base, ROUND), ROUND + top)
        step = base - moved
        new = ()
        for j in tl.static_range(BLOCK):
            if j > i:
                new = new + (tl.fma(step, tl.load(inner + i * BLOCK + j), v[j]),)
            else:
                new = new + (v[j],)
        v = new
        number = moved.to(tl.int32, bitcast=True) - ROUND_BITS
        pair = number - byte + 0x66006600 if i % 2 == 0 else pair + ((number - byte) << 16)
        word = number if i % 4 == 0 else word + (number << (8 * (i % 4)))
        if i % 2 == 1:
            pairs = pairs + (pair.to(tl.uint32, bitcast=True),)
        if i % 4 == 3:
            packed = packed + (word,)
    return paste_all(paste_all(paste_all(pairs, 4), 2), 1)[0], packed


@triton.jit
def turned_word(word):
    """Bytes of a word the other way round."""
    return ((word & 0xFF) << 24) | ((word & 0xFF00) << 8) | ((word >> 8) & 0xFF00) | ((word >> 24) & 0xFF)


@triton.jit
def turned_words(words):
    """Four words [T] as those of the channels the other way round."""
    return (turned_word(words[3]), turned_word(words[2]), turned_word(words[1]), turned_word(words[0]))


@triton.jit
def sweep(
    word_ptr, slopes, state, table, inner, down, half, turned, t, inside, stride, tokens, T: tl.constexpr, D: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    """All codes once, BLOCK by BLOCK, from ``slopes`` before; ``turned``: from the last channel to the first."""
    N: tl.constexpr = D // BLOCK
    steps = ()
    for _ in tl.static_range(N):
        steps = steps + (tl.zeros([T, BLOCK // 2], tl.uint32),)
    for block in range(N):
        at = tl.where(turned != 0, N - 1 - block, block)
        inverse = 1.0 / kept(state, SCALE, at // (N // G), t, inside, tokens, G)
        place = word_ptr + t[:, None] * (stride // 4) + at * 4 + tl.arange(0, 4)[None, :]
        words = cut_all(cut(tl.load(place, mask=inside[:, None], other=0)), 2)
        if turned != 0:
            words = turned_words(words)
        effects = group_effects(steps, table, block, down, D, G)
        x = load_slopes(slopes, block, t, inside, stride)
        for i in tl.static_range(G):
            group = tl.where(turned != 0, G - 1 - i, i)
            x -= kept(state, SCALE, group, t, inside, tokens, G)[:, None] * effects[i]
        moved, words = settle(x, words, inner + block * BLOCK * BLOCK, inverse, half + half)
        if turned != 0:
            words = turned_words(words)
        tl.store(place, paste(paste(words[0], words[1]), paste(words[2], words[3])), mask=inside[:, None])
        steps = replaced(steps, moved, block, N)
    tl.debug_barrier()


@triton.jit
def fit(
    code, slopes, state, table, ones, diagonal, total, unit, scale_out, mid_out, down, half, last, t, inside, stride, tokens,
    T: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Scale and mid of least squares in the metric, one group after another (``reference._fit_metric``).

    The ``last`` time scales, then mids fitted to the rounded scales of all groups become E4M3; their bytes go to [T, KH, G].
    """
    N: tl.constexpr = D // BLOCK
    c = tl.arange(0, BLOCK)
    out = t * (stride // (D // G))
    codes = load_codes(code, t, inside, stride, N)
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
                turned = effects[0]
                for other in tl.static_range(G):
                    one = tl.load(ones + other * D + block * BLOCK + c)[None, :]
                    part = effects[other] - half * one  # of the centred codes
                    step = kept(state, SCALE, other, t, inside, tokens, G) - kept(state, OLD_SCALE, other, t, inside, tokens, G)
                    move = kept(state, MID, other, t, inside, tokens, G) - kept(state, OLD_MID, other, t, inside, tokens, G)
                    s -= step[:, None] * part + move[:, None] * one
                    turned = tl.where(group == other, part, turned)
                weight = tl.load(diagonal + block * BLOCK + c)[None, :]
                turned, s = turned * weight, s * weight
                at = code + t[:, None] * stride + block * BLOCK + c[None, :]
                q = tl.load(at, mask=inside[:, None], other=0).to(tl.float32) - half
                cc, c1 = cc + tl.sum(q * turned, 1), c1 + tl.sum(turned, 1)  # the metric is symmetric: 1^T M c
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


@triton.jit(do_not_specialize=["tokens"])
def lattice_kernel(
    y_ptr, code_ptr, word_ptr, scale_ptr, mid_ptr, slopes_ptr, state_ptr, table_ptr, inner_ptr, ones_ptr, diagonal_ptr,
    total_ptr, down_ptr, unit_ptr, clip_ptr, tokens, heads, half,
    D: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Quantize T tokens of one head, one a lane; neighbouring programs take the heads in turn.

    ``y`` float32 [T, KH, D]; codes go to uint8 [T, KH, D], which ``word`` is as int32, bytes of scale and mid to uint8
    [T, KH, G]. ``slopes`` float32 [T, KH, D] and ``state`` float32 [KH, 4, G, T] are scratch, ``metric.MetricTables`` the rest.
    Reads and writes about 40 D numbers a token, in the caches, and 5 D^2 numbers of the head's tables a program.
    """
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * T
    t = tl.arange(0, T)
    inside = t < tokens - first
    stride = heads * D
    row = first.to(tl.int64) * heads + head
    y, code, word, slopes = y_ptr + row * D, code_ptr + row * D, word_ptr + row * (D // 4), slopes_ptr + row * D
    scale_out, mid_out = scale_ptr + row * G, mid_ptr + row * G
    state = state_ptr + (head * 4 * G).to(tl.int64) * tokens + first
    unit, total, clip, diagonal = unit_ptr + head * G, total_ptr + head * G, clip_ptr + head * G, diagonal_ptr + head * D
    fit_range(y, code, state, unit, clip, half, t, inside, stride, tokens, T, D, G)
    for turn in tl.range(0, 1 + (ROUNDS + 1) * SWEEPS + ROUNDS, disable_licm=True):
        turned = tl.where(turn == 0, 1, 0)
        at = (1 - turned) * heads + head  # the factor, then the metric
        table, inner, ones = table_ptr + at * (2 * D * D), inner_ptr + at * (D * BLOCK), ones_ptr + at * (G * D)
        down = tl.load(down_ptr + at)
        slopes_of_errors(y, code, slopes, state, table, down, half, turned, t, inside, stride, tokens, T, D, G)
        done = turn * (1 - turned)  # of SWEEPS and a fit, and so on
        if (done > 0) & (done % (SWEEPS + 1) == 0):
            last = done // (ROUNDS * (SWEEPS + 1))
            fit(
                code,
                slopes,
                state,
                table,
                ones,
                diagonal,
                total,
                unit,
                scale_out,
                mid_out,
                down,
                half,
                last,
                t,
                inside,
                stride,
                tokens,
                T,
                D,
                G,
            )
        else:
            sweep(word, slopes, state, table, inner, down, half, turned, t, inside, stride, tokens, T, D, G)


def quantize_lattice(
    y: Tensor, levels: int, side: HeadSide, tables: MetricTables, lanes: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [T, KH, D], scale and mid bytes uint8 [T, KH, G] of ``y`` float32 [T, KH, D], ``lanes`` tokens a program."""
    tokens, heads, size = y.shape
    groups = side.unit.shape[1]
    assert y.dtype == torch.float32 and y.is_contiguous() and y.device == tables.table.device, (y.dtype, y.stride(), y.device)
    assert side.unit.is_contiguous() and side.clip.is_contiguous(), (side.unit.stride(), side.clip.stride())
    assert size % 32 == 0 and size // groups % 32 == 0, (size, groups)
    codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    scale, mid = (torch.empty(tokens, heads, groups, dtype=torch.uint8, device=y.device) for _ in range(2))
    lattice_kernel[(triton.cdiv(tokens, lanes) * heads,)](
        y, codes, codes.view(torch.int32), scale, mid, torch.empty_like(y),
        torch.empty(heads, 4, groups, tokens, device=y.device), tables.table, tables.inner, tables.ones,
        tables.diagonal, tables.total, tables.down, side.unit, side.clip, tokens, heads, (levels - 1) / 2,
        D=size, G=groups, T=lanes, num_warps=max(1, min(lanes // 32, 4)), num_stages=1,
    )  # fmt: skip
    return codes, scale, mid
