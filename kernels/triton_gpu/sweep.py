# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806, RUF005, SIM108
"""Slopes of the quantization error in the metric, and the sweep that moves each code to where its own slope vanishes."""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu import metric
from skvq.kernels.triton_gpu.e4m3 import ROUND
from skvq.kernels.triton_gpu.lanes import as_halves, as_pairs, backwards_words, cut, cut_all, paste, paste_all
from skvq.kernels.triton_gpu.prepare import power_of_two_scale
from skvq.kernels.triton_gpu.state import MID, SCALE, kept

BLOCK = tl.constexpr(metric.BLOCK)  # channels settled one by one before the others hear of them
ROUND_BITS = tl.constexpr(0x4B400000)  # those of ROUND: an integer code added to either is the code added to the other
EDGE = tl.constexpr(60000.0)  # errors stop here, thousands of steps large: halves end at 65,504


@triton.jit
def load_effects(table, block, group, D: tl.constexpr, G: tl.constexpr):
    """How the codes of a group change the slopes of a block, [D / G, 2 BLOCK]: a number is two halves, BLOCK columns apart."""
    WIDTH: tl.constexpr = D // G
    at = tl.arange(0, WIDTH)[:, None] * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)[None, :]
    return tl.load(table + (block * D + group * WIDTH) * (2 * BLOCK) + at)


@triton.jit
def slopes_of_errors(
    y, code, out, state, table, down, half, backwards, t, inside, stride, tokens, T: tl.constexpr, D: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    """``matrix error`` of T tokens to ``out``. ``backwards``: from the last channel to the first, as the factor is stored.

    Errors are scaled by a power of two and split in two halves, so that the product is as good as one of float32.
    """
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
        source = tl.where(backwards != 0, D - 1 - channel, channel)
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
def replaced(steps, words, block, N: tl.constexpr):
    """``steps``, a tuple of blocks [T, BLOCK / 2], where those of block ``block`` are now ``words``, as ``settle`` returns
    them.

    A product with a permutation matrix puts the new steps into the lanes where other products want them, four neighbours in a
    thread, and takes off the 1536.
    """
    c = tl.arange(0, BLOCK)
    place = c % 8 // 2 * 4 + c // 8 * 2 + c % 2
    one = tl.where(c[:, None] == place[None, :], 1.0, 0.0).to(tl.float16)
    new = (tl.dot(as_halves(words), one) - 1536.0).to(tl.float16)
    new = as_pairs(tl.reshape(tl.permute(tl.reshape(new, [new.shape[0], 2, 4, 2]), (0, 2, 1, 3)), [new.shape[0], BLOCK]))
    out = ()
    for k in tl.static_range(N):
        out = out + (tl.where(block == k, new, steps[k]),)
    return out


@triton.jit
def group_effects(codes, table, block, down, D: tl.constexpr, G: tl.constexpr):
    """``matrix codes`` in one block, a tuple of G tensors [T, BLOCK]: what the codes of each group contribute."""
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
        big, small = cut(tl.dot(as_halves(words), load_effects(table, block, group, D, G)))
        out = out + ((big + small) * down,)
    return out


@triton.jit
def load_slopes(slopes, block, t, inside, stride):
    """The slopes of one block, [T, BLOCK]."""
    at = slopes + t[:, None] * stride + block * BLOCK + tl.arange(0, BLOCK)[None, :]
    return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def settle(slopes, words, inner, inverse, top):
    """Move each code of a block to where its slope vanishes, one after another.

    ``slopes`` [T, BLOCK]; ``words``: the codes, four words [T] of four bytes; ``inner[i, j]``: what one step of code i takes
    off the slope of code j; ``inverse`` is 1 / scale, ``top`` the largest code. Returns the steps taken as pairs of halves [T,
    BLOCK / 2], each plus 1536 (an integer added to the bits of 1536.0 is added to the number), and the new codes as words.
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
def sweep(
    word_ptr, slopes, state, table, inner, down, half, backwards, t, inside, stride, tokens, T: tl.constexpr, D: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    """Go over all codes once, BLOCK by BLOCK; ``backwards``: from the last channel to the first.

    ``slopes`` are those before the sweep. Codes are read and written at ``word_ptr``, four to a word.
    """
    N: tl.constexpr = D // BLOCK
    steps = ()
    for _ in tl.static_range(N):
        steps = steps + (tl.zeros([T, BLOCK // 2], tl.uint32),)
    for block in range(N):
        at = tl.where(backwards != 0, N - 1 - block, block)
        inverse = 1.0 / kept(state, SCALE, at // (N // G), t, inside, tokens, G)
        place = word_ptr + t[:, None] * (stride // 4) + at * 4 + tl.arange(0, 4)[None, :]
        words = cut_all(cut(tl.load(place, mask=inside[:, None], other=0)), 2)
        if backwards != 0:
            words = backwards_words(words)
        effects = group_effects(steps, table, block, down, D, G)
        x = load_slopes(slopes, block, t, inside, stride)
        for i in tl.static_range(G):
            group = tl.where(backwards != 0, G - 1 - i, i)
            x -= kept(state, SCALE, group, t, inside, tokens, G)[:, None] * effects[i]
        moved, words = settle(x, words, inner + block * BLOCK * BLOCK, inverse, half + half)
        if backwards != 0:
            words = backwards_words(words)
        tl.store(place, paste(paste(words[0], words[1]), paste(words[2], words[3])), mask=inside[:, None])
        steps = replaced(steps, moved, block, N)
    tl.debug_barrier()
