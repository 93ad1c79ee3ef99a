# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803, N806
"""Words of a matrix of quantized blocks (``ggml.words``) as numbers: a code becomes a float by placing its bits below those of
1.0, 1 + code / 2^bits."""

from __future__ import annotations

import triton
import triton.language as tl


def _keep(bits: int) -> str:
    """PTX that keeps the low bits of a code of so many, where they belong in a float, under the exponent of 1.0."""
    mask = (255 if bits == 8 else 15) << 23 - bits
    return f"lop3.b32 $0, $1, 0x{mask:08X}, 0x3F800000, 0xEA;"


KEEP_4, KEEP_5, KEEP_6, KEEP_8 = (tl.constexpr(_keep(bits)) for bits in (4, 5, 6, 8))


@triton.jit
def load_words(code_ptr, high_ptr, pair_ptr, row, b, BLOCKS: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Blocks b [1, 1, NB, 1] of rows [1, R, 1, 1]: one or two vectors of four words, one or two of high bits, scale and offset;
    what the format lacks is another of them. Nobody reads them again."""
    inside = True if EVEN else b < BLOCKS
    other = None if EVEN else 0
    j = tl.arange(0, 4)[None, None, None, :]
    row = row.to(tl.int64)
    PLANES: tl.constexpr = 2 if BITS == 8 else 1
    code_ptrs = code_ptr + ((row * PLANES * BLOCKS + b) * 4 + j)
    low = tl.load(code_ptrs, mask=inside, other=other, eviction_policy="evict_first")
    more = low
    if BITS == 8:
        more = tl.load(code_ptrs + 4 * BLOCKS, mask=inside, other=other, eviction_policy="evict_first")
    # a thread is to have the pair of its own block: without this the compiler would give it those of neighbouring blocks
    place = tl.max_contiguous(row * BLOCKS + b, (1, 1, 1, 1))
    pair = tl.load(pair_ptr + place, mask=inside, other=other, eviction_policy="evict_first")
    high, higher = pair, pair
    if BITS == 5 or BITS == 6:
        high_ptrs = high_ptr + tl.max_contiguous(row * (BITS - 4) * BLOCKS + b, (1, 1, 1, 1))
        high = tl.load(high_ptrs, mask=inside, other=other, eviction_policy="evict_first")
        if BITS == 6:
            higher = tl.load(high_ptrs + BLOCKS, mask=inside, other=other, eviction_policy="evict_first")
    return low, more, high, higher, pair


@triton.jit
def code_of(low, more, high, higher, K: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """``1 + code / 2^BITS`` of columns 4 K .. 4 K + 3 of a block, [1, R, NB, 4]."""
    word = more if BITS == 8 and K >= 4 else low
    AT: tl.constexpr = 8 * (K % 4) if BITS == 8 else 4 * K
    TO: tl.constexpr = 23 - BITS
    shifted = word << (TO - AT) if AT < TO else word >> (AT - TO)
    if ASM:
        KEEP: tl.constexpr = KEEP_4 if BITS == 4 else KEEP_5 if BITS == 5 else KEEP_6 if BITS == 6 else KEEP_8
        bits = tl.inline_asm_elementwise(KEEP, "=r,r", [shifted], dtype=tl.int32, is_pure=True, pack=1)
    else:
        bits = (shifted & ((255 if BITS == 8 else 15) << TO)) | 0x3F800000
    if BITS == 5:
        c = 4 * K + tl.arange(0, 4)[None, None, None, :]
        bits |= ((high >> c) & 1) << 22
    elif BITS == 6:
        c = 4 * (K % 4) + tl.arange(0, 4)[None, None, None, :]
        field = higher if K >= 4 else high
        bits |= ((field >> (2 * c)) & 3) << 21
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def scales_of(pair):
    """The two float16 numbers of a word, in float32."""
    return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), (pair >> 16).to(tl.int16).to(
        tl.float16, bitcast=True
    ).to(tl.float32)
