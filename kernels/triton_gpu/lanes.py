# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806, RET505, RUF005
"""Tensors whose rows belong to one lane each: columns taken apart and put together, small numbers packed into words."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cut(x):
    """The left and the right half of the columns of x [T, n], each [T, n / 2]; or where n is 2 each [T]."""
    T: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    if HALF == 1:
        return tl.split(x)
    else:
        return tl.split(tl.permute(tl.reshape(x, [T, 2, HALF]), (0, 2, 1)))


@triton.jit
def cut_all(parts, COUNT: tl.constexpr):
    """The halves of the first COUNT tensors, in order: twice as many tensors, half as wide."""
    new = ()
    for i in tl.static_range(COUNT):
        new = new + cut(parts[i])
    return new


@triton.jit
def paste(a, b):
    """The columns of a, then those of b: the inverse of ``cut``."""
    if len(a.shape) == 1:
        return tl.join(a, b)
    else:
        return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def paste_all(parts, COUNT: tl.constexpr):
    """Neighbours pasted: the inverse of ``cut_all``, COUNT tensors from 2 COUNT."""
    new = ()
    for i in tl.static_range(COUNT):
        new = new + (paste(parts[2 * i], parts[2 * i + 1]),)
    return new


@triton.jit
def as_pairs(x):
    """x float16 [T, n] with two neighbours in a word: uint32 [T, n / 2], the first in the lower half."""
    low, high = tl.split(tl.reshape(x.to(tl.uint16, bitcast=True).to(tl.uint32), [x.shape[0], x.shape[1] // 2, 2]))
    return low | (high << 16)


@triton.jit
def as_halves(x):
    """The inverse of ``as_pairs``."""
    both = tl.join((x & 0xFFFF).to(tl.uint16), (x >> 16).to(tl.uint16))
    return tl.reshape(both, [x.shape[0], 2 * x.shape[1]]).to(tl.float16, bitcast=True)


@triton.jit
def backwards_word(word):
    """The four bytes of a word in reverse order."""
    return ((word & 0xFF) << 24) | ((word & 0xFF00) << 8) | ((word >> 8) & 0xFF00) | ((word >> 24) & 0xFF)


@triton.jit
def backwards_words(words):
    """Sixteen bytes in four words [T], in reverse order."""
    return (backwards_word(words[3]), backwards_word(words[2]), backwards_word(words[1]), backwards_word(words[0]))
