# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Packed pages as kernels see them (``layout.py`` says what they hold). Bits are named by whole numbers: 15 stands for 1.5."""

from __future__ import annotations

import torch
import triton

from skvq.kernels.interface import PackedPages
from skvq.kernels.layout import PAGE_TOKENS


@triton.constexpr_function
def in_page(tokens):
    """Tiles, or other stretches of ``tokens`` tokens, in a page.

    >>> in_page(128), in_page(160)
    (10, 8)
    """
    return PAGE_TOKENS // tokens


@triton.constexpr_function
def levels(bits):
    """Codes of that many bits are 0 .. levels - 1.

    >>> levels(2), levels(15)
    (4, 3)
    """
    return 3 if bits == 15 else 2**bits


@triton.constexpr_function
def middle(bits):
    """The middle of those codes: a code stands for ``mid + scale * (code - middle)``.

    >>> middle(2), middle(15)
    (1.5, 1.0)
    """
    return (levels(bits) - 1) / 2


@triton.constexpr_function
def low_bits(bits):
    """Bits of a field in the first plane set: the lower two of 3, and of trits the whole byte.

    >>> low_bits(2), low_bits(3), low_bits(15)
    (2, 2, 8)
    """
    return 8 if bits == 15 else (2 if bits == 3 else bits)


@triton.constexpr_function
def row_bytes(bits, size):
    """Bytes of the first plane set of one token and head; of trits those of one slot of a tile.

    >>> row_bytes(2, 128), row_bytes(3, 128), row_bytes(15, 128)
    (32, 32, 128)
    """
    return size * low_bits(bits) // 8


@triton.constexpr_function
def block_rows(bits, size, groups):
    """Bytes of such a row that one dot takes: all of one plane set and, but for trits, of one group.

    >>> block_rows(2, 128, 1), block_rows(8, 128, 4), block_rows(15, 128, 1)
    (32, 32, 32)
    """
    return 32 if bits == 15 else min(row_bytes(bits, size), size // groups)


@triton.constexpr_function
def code_bytes(bits, size, tokens):
    """Bytes of the codes of one head, all plane sets; of trits ``tokens`` are whole tiles (``layout.code_bytes``).

    >>> code_bytes(2, 128, 128), code_bytes(3, 64, 128), code_bytes(15, 128, 160)
    (4096, 3072, 4096)
    """
    return tokens // 5 * size if bits == 15 else tokens * size * bits // 8


def bits_code(bits: float) -> int:
    """Bits as kernels name them.

    >>> bits_code(2.0), bits_code(1.5)
    (2, 15)
    """
    return 15 if bits == 1.5 else int(bits)


def page_strides(pages: PackedPages) -> tuple[int, ...]:
    """Page and head strides of key codes, value codes and metadata, as all kernels over packed pages take them."""
    parts = (pages.key_codes, pages.value_codes, pages.meta)
    for part, dtype in zip(parts, (torch.uint8, torch.uint8, torch.int32), strict=True):
        assert part.dtype == dtype and part.stride(2) == 1, (part.dtype, part.stride())
    return tuple(stride for part in parts for stride in part.stride()[:2])
