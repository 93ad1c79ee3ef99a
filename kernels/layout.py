"""Packed formats of the arena, as pure integer functions.

Letters: D head size, KH kv heads, G groups in a head. A page holds 1280 tokens of one layer; a tile is the stretch of
tokens that is packed at once: 128, or 160 where keys or values are stored at 1.5 bits (page = ten or eight tiles). Layers of
one cache may differ in bits, but not in tiles: a sequence is packed in all layers at once.

**A cached number** is ``mid + scale * (code - (levels - 1) / 2)``: scale and mid are E4M3 bytes times a static power of
two (the unit of that layer, head, group and side). Mid is the middle of the range, not its lower end: rotated groups are
centred, and FP8 is precise near zero (measured: 0.5 % less error at 2 bits, 3 % at 4).

**Planes.** Codes of p bits lie in planes so that unpacking is a mask, with no shuffle. With ``n = 8 / p`` planes of
``D / n`` channels, byte b of a token holds channels ``b, D/n + b, 2 D/n + b, ...``, the first in the lowest bits:

    bits  planes in a tile                              bytes per token and head
    2     one of 2 bits                                 D / 4
    3     one of 2 bits (low), then one of 1 bit (high) D / 4 + D / 8
    4     one of 4 bits                                 D / 2
    8     one of 8 bits                                 D
    1.5   trits over tokens: 160 tokens in 32 D bytes   D / 5

Keys are token-major ``[tile][bytes]`` (scores contract over channels), values token-contiguous ``[bytes][tile]`` (the
weighted sum contracts over tokens). **Trits**: byte (slot, channel) of keys, (channel, slot) of values, slot in 0..31,
holds tokens ``slot, 32 + slot, ..., 128 + slot`` of the tile as ``ceil(256 v / 243)``, v in base 3 with the first token
most significant: multiplying by 3 brings the next trit out above bit 8, with no table and no division.

**Metadata**: one int32 per token and group, ``[tile][G][tokens of the tile]``: bytes key scale, key mid, value scale,
value mid, lowest first. The sign bit of the key scale of group 0 (scales are never negative) marks a *retained* token:
it is held in 16 bits elsewhere, and its packed copy takes no part in attention.
"""

from __future__ import annotations

from dataclasses import dataclass

FULL_SPAN = 2**31 - 1
"""Attention span of a layer without a sliding window: longer than any context, so it needs no special case."""

PAGE_TOKENS = 1280
TRIT_SLOTS = 32
TRIT_PLANES = 5
RETAINED_FLAG = 0x80
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9
E4M3_LARGEST = 0x7E  # the byte of E4M3_MAX

GPU_HEAD_SIZES = (64, 128)
"""That kernels for GPUs take."""
LEVELS = {1.5: 3, 2.0: 4, 3.0: 8, 4.0: 16, 8.0: 256}
"""Levels of a code by its nominal bits."""

BIT_PLANES = {2.0: (2,), 3.0: (2, 1), 4.0: (4,), 8.0: (8,)}
"""Widths in bits of the planes that a code is split into, lowest bits first. Trits are laid out by token instead."""


def gpu_head_size(size: int) -> int:
    """The head size that a model's own is widened to on a GPU; one larger than all stays, and is computed slowly.

    >>> gpu_head_size(96), gpu_head_size(64), gpu_head_size(192)
    (128, 64, 192)
    """
    return next((taken for taken in GPU_HEAD_SIZES if size <= taken), size)


def stored_bits(bits: float) -> float:
    """Bits a code takes in memory: five trits share a byte.

    >>> stored_bits(1.5), stored_bits(3.0)
    (1.6, 3.0)
    """
    return 1.6 if bits == 1.5 else float(bits)


def code_bytes(bits: float, head_size: int, tokens: int) -> int:
    """Bytes of the codes of one head over ``tokens`` tokens (a multiple of the tile).

    >>> code_bytes(2.0, 128, 128), code_bytes(1.5, 128, 160), code_bytes(3.0, 64, 128)
    (4096, 4096, 3072)
    """
    if bits == 1.5:
        assert tokens % (TRIT_SLOTS * TRIT_PLANES) == 0, tokens
        return tokens // TRIT_PLANES * head_size
    return tokens * head_size * int(bits) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """Where things lie in a page of one layer. Shapes are per kv head; the arena adds [pages, kv heads].

    >>> page = PageLayout(head_size=128, kv_heads=8, key_bits=2.0, value_bits=1.5, group_size=64)
    >>> page.tile, page.tiles, page.groups, page.key_bytes, page.value_bytes, page.meta_words
    (160, 8, 2, 40960, 32768, 2560)
    """

    head_size: int
    kv_heads: int
    key_bits: float
    value_bits: float
    group_size: int
    among_trits: bool = False  # another layer of the same cache has a side at 1.5 bits, so the tile is 160 here too

    def __post_init__(self) -> None:
        assert self.key_bits in LEVELS and self.value_bits in LEVELS, (self.key_bits, self.value_bits)
        assert self.head_size % self.group_size == 0 and self.head_size % 8 == 0, (self.head_size, self.group_size)

    @property
    def tile(self) -> int:
        """Tokens packed at once."""
        return 160 if self.among_trits or 1.5 in (self.key_bits, self.value_bits) else 128

    @property
    def tiles(self) -> int:
        """Tiles in a page."""
        return PAGE_TOKENS // self.tile

    @property
    def groups(self) -> int:
        """Groups in a head."""
        return self.head_size // self.group_size

    @property
    def key_bytes(self) -> int:
        """Bytes of key codes in a page, one head."""
        return code_bytes(self.key_bits, self.head_size, PAGE_TOKENS)

    @property
    def value_bytes(self) -> int:
        """Bytes of value codes in a page, one head."""
        return code_bytes(self.value_bits, self.head_size, PAGE_TOKENS)

    @property
    def meta_words(self) -> int:
        """Words (int32) of metadata in a page, one head."""
        return PAGE_TOKENS * self.groups

    @property
    def bytes_per_token(self) -> int | float:
        """Bytes a packed token takes in one layer, all heads, codes and metadata of keys and values."""
        return self.kv_heads * (self.key_bytes + self.value_bytes + 4 * self.meta_words) / PAGE_TOKENS


def packed_tokens(length: int, window: int, tile: int) -> int:
    """Tokens that lie in packed pages when ``length`` are cached: whole tiles, never one of the last ``window``.

    >>> packed_tokens(127, 128, 128), packed_tokens(256, 128, 128), packed_tokens(511, 128, 128)
    (0, 128, 256)
    """
    return max(0, length - window) // tile * tile


def pages_for(tokens: int) -> int:
    """Pages that hold ``tokens`` packed tokens.

    >>> pages_for(0), pages_for(1280), pages_for(1281)
    (0, 1, 2)
    """
    return -(-tokens // PAGE_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainLayout:
    """A page of 16-bit keys and values, token-major: the control group, in the same arena."""

    head_size: int
    kv_heads: int

    @property
    def tile(self) -> int:
        """Tokens that leave the window at once."""
        return 128

    @property
    def bytes_per_token(self) -> float:
        """Bytes a token takes in one layer."""
        return 4 * self.kv_heads * self.head_size
