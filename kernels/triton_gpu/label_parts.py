# mypy: ignore-errors
# ruff: noqa: N803, N806, RUF005
"""Parts of ``label_blocks``: what it makes of labels and RoPE before its loop, scores of keys, and the end.

Tuples have an entry for each EACH channels (32, or as many as a row of codes has bytes): of keys first those below H = D / 2,
then those that RoPE pairs them with.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skvq.kernels.triton_gpu.fragments import first_of_pairs
from skvq.kernels.triton_gpu.one_hot import first_channel, inverse, one_hot, raw_place, spread, turn_back, twice
from skvq.kernels.triton_gpu.raised import load_raised, raised


@triton.constexpr_function
def channels_each(bits, size):
    """Channels of an entry, codes of ``bits`` bits and heads of ``size`` channels."""
    return min(32, size * bits // 8)


@triton.constexpr_function
def blocks_of(bits, size):
    """Entries that one plane of a row of codes has."""
    return size * bits // 8 // channels_each(bits, size)


@triton.jit
def key_one_hot(labels, unit_ptr, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, ASM: tl.constexpr):
    """One-hot matrices [GROUPS, EACH] that bring scales, and mids, to the channels of keys, in the order of ``raw_place``.

    A channel is counted in the larger unit of the two that RoPE pairs, and a code in what one step of its plane is.
    """
    H: tl.constexpr = D // 2
    EACH: tl.constexpr = channels_each(BITS, D)
    HALVES: tl.constexpr = H // EACH
    PAIRS: tl.constexpr = 4 // BITS  # planes of channels below H; those of the channels they are turned with follow
    raw_e = raw_place(tl.arange(0, EACH), ASM)
    scale_hot = ()
    mid_hot = ()
    for n in tl.static_range(D // EACH):
        channel = first_channel(n % HALVES, PAIRS, blocks_of(BITS, D), EACH) + raw_e
        label = tl.load(labels + n // HALVES * H + channel)
        other = tl.load(labels + (1 - n // HALVES) * H + channel)
        mine = tl.load(unit_ptr + label)
        larger = tl.maximum(mine, tl.load(unit_ptr + other))
        part = (mine * inverse(larger))[:, None]
        lift = part * (2.0**-5 / raised(BITS, n % PAIRS + n // HALVES * PAIRS))
        scale_hot = scale_hot + (tl.trans(one_hot(label, lift, GROUPS)),)
        mid_hot = mid_hot + (tl.trans(one_hot(label, part * 2.0**-5, GROUPS)),)
    return scale_hot, mid_hot


@triton.jit
def value_one_hot(labels, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """One-hot matrices [EACH, GROUPS] that bring scales to the channels of values."""
    EACH: tl.constexpr = channels_each(BITS, D)
    out = ()
    for n in tl.static_range(D // EACH):
        channel = first_channel(n, 8 // BITS, blocks_of(BITS, D), EACH) + tl.arange(0, EACH)
        label = tl.load(labels + channel)
        out = out + (one_hot(label, 32768.0, GROUPS),)
    return out


@triton.jit
def turned_queries(q_ptr, real, angles, labels, unit_ptr, scale, unit, D: tl.constexpr):
    """The columns of q, times ``scale``, turned by ``angles`` (a pointer for each column): blocks of 16 channels, float16.

    ``real`` says which columns there are. Channels are scaled to ``unit`` from the unit that ``key_one_hot`` counts them in.
    """
    H: tl.constexpr = D // 2
    e = tl.arange(0, 16)
    out = ()
    for b in tl.static_range(D // 16):
        label = tl.load(labels + b * 16 + e)
        other = tl.load(labels + (b * 16 + H) % D + e)
        larger = tl.maximum(tl.load(unit_ptr + label), tl.load(unit_ptr + other)) * inverse(unit)
        q = tl.load(q_ptr + (b * 16 + e)[:, None], mask=real[None, :], other=0.0).to(tl.float32)
        o = tl.load(q_ptr + ((b * 16 + H) % D + e)[:, None], mask=real[None, :], other=0.0)
        angle = angles + (b * 16 % H + e)[:, None]
        q = q * tl.load(angle).to(tl.float32) + o.to(tl.float32) * (
            tl.load(angle + H).to(tl.float32) * (1.0 if b * 16 < H else -1.0)
        )
        out = out + ((q * (scale * larger[:, None])).to(tl.float16),)
    return out


@triton.jit
def channel_turns(table_ptr, D: tl.constexpr, BITS: tl.constexpr, PLACES: tl.constexpr):
    """Cosines and sines [PLACES, EACH] of every place for the channels of keys below H."""
    EACH: tl.constexpr = channels_each(BITS, D)
    place = tl.arange(0, PLACES)[:, None] * D
    cosines = ()
    sines = ()
    for n in tl.static_range(D // 2 // EACH):
        channel = first_channel(n, 4 // BITS, blocks_of(BITS, D), EACH) + tl.arange(0, EACH)[None, :]
        cosines = cosines + (tl.load(table_ptr + place + channel),)
        sines = sines + (tl.load(table_ptr + place + channel + D // 2),)
    return cosines, sines


@triton.jit
def label_scores(
    key, ks, km, scale_hot, mid_hot, q_blocks, turn, cosines, sines, SHARE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    NH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scores [SHARE, 2 NH] of SHARE tokens, codes at ``key``: keys are made in half precision and turned by their place, the
    queries back by the angles at ``turn``.
    """
    ROW: tl.constexpr = D * BITS // 8
    EACH: tl.constexpr = channels_each(BITS, D)
    HALVES: tl.constexpr = D // 2 // EACH
    PAIRS: tl.constexpr = 4 // BITS
    x = tl.zeros([SHARE, 2 * NH], tl.float32)
    code = ()
    for n in tl.static_range(HALVES):
        if n % PAIRS == 0:
            code = load_raised(key + n // PAIRS * EACH, SHARE, EACH, ROW, BITS, ASM)
        ka = code[n % PAIRS] * spread(ks, scale_hot[n], SHARE, EACH, ASM)
        ka += spread(km, mid_hot[n], SHARE, EACH, ASM)
        kb = code[n % PAIRS + PAIRS] * spread(ks, scale_hot[n + HALVES], SHARE, EACH, ASM)
        kb += spread(km, mid_hot[n + HALVES], SHARE, EACH, ASM)
        cos = twice(cosines[n], SHARE // 2, EACH)
        sin = twice(sines[n], SHARE // 2, EACH)
        ra, rb = turn_back(q_blocks, turn, first_channel(n, PAIRS, blocks_of(BITS, D), EACH), EACH, D, 2 * NH)
        x = tl.dot(ka * cos - kb * sin, ra, x)
        x = tl.dot(kb * cos + ka * sin, rb, x)
    return x


@triton.jit
def store_label_sums(
    out, sums, mids, inside, labels, unit_ptr, D: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, NH: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    """Write the weighted sums of values of every channel to ``out``, a pointer for each of NH columns; ``inside`` says which
    there are. ``mids`` [GROUPS, NH * PAD] are sums of weighted mids by group.
    """
    EACH: tl.constexpr = channels_each(BITS, D)
    PLANES: tl.constexpr = 8 // BITS
    mids = first_of_pairs(mids, GROUPS, NH, PAD)
    for n in tl.static_range(D // EACH):
        d = first_channel(n, PLANES, blocks_of(BITS, D), EACH) + tl.arange(0, EACH)
        y = first_of_pairs(sums[n], EACH, NH, PAD) * (2.0**-7 / raised(BITS, n % PLANES))
        label = tl.load(labels + d)
        y += tl.gather(mids, tl.broadcast_to(label[:, None], [EACH, NH]), 0) * 256.0
        y *= tl.load(unit_ptr + label)[:, None]
        tl.store(out + d[:, None], y, mask=inside[None, :])
