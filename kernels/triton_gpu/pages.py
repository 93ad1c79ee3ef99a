"""Packed pages as launches hand them to kernels."""

from __future__ import annotations

import torch

from skvq.kernels.interface import PackedPages


def bits_code(bits: float) -> int:
    """Bits as kernels name them: 15 for 1.5."""
    return 15 if bits == 1.5 else int(bits)


def page_strides(pages: PackedPages) -> tuple[int, ...]:
    """Page and head strides of key codes, value codes and metadata."""
    parts = (pages.key_codes, pages.value_codes, pages.meta)
    for part, dtype in zip(parts, (torch.uint8, torch.uint8, torch.int32), strict=True):
        assert part.dtype == dtype and part.stride(2) == 1, (part.dtype, part.stride())
    return tuple(stride for part in parts for stride in part.stride()[:2])
