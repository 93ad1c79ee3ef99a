# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806, RET505, RUF005
"""Columns of a tensor taken apart and put together again, and narrow numbers packed into words; a row is a lane's."""

from __future__ import annotations

import triton
import triton.language as tl


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
def backwards_word(word):
    """Bytes of a word the other way round."""
    return ((word & 0xFF) << 24) | ((word & 0xFF00) << 8) | ((word >> 8) & 0xFF00) | ((word >> 24) & 0xFF)


@triton.jit
def backwards_words(words):
    """Four words [T] as those of the channels the other way round."""
    return (backwards_word(words[3]), backwards_word(words[2]), backwards_word(words[1]), backwards_word(words[0]))
